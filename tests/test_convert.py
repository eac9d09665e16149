"""``causvid convert`` through the command line: every pair of layouts, and every doubt."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wan_files import SMALL, random_model

from causvid import cli, convert, weights
from causvid.errors import UserError
from causvid.models import wan_files
from causvid.models.wan import LAYOUTS, config_of, links


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same weights in every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    weights.write_tensors(folder / "run" / "weights.safetensors", dict(random_model().named_parameters()))
    found = wan_files.find(folder / "run")
    for layout in LAYOUTS:
        wan_files.write(found, SMALL, layout, folder / (f"{layout}.pt" if layout == "causvid" else layout), 10**9)
    config = config_of(SMALL, "official")
    weights.write_json(folder / "heads2.json", config | {"num_heads": 2})  # the shapes are those of 4 heads
    (folder / "empty").mkdir()
    return folder


def run(capsys, *arguments):
    """(exit status, last line of stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out.strip().split("\n")[-1], err


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_becomes_every_other(source, target, sources, tmp_path, capsys):
    start = sources / (f"{source}.pt" if source == "causvid" else source)
    config = ["--config", "wan_test"] if source == "causvid" else []
    out = tmp_path / ("out.pt" if target == "causvid" else "out")
    code, last, err = run(capsys, "convert", start, out, "--layout", target, *config, "--json")
    certificate = json.loads(last)
    assert code == 0 and certificate["max_abs_difference"] == 0 and certificate["unequal_tensors"] == 0
    assert certificate["max_abs_output"] > 0.1 and certificate["layout"] == target
    assert "max abs difference of outputs 0" in " ".join(err.split())
    saved = json.loads(Path(certificate["certificate"]).read_text())
    assert saved == {key: certificate[key] for key in saved}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["causvid.pt", "out", "--layout", "ours"], "does not tell its number of heads"),
        (["official", "out", "--layout", "ofical"], "did you mean 'official'"),
        (["official", "ours", "--layout", "ours"], "nothing is overwritten"),
        (["official", "out", "--layout", "ours", "--config", "wan_1_3b"], "does not fit"),
        (["official", "out", "--layout", "ours", "--config", "heads2.json"], "heads 4 (that of --config is 2)"),
        (["official", "empty", "--layout", "causvid"], "empty is a folder, and layout 'causvid' is one file: give "),
        (["nowhere", "out", "--layout", "ours"], "do not exist"),
        (["official", "out", "--layout", "ours", "--part", "critic"], "no part"),
    ],
)
def test_any_doubt_ends_with_status_2_and_nothing_written(arguments, message, sources, capsys):
    before = sorted(path.name for path in sources.rglob("*"))
    paths = [sources / name for name in arguments[:2]]
    options = [sources / option if option.endswith(".json") else option for option in arguments[2:]]
    code, _, err = run(capsys, "convert", *paths, *options)
    assert code == 2 and message in " ".join(err.split())
    assert sorted(path.name for path in sources.rglob("*")) == before


def test_a_certificate_tells_a_difference(sources, tmp_path):
    tensors, _ = weights.read_tensors(sources / "ours" / "weights.safetensors")
    tensors["blocks.0.self_attention.qkv.weight"] = tensors["blocks.0.self_attention.qkv.weight"].roll(48, 0)
    weights.write_tensors(tmp_path / "weights.safetensors", tensors)
    certificate = convert.certify(wan_files.find(sources / "ours"), wan_files.find(tmp_path), SMALL)
    assert certificate["unequal_tensors"] == 1 and certificate["max_abs_difference"] > 1e-4


def test_a_write_that_went_wrong_is_told(sources, tmp_path, monkeypatch):
    true_write = wan_files.write

    def bad_write(found, size, layout, target, shard_bytes):
        path = true_write(found, size, layout, target, shard_bytes)
        file = path / "diffusion_pytorch_model.safetensors"
        tensors, _ = weights.read_tensors(file)
        tensors["head.head.bias"] = tensors["head.head.bias"] + 1
        weights.write_tensors(file, tensors)
        return path

    monkeypatch.setattr(wan_files, "write", bad_write)
    with pytest.raises(UserError, match="differs from .* in 1 tensors"):
        convert.convert(sources / "ours", tmp_path / "out", "official")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_ends_the_certification_leaves_nothing_written(layout, sources, tmp_path, monkeypatch):
    """An error that nobody foresaw, and an interruption; a folder that was there and empty stays so."""
    (tmp_path / "empty").mkdir()
    targets = [tmp_path / "out.pt"] if layout == "causvid" else [tmp_path / "out", tmp_path / "empty"]
    for error in (TypeError, cli.Stopped):
        monkeypatch.setattr(convert, "run", lambda *_, error=error: (_ for _ in ()).throw(error()))
        for target in targets:
            with pytest.raises(error):
                convert.convert(sources / "ours", target, layout)
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": "x"}, "eps must be a number between 0 and 1, got 'x'"),
        ({"window_size": [3, 3]}, "window_size is [3, 3]"),
        ({"qk_norm": False}, "qk_norm is False"),
        ({"cross_attn_norm": False}, "unknown blocks.0.norm3.weight"),
    ],
)
def test_the_config_of_another_architecture_is_refused_and_nothing_written(change, message, sources, tmp_path, capsys):
    """The last one is an architecture of ours; these weights are not its."""
    shutil.copytree(sources / "official", tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    weights.write_json(tmp_path / "in" / "config.json", config | change)
    code, _, err = run(capsys, "convert", tmp_path / "in", tmp_path / "out", "--layout", "ours")
    assert code == 2 and message in " ".join(err.split()) and not (tmp_path / "out").exists()


def test_converting_and_all_other_commands_need_neither_diffusers_nor_transformers(sources, tmp_path):
    program = (
        "import sys\n"
        "sys.modules['diffusers'] = sys.modules['transformers'] = None\n"
        "import pkgutil, importlib, causvid\n"
        "for found in pkgutil.walk_packages(causvid.__path__, 'causvid.'):\n"
        "    importlib.import_module(found.name)\n"
        "from causvid import cli\n"
        f"cli.main(['convert', {str(sources / 'official')!r}, {str(tmp_path / 'out')!r}, '--layout', 'diffusers'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("transformer"), done.stderr


def test_the_certificate_covers_half_precision(sources, tmp_path):
    model = random_model().to(torch.bfloat16)
    weights.write_tensors(tmp_path / "in" / "weights.safetensors", dict(model.named_parameters()))
    certificate = convert.convert(tmp_path / "in", tmp_path / "out", "official", "wan_test")
    assert set(certificate["dtypes"]) == {"bfloat16"} and certificate["max_abs_difference"] == 0


def mixed(folder, chosen):
    """An official folder in fp32, of which the chosen tensors are in bf16; returns their names."""
    model = dict(random_model().named_parameters())
    named = {n: p.detach() for link in links(SMALL, "official") for n, p in link.split(model[link.ours])}
    narrow = [name for name in named if chosen(name)]
    weights.write_tensors(
        folder / "diffusion_pytorch_model.safetensors",
        {name: tensor.bfloat16() if name in narrow else tensor for name, tensor in named.items()},
    )
    weights.write_json(folder / "config.json", config_of(SMALL, "official"))
    return narrow


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_tensor_keeps_its_own_type(layout, tmp_path, capsys):
    """Queries, keys and values of different types too, except in the one tensor that they are in our layout: told."""
    narrow = mixed(tmp_path / "in", lambda name: name.endswith((".self_attn.q.weight", ".ffn.0.weight", "head.bias")))
    out = tmp_path / ("out.pt" if layout == "causvid" else "out")
    code, last, err = run(capsys, "convert", tmp_path / "in", out, "--layout", layout, "--json")
    certificate, told = json.loads(last), " ".join(err.split())
    written = wan_files.find(out).files.dtypes
    queries = [name for name in narrow if "attn" in name] if layout == "ours" else []
    kept = len(narrow) - len(queries)
    assert code == 0 and len(narrow) == 5 and certificate["unequal_tensors"] == 0
    assert sum(dtype == torch.bfloat16 for dtype in written.values()) == kept
    assert certificate["dtypes"] == {"float32": len(written) - kept, "bfloat16": kept}
    assert certificate["retyped_tensors"] == queries and ("have a wider type here" in told) == bool(queries)
    assert f"{kept} bfloat16" in told and all(name in told for name in queries)
    # And back again: every value as it was.
    back = convert.convert(out, tmp_path / "back", "official", "wan_test")
    start, end = wan_files.find(tmp_path / "in").files, wan_files.find(tmp_path / "back").files
    assert back["unequal_tensors"] == 0 and all(torch.equal(start.read(n).float(), end.read(n).float()) for n in narrow)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told_by_name_and_nothing_is_written(value, sources, tmp_path, capsys):
    tensors, _ = weights.read_tensors(sources / "official" / "diffusion_pytorch_model.safetensors")
    tensors["blocks.1.ffn.0.weight"][3, 4] = value
    weights.write_tensors(tmp_path / "in" / "diffusion_pytorch_model.safetensors", tensors)
    code, _, err = run(capsys, "convert", tmp_path / "in", tmp_path / "out", "--layout", "ours", "--config", "wan_test")
    told = " ".join(err.split())
    assert code == 2 and not (tmp_path / "out").exists() and "differs" not in told
    assert "holds NaN or infinite numbers, in 1 of 69 tensors: blocks.1.ffn.0.weight." in told


def test_outputs_beyond_the_range_of_half_precision_are_no_difference(sources, tmp_path):
    tensors, _ = weights.read_tensors(sources / "official" / "diffusion_pytorch_model.safetensors")
    large = {n: (t * 3000 if n == "blocks.0.ffn.2.weight" else t).half() for n, t in tensors.items()}
    weights.write_tensors(tmp_path / "in" / "diffusion_pytorch_model.safetensors", large)
    certificate = convert.convert(tmp_path / "in", tmp_path / "out", "diffusers", "wan_test")
    assert certificate["max_abs_difference"] == 0 and certificate["unequal_tensors"] == 0

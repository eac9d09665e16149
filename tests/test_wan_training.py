"""Training of a Wan of cut size, by the shipped specs, from an official folder with random weights and a store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wan_training
from wan_files import SMALL, in_folder, official_folder, random_model

from causvid import build, cli, experiment, runs, spec, weights
from causvid.attention.masks import Bidirectional
from causvid.errors import UserError
from causvid.models import umt5, wan_files
from causvid.models.wan import Size


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights, and a cache of embeddings of this module's own."""
    folder = tmp_path_factory.mktemp("wan_training")
    official_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAUSVID_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def whole(place):
    """All stages of the recipe: what came out, and how often the text encoder was loaded."""
    loads = []
    load = umt5.Umt5._load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(umt5.Umt5, "_load", lambda self: loads.append(1) or load(self))
        return experiment.run(wan_training.make(place, in_folder(place)), [], place / "runs"), loads


def curve(stage: Path) -> list[dict[str, float]]:
    """What the stage in that folder wrote while it trained; folders of other runs may lie beside it."""
    return [json.loads(line) for line in (stage / "curves.jsonl").read_text().splitlines()]


def test_the_whole_recipe_runs_and_loads_the_text_encoder_once(whole, place):
    outcome, loads = whole
    assert outcome.executed == ["teacher", "ode_pairs", "ode_init", "distill"] and len(loads) == 1
    assert [len(curve(outcome.folders[stage])) for stage in ("ode_init", "distill")] == [3, 2]
    student = weights.read_tensors(outcome.run / "weights.safetensors")[0]
    teacher = weights.read_tensors(outcome.folders["teacher"] / "weights.safetensors")[0]
    assert student.keys() == teacher.keys() and not torch.equal(student["head.weight"], teacher["head.weight"])
    assert all(torch.isfinite(value).all() for value in student.values())


def test_the_teacher_is_the_given_weights(whole):
    teacher = weights.read_tensors(whole[0].folders["teacher"] / "weights.safetensors")[0]
    assert all(torch.equal(value, teacher[name]) for name, value in random_model().named_parameters())


def test_its_first_stages_are_those_of_the_specs_beside_it(whole, place):
    for base, last in (("wan/ode_pairs", "ode_pairs"), ("wan/causal_ode", "ode_init")):
        outcome = experiment.run(wan_training.make(place, in_folder(place), base), [], place / "runs")
        assert outcome.executed == [] and outcome.run == whole[0].folders[last]


def test_guidance_leads_away_from_the_negative_prompt_and_not_from_the_stores_empty_one(whole, place):
    world = build.World(spec.load(wan_training.make(place, in_folder(place))))
    _, text, free = world.batch([0, 1])
    assert torch.equal(free.embeddings, world.text_encoder.encode(["blurred"] * 2).embeddings)
    empty = build.World(spec.load(wan_training.make(place, in_folder(place)), ["world.negative_prompt=''"]))
    assert torch.equal(empty.unconditional(1).embeddings[0, 0], torch.ones(32)) and text.embeddings.shape == (2, 12, 32)


def test_the_student_is_sampled_by_the_spec_it_was_trained_by(whole, place, capsys, tmp_path):
    name = wan_training.make(place, in_folder(place))
    made = tmp_path / "made.yaml"
    made.write_text(f"base: {name}\nworld: {{dataset: {{name: canvas, frames: 21, height: 32, width: 64}}}}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "a red fox", "--spec", str(made), "--weights", str(in_folder(place)), "--model",
                  str(whole[0].run / "weights.safetensors"), "--runs", str(tmp_path), "--out", str(tmp_path / "x.mp4"),
                  "--device", "cpu"])  # fmt: skip
    assert not ended.value.code, capsys.readouterr().err
    assert (tmp_path / "x.mp4").stat().st_size > 0


def test_bidirectional_distillation_from_the_teachers_weights_in_bf16(place):
    name = wan_training.make(place, in_folder(place), "wan/bidirectional_dmd")
    exact = experiment.run(name, [], place / "runs")
    assert exact.executed[-1] == "distill" and "ode_init" not in exact.folders
    half = experiment.run(name, ["precision=bf16"], place / "runs")
    ours, theirs = ([row["loss"] for row in curve(outcome.run)] for outcome in (half, exact))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.05)
    assert {v.dtype for v in weights.read_tensors(half.run / "weights.safetensors")[0].values()} == {torch.float32}


WIDE = Size(dim=96, ffn_dim=128, heads=3, layers=1, text_dim=32, freq_dim=64)
TWO_SIZES = """
init: teacher
real_score: {name: dit, dim: 96, ffn_dim: 128, heads: 3, layers: 1, freq_dim: 64}
"""


@pytest.mark.parametrize(("fake", "width"), [("teacher", 48), ("real_score", 96)])
def test_scores_may_be_of_another_size_than_the_student(place, fake, width):
    folder = place / "wide"
    if not folder.exists():
        weights.write_tensors(folder / "weights.safetensors", dict(random_model(WIDE).named_parameters()))
    name = wan_training.make(place, in_folder(place), extra=TWO_SIZES)
    outcome = experiment.run(name, [f"runtime.real_score={folder}", f"fake_score={fake}"], place / "runs")
    assert "real_score" in outcome.folders
    shapes = {n: v.shape for n, v in weights.read_tensors(outcome.run / "fake_score.safetensors")[0].items()}
    assert shapes["head.weight"][1] == width
    assert weights.read_tensors(outcome.run / "weights.safetensors")[0]["head.weight"].shape[1] == 48


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runtime.weights=nowhere"], "weights nowhere do not exist"),
        (["runtime.weights=null"], "say where with runtime.weights=FOLDER"),
        (["model.heads=6"], "heads 4 (the spec's is 6)"),
        (["fake_score=real_score"], "real_score is null"),
        (["runtime.gpus=2"], "start them with torchrun --nproc-per-node 2"),
        (["runtime.device=tpu9"], "torch knows no 'tpu9'"),
        (["ode_pairs.keep=[1.0, 0.757]"], "no state at t = 0.7570"),
        (["ode_pairs.keep=[1.0, 0.756757]"], "no state at t = 0.5217"),
    ],
)
def test_what_does_not_fit_is_one_error(place, overrides, message, tmp_path):
    name = wan_training.make(place, in_folder(place))
    with pytest.raises(UserError) as refused:
        experiment.run(name, overrides, tmp_path)
    assert message in str(refused.value)


GAN = "loss={name: sum, of: [dmd, {name: gan, r1: 1.0}]}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runtime.gpus=4"], "ode_init.batch: 2 samples can't be shared by 4 processes"),
        (["runtime.gpus=2", "distill.optimizer=muon"], "distill.optimizer: 'muon' needs whole matrices"),
        (["runtime.gpus=2", GAN, "distill.activation_checkpointing=false"], "r1 penalty differentiates twice"),
    ],
)  # fmt: skip
def test_what_several_processes_can_t_do_is_told_by_the_plan(place, overrides, message):
    with pytest.raises(UserError, match=message):
        experiment.plan(spec.load(wan_training.make(place, in_folder(place)), overrides))


def test_a_changed_weight_is_another_teacher(place):
    name = wan_training.make(place, in_folder(place))
    before = experiment.plan(spec.load(name), "teacher")[0].identity
    changed = dict(random_model().named_parameters())
    changed["head.bias"] = changed["head.bias"] + 1
    weights.write_tensors(place / "other" / "weights.safetensors", changed)
    other = experiment.plan(spec.load(name, [f"runtime.teacher={place / 'other'}"]), "teacher")[0]
    assert other.identity != before
    assert wan_files.find(place / "other").layout == "ours" and SMALL.dim == 48


def test_a_network_is_loaded_from_shards_as_from_one_file(place, tmp_path):
    from causvid import tensor_files

    arm = spec.load(wan_training.make(place, in_folder(place)))
    tensors = dict(random_model().named_parameters())
    tensor_files.write_shards(tmp_path, "weights", iter(tensors.items()), shard_bytes=50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = build.load_network(arm, build.World(arm), Bidirectional(), tmp_path / "weights.safetensors")
    assert all(torch.equal(value, tensors[name]) for name, value in loaded.named_parameters())


@pytest.mark.slow
def test_two_processes_are_one_and_go_on_where_another_number_of_them_stopped(whole, place):
    """Losses to 1e-5: two processes, then one, then two again, each stopped in the middle of a stage."""
    name = wan_training.make(place, in_folder(place))
    script = str(Path(wan_training.__file__))
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    for command in (
        [*two, name, str(place / "shared"), "ode_init", "1"],
        [sys.executable, script, name, str(place / "shared"), "distill", "0"],
        [*two, name, str(place / "shared")],
    ):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CAUSVID_CACHE": str(place / "cache")}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert ended.returncode == 0, ended.stderr
    store = runs.Store(place / "shared")
    nodes = {node.name: node for node in experiment.plan(spec.load(name))}
    for stage in ("ode_init", "distill"):
        ours, theirs = curve(store.folder(nodes[stage])), curve(whole[0].folders[stage])
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            for key in {"loss", "fake_score_loss", "gradient_norm", "student_gradient_norm"} & set(other):
                assert one[key] == pytest.approx(other[key], rel=1e-5), (stage, key)
    for node in nodes.values():
        assert store.done(node)
        for path in store.folder(node).glob("*.safetensors"):
            for key, value in weights.read_tensors(path)[0].items():
                wanted = weights.read_tensors(place / "runs" / path.relative_to(place / "shared"))[0][key]
                assert (value.float() - wanted.float()).abs().max() < 1e-5, (node.name, path.name, key)

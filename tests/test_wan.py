"""Our transformer against diffusers' own, on the same weights, and weights in every layout against theirs."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from wan_files import SMALL, random_input, random_model

from causvid import tensor_files, weights
from causvid.attention.masks import Bidirectional, BlockCausal
from causvid.errors import UserError
from causvid.models import wan, wan_files
from causvid.models.layouts import by_block, shapes_of
from causvid.models.wan import LAYOUTS, SIZES, config_of, links, size_from_config
from causvid.tensor_files import load_pickle, open_tensors, parts
from causvid.types import Text

WIDE = SIZES["wan_test_wide"]


def in_layout(model, size, layout):
    """The model's weights under the names of a layout."""
    state = dict(model.named_parameters())
    return {name: part.detach() for link in links(size, layout) for name, part in link.split(state[link.ours])}


def theirs(model, size):
    """diffusers' own network with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    config = config_of(size, "diffusers")
    config.pop("_class_name")
    network = diffusers.WanTransformer3DModel(**config)
    network.load_state_dict(in_layout(model, size, "diffusers"), strict=True)
    return network.eval()


def call_theirs(network, x, t, text, per_token=0):
    """diffusers' velocity ``b f c h w``; with ``per_token`` tokens per frame, each frame has its own time."""
    times = t.repeat_interleave(per_token, 1) if per_token else t[:, 0]
    out = network(rearrange(x, "b f c h w -> b c f h w"), times * 1000, text.embeddings, return_dict=False)[0]
    return rearrange(out, "b c f h w -> b f c h w")


@pytest.mark.parametrize("size", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("shape", [(3, 6, 10), (1, 2, 2), (5, 14, 6)], ids=str)
def test_our_network_is_that_of_diffusers_forward_and_backward(size, shape):
    model = random_model(size)
    network = theirs(model, size)
    x, t, text = random_input(size, 2, *shape)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = model(ours_x, t, text).velocity
    reference = call_theirs(network, theirs_x, t, text)
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()
    probe = torch.randn_like(reference)
    (ours * probe).sum().backward()
    (reference * probe).sum().backward()
    assert (ours_x.grad - theirs_x.grad).abs().max() <= 1e-4 * theirs_x.grad.abs().max()
    gradients = dict(network.named_parameters())
    # Where attention sees one token alone, queries and keys have no gradient: what is left is rounding of the whole.
    rounding = torch.finfo(x.dtype).eps * max(p.grad.abs().max() for p in gradients.values())
    for link in links(size, "diffusers"):
        ours_part = dict(link.split(dict(model.named_parameters())[link.ours].grad))
        largest = max(gradients[name].grad.abs().max() for name in link.theirs)  # a key's bias has no gradient
        for name, part in ours_part.items():
            assert (part - gradients[name].grad).abs().max() <= 1e-4 * largest + rounding, name


def test_a_time_per_frame_is_that_of_diffusers():
    model = random_model()
    x, _, text = random_input()
    t = torch.rand(2, 3)
    reference = call_theirs(theirs(model, SMALL), x, t, text, per_token=3 * 5)
    assert (model(x, t, text).velocity - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_one_causal_block_is_the_bidirectional_model():
    x, t, text = random_input(frames=3)
    both = [random_model(mask=mask)(x, t, text).velocity for mask in (Bidirectional(), BlockCausal(block_frames=3))]
    assert torch.equal(*both)
    later = random_model(mask=BlockCausal(block_frames=1))(x, t, text).velocity
    assert (later - both[0]).abs().max() > 1e-3


def test_the_official_layout_is_accepted_by_the_conversion_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model = random_model(WIDE)
    converted = convert_wan_transformer_to_diffusers(in_layout(model, WIDE, "official"))
    wanted = in_layout(model, WIDE, "diffusers")
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("size", SIZES)
def test_the_diffusers_layout_has_exactly_the_names_and_shapes_of_diffusers(size):
    diffusers = pytest.importorskip("diffusers")
    config = config_of(SIZES[size], "diffusers")
    config.pop("_class_name")
    with torch.device("meta"):
        network = diffusers.WanTransformer3DModel(**config)
    ours = {name: link.shape for link in links(SIZES[size], "diffusers") for name in link.theirs}
    assert ours == {name: tuple(value.shape) for name, value in network.state_dict().items()}


def test_original_names_are_the_published_ones():
    names = {name for link in links(SIZES["wan_1_3b"], "official") for name in link.theirs}
    assert len(names) == 825  # tensors of the released 1.3B file
    assert {"patch_embedding.weight", "head.head.bias", "head.modulation", "blocks.29.cross_attn.norm_k.weight",
            "blocks.0.self_attn.o.weight", "blocks.7.norm3.bias", "blocks.0.modulation", "time_projection.1.bias",
            "text_embedding.2.weight", "blocks.3.ffn.2.weight"} <= names  # fmt: skip


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000], ids=["single", "sharded"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_round_trip_is_exact(layout, shard_bytes, dtype, tmp_path):
    model = random_model().to(dtype)
    weights.write_tensors(tmp_path / "run" / "weights.safetensors", dict(model.named_parameters()))
    source = wan_files.find(tmp_path / "run" / "weights.safetensors")
    target = tmp_path / ("model.pt" if layout == "causvid" else "there")
    written = wan_files.write(source, SMALL, layout, target, shard_bytes)
    if layout != "causvid":
        assert (len(list(written.glob("*.safetensors"))) > 1) == (shard_bytes == 60_000)
    found = wan_files.find(target)
    assert found.layout == layout
    size = wan_files.size_of(found, None if layout != "causvid" else "wan_test")
    assert size == SMALL
    back = wan_files.write(found, size, "ours", tmp_path / "back", 10**9)
    tensors, _ = weights.read_tensors(back / "weights.safetensors")
    assert tensors.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(tensors[name], value) for name, value in model.named_parameters())
    with torch.device("meta"):
        empty = size.build()
    loaded = wan_files.load(empty, size, found, None, "cpu")
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in loaded.named_parameters())


def test_a_folder_that_diffusers_saved_is_read(tmp_path):
    model = random_model()
    network = theirs(model, SMALL)
    network.save_pretrained(tmp_path / "transformer", max_shard_size="60KB")
    found = wan_files.find(tmp_path)
    assert found.layout == "diffusers" and wan_files.size_of(found) == SMALL
    assert all(torch.equal(dict(wan_files.converted(found, SMALL, "ours"))[n], p) for n, p in model.named_parameters())


def test_diffusers_loads_the_folder_that_we_write(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = random_model()
    weights.write_tensors(tmp_path / "weights.safetensors", dict(model.named_parameters()))
    written = wan_files.write(wan_files.find(tmp_path), SMALL, "diffusers", tmp_path / "out", 10**9)
    # from_pretrained needs accelerate for this class; its two halves do not.
    network = diffusers.WanTransformer3DModel.from_config(diffusers.WanTransformer3DModel.load_config(written))
    network.load_state_dict(load_file(written / "diffusion_pytorch_model.safetensors"))
    network.eval()
    x, t, text = random_input()
    with torch.no_grad():
        reference = call_theirs(network, x, t, text)
        assert (model(x, t, text).velocity - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize("wrapper", ["", "_fsdp_wrapped_module.", "_orig_mod.", "module."])
def test_models_of_training_codes_are_read(wrapper, tmp_path):
    model = random_model()
    official = in_layout(model, SMALL, "official")
    inside = {
        "model." + name.replace("blocks.0.", f"blocks.0.{wrapper}"): value.clone() for name, value in official.items()
    }
    other = {name: value + 1 for name, value in inside.items()}
    torch.save({"generator": inside, "generator_ema": other, "critic": other, "step": 3}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="generator, generator_ema, critic"):
        wan_files.find(tmp_path / "model.pt")
    for part, plus in (("generator", 0), ("generator_ema", 1)):
        found = wan_files.find(tmp_path / "model.pt", part)
        assert found.layout == "causvid"
        back = dict(wan_files.converted(found, SMALL, "official"))
        assert all(torch.equal(back[name], official[name] + plus) for name in official)
    with pytest.raises(UserError, match="no part 'teacher'; it holds generator"):
        wan_files.find(tmp_path / "model.pt", "teacher")


def test_the_generator_is_taken_where_there_is_no_average(tmp_path):
    inside = {"model." + name: value for name, value in in_layout(random_model(), SMALL, "official").items()}
    torch.save({"generator": inside, "critic": inside}, tmp_path / "model.pt")
    assert wan_files.find(tmp_path / "model.pt").layout == "causvid"


def damaged(kind, folder):
    """An official folder with one thing wrong with it."""
    tensors = in_layout(random_model(), SMALL, "official")
    path = folder / "diffusion_pytorch_model.safetensors"
    if kind == "renamed":
        tensors["blocks.0.self_attn.query.weight"] = tensors.pop("blocks.0.self_attn.q.weight")
    if kind == "extra":
        tensors["blocks.0.self_attn.k_img.weight"] = torch.zeros(48, 48)
    if kind == "missing":
        tensors.pop("head.head.weight")
    if kind == "shape":
        tensors["blocks.1.ffn.0.weight"] = torch.zeros(81, 48)
    if kind == "transposed":
        tensors["blocks.1.ffn.0.weight"] = tensors["blocks.1.ffn.0.weight"].T.contiguous()
    if kind == "dtype":
        tensors["blocks.1.ffn.0.weight"] = torch.zeros(80, 48, dtype=torch.int64)
    if kind == "float8":
        tensors["blocks.1.ffn.0.weight"] = torch.zeros(80, 48).to(torch.float8_e4m3fn)
    weights.write_tensors(path, tensors)
    weights.write_json(folder / "config.json", config_of(SMALL, "official"))
    content = path.read_bytes()
    other = {"empty": b"", "truncated": content[: len(content) // 2], "short": content[:-1],
             "html": b"<!DOCTYPE html><html><body>404</body></html>", "garbage": b"\xff" * 4096,
             "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}  # fmt: skip
    if kind in other:
        path.write_bytes(other[kind])
    if kind in ("code", "objects", "html_pt", "truncated_pt", "not_tensors", "list"):
        path.unlink()
        path = folder / "diffusion_pytorch_model.pt"
        torch.save({"code": {"a": Runs()}, "objects": {"a": SMALL}, "list": [torch.zeros(1)],
                    "not_tensors": {"a": 1}}.get(kind, tensors), path)  # fmt: skip
        whole = path.read_bytes()
        path.write_bytes({"html_pt": b"\n <html></html>", "truncated_pt": whole[: len(whole) // 2]}.get(kind, whole))
    return folder


class Runs:
    """Pickled, it would run a command when it is read."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


DAMAGES = {
    "renamed": r"missing blocks\.0\.self_attn\.q\.weight; unknown blocks\.0\.self_attn\.query\.weight",
    "extra": r"unknown blocks\.0\.self_attn\.k_img\.weight",
    "missing": r"missing head\.head\.weight",
    "shape": r"ffn\.0\.weight has shape \(81, 48\), expected \(80, 48\)",
    "transposed": r"has shape \(48, 80\), expected \(80, 48\)",
    "dtype": "has type torch.int64, expected one of",
    "float8": "has type torch.float8_e4m3fn, expected one of",
    "empty": "damaged or not weights",
    "truncated": "damaged or not weights",
    "short": "damaged or not weights",
    "html": "is a web page, not weights",
    "garbage": "damaged or not weights",
    "lfs": "Git LFS pointer",
    "code": "could run code: refused",
    "objects": "could run code: refused",
    "html_pt": "is a web page, not weights",
    "truncated_pt": "damaged or not weights",
    "not_tensors": "holds no dictionary of tensors",
    "list": "holds a list, not a dictionary",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_one_clear_error(kind, tmp_path, capsys):
    damaged(kind, tmp_path)
    with warnings.catch_warnings(), pytest.raises(UserError, match=DAMAGES[kind]) as error:
        warnings.simplefilter("error")
        found = wan_files.find(tmp_path)
        wan_files.checked(found, wan_files.size_of(found))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert "never" not in capsys.readouterr().out


def test_all_that_does_not_fit_is_told_and_what_is_alike_in_all_blocks_once():
    problems = ["missing blocks.0.a.w", "missing head.bias", "missing blocks.1.a.w", "missing blocks.10.a.w"]
    problems += [f"unknown x{number}" for number in range(20)] + ["blocks.2.w has shape (81, 48), expected (80, 48)"]
    assert by_block(problems) == ["missing blocks.0.a.w (and so in blocks 1, 10)", "missing head.bias", *problems[4:]]


def sharded(folder):
    weights.write_tensors(folder / "ours" / "weights.safetensors", dict(random_model().named_parameters()))
    return wan_files.write(wan_files.find(folder / "ours"), SMALL, "official", folder / "shards", 60_000)


def test_a_missing_shard_is_told_with_and_without_an_index(tmp_path):
    folder = sharded(tmp_path)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    assert json.loads(index.read_text())["metadata"]["total_size"] == 4 * sum(
        p.numel() for p in random_model().parameters()
    )
    lost = sorted(folder.glob("*-00002-of-*"))[0]
    lost.unlink()
    with pytest.raises(UserError, match=f"lacks shards that its index names: {lost.name}"):
        wan_files.find(folder)
    index.unlink()
    with pytest.raises(UserError, match="shards of diffusion_pytorch_model; fetch the missing ones"):
        wan_files.find(folder)


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "x.safetensors"}}', "<html>"])
def test_a_damaged_index_is_told(content, tmp_path):
    folder = sharded(tmp_path)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="index"):
        wan_files.find(folder)


def test_an_index_that_disagrees_with_its_shards_is_told(tmp_path):
    folder = sharded(tmp_path)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].pop("head.head.bias")
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"disagree on head\.head\.bias"):
        wan_files.find(folder)


def test_a_failed_write_leaves_nothing_and_a_target_is_never_overwritten(tmp_path, monkeypatch):
    weights.write_tensors(tmp_path / "weights.safetensors", dict(random_model().named_parameters()))
    found = wan_files.find(tmp_path)
    with pytest.raises(UserError, match="nothing is overwritten"):
        wan_files.write(found, SMALL, "official", tmp_path, 10**9)
    monkeypatch.setattr(tensor_files, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(UserError, match="no space"):
        wan_files.write(found, SMALL, "official", tmp_path / "new", 10**9)
    assert list((tmp_path / "new").iterdir()) == []


def test_weights_load_in_another_precision(tmp_path):
    model = random_model()
    weights.write_tensors(tmp_path / "weights.safetensors", dict(model.named_parameters()))
    with torch.device("meta"):
        empty = SMALL.build()
    wan_files.load(empty, SMALL, wan_files.find(tmp_path), torch.bfloat16, "cpu")
    for name, value in empty.named_parameters():
        assert torch.equal(value, dict(model.named_parameters())[name].bfloat16())


@pytest.mark.parametrize("layout", ["ours", "official", "diffusers"])
@pytest.mark.parametrize("size", SIZES)
def test_a_config_tells_the_size(size, layout):
    assert size_from_config(json.loads(json.dumps(config_of(SIZES[size], layout))), "config.json") == SIZES[size]


OFFICIAL = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960,
            "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30, "out_dim": 16,
            "text_len": 512}  # fmt: skip


def test_the_published_config_is_the_size_1_3b():
    assert size_from_config(OFFICIAL, "config.json") == SIZES["wan_1_3b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "i2v", "in_dim": 36}, "model_type is 'i2v'"),
        ({"out_dim": 32}, "16 channels in and 32 out"),
        ({"num_layers": "30"}, "layers must be a whole number"),
        ({"dim": None}, "dim must be a whole number"),
        ({"num_heads": 0}, "heads must be a whole number"),
        ({"patch_size": [2, 2, 2]}, "patch_size is"),
        ({"num_layers": True}, "layers must be a whole number"),
        ({"eps": None}, "eps must be a number between 0 and 1"),
        ({"eps": True}, "eps must be a number between 0 and 1"),
        ({"cross_attn_norm": "yes"}, "cross_attn_norm must be true or false"),
        ({"qk_norm": False}, "qk_norm is False"),
        ({"window_size": [3, 3]}, r"window_size is \[3, 3\]"),
    ],
)
def test_the_config_of_another_network_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        size_from_config(OFFICIAL | change, "config.json")


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_network_without_the_norm_before_cross_attention_stays_one(layout):
    size = replace(SMALL, cross_norm=False)
    assert size_from_config(config_of(size, layout), "config.json") == size


def test_the_width_of_a_head_must_be_a_number():
    config = config_of(SMALL, "diffusers") | {"attention_head_dim": "12"}
    with pytest.raises(UserError, match="attention_head_dim must be a whole number"):
        size_from_config(config, "config.json")


def test_a_config_without_heads_or_sizes_is_refused():
    with pytest.raises(UserError, match="does not tell the number of heads"):
        size_from_config({"dim": 3}, "config.json")
    with pytest.raises(UserError, match="no complete geometry"):
        size_from_config({"num_heads": 12, "dim": 1536}, "config.json")


def test_the_size_of_a_bare_model_must_be_said(tmp_path):
    torch.save({"generator": in_layout(random_model(), SMALL, "causvid")}, tmp_path / "model.pt")
    found = wan_files.find(tmp_path / "model.pt")
    with pytest.raises(UserError, match="--config: one of wan_1_3b, wan_14b"):
        wan_files.size_of(found)
    with pytest.raises(UserError, match=r"did you mean 'wan_test'"):
        wan_files.size_of(found, "wan_tset")
    (tmp_path / "odd.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        wan_files.size_of(found, str(tmp_path / "odd.json"))
    with pytest.raises(UserError, match="does not fit a Wan transformer"):
        wan_files.checked(found, wan_files.size_of(found, "wan_1_3b"))
    assert wan_files.size_of(found, "wan_test") == SMALL


def test_tensors_of_something_else_are_in_no_known_layout(tmp_path):
    weights.write_tensors(tmp_path / "x.safetensors", {"lm_head.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="no known layout"):
        wan_files.find(tmp_path / "x.safetensors")
    (tmp_path / "p.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError):
        wan_files.find(tmp_path / "p.pt")
    with pytest.raises(UserError, match="holds no diffusion_pytorch_model"):
        wan_files.find(tmp_path)


def test_a_tensor_that_is_there_twice_is_told_and_not_chosen(tmp_path):
    """With a training wrapper's prefix and without: whichever were taken, the other would be lost silently."""
    model = {"model.head.head.bias": torch.ones(2), "model._fsdp_wrapped_module.head.head.bias": torch.zeros(2)}
    torch.save({"generator": model}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds tensors twice.*head.head.bias"):
        open_tensors(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "web page"),
        (b"\xef\xbb\xbf\r\n <!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "LFS pointer"),
    ],
)
def test_what_is_no_pickle_is_told_before_it_is_read_as_one(content, message, tmp_path):
    (tmp_path / "model.pt").write_bytes(content + b" " * 200)
    for read in (load_pickle, parts, open_tensors):
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path / "model.pt")
        assert str(error.value).count(str(tmp_path)) == str(error.value).count("fetch") == 1


def test_a_header_whose_length_looks_like_a_tag_is_no_web_page(tmp_path):
    """0x3c20 bytes: ' <' and six zeros."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x3C20)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert open_tensors(tmp_path / "a.safetensors").read("a").tolist() == [0.0]


def test_a_pickle_of_another_protocol_is_refused_without_a_warning_of_torch(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError):
            load_pickle(tmp_path / "model.pt")


def test_weights_that_a_folder_holds_twice_are_told(tmp_path):
    folder = sharded(tmp_path)
    weights.write_tensors(folder / "diffusion_pytorch_model.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="holds the same weights more than once"):
        wan_files.find(folder)


def test_no_weights_are_made_on_the_meta_device_and_text_may_be_short():
    with torch.device("meta"):
        model = SIZES["wan_14b"].build()
    assert all(p.is_meta for p in model.parameters()) and len(shapes_of(model)) == len(links(SIZES["wan_14b"], "ours"))
    assert wan.SIZES["wan_1_3b"].cut(2).layers == 2
    x, t, text = random_input()
    assert random_model()(x, t, Text(text.embeddings[:, :1])).velocity.shape == x.shape

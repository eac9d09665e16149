"""Wan's VAE and text encoder as components, against the classes of diffusers and transformers on the same weights."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from einops import rearrange
from videos import levels, video
from wan_files import CODEC, ENCODER, official_folder

from causvid import cli, cli_data, weights
from causvid.data import pack as packing
from causvid.data.clips import all_frames
from causvid.data.encode import from_file
from causvid.errors import UserError
from causvid.models import umt5, wan_vae
from causvid.models.codecs import Identity
from causvid.models.umt5 import Umt5
from causvid.models.wan_vae import CHANNELS, MEAN, STD, WanVae
from causvid.types import VaeState

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
PROMPTS = ["a red fox runs", "the snow", "", "a  red\nfox &amp;amp; snow . . . . . . . . ."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return official_folder(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def codec(folder):
    return WanVae(**CODEC, weights=folder)


@pytest.fixture(scope="module")
def encoder(folder):
    return Umt5(**ENCODER, weights=folder, dtype=torch.float32)


def test_the_table_of_embeddings_gets_memory_once(folder, monkeypatch):
    """It has two names in the network, and 2 GB in the released encoder."""
    filled = []
    fill = umt5.fill
    monkeypatch.setattr(umt5, "fill", lambda *given: filled.append(sum(p.numel() for p in fill(*given).parameters())))
    encoder = Umt5(**ENCODER, weights=folder)
    network = encoder._load()
    assert filled == [encoder.parameters] and network.encoder.embed_tokens is network.shared


def close(one, other, tolerance=1e-5):
    return (one - other).abs().max() <= tolerance * other.abs().max()


def their_latents(network, pixels):
    """diffusers' normalised latents ``b f c h w``."""
    mode = network.encode(rearrange(pixels, "b f c h w -> b c f h w")).latent_dist.mode()
    column = [torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD)]
    return rearrange((mode - column[0]) / column[1], "b c f h w -> b f c h w")


@pytest.mark.parametrize("frames", [1, 5, 13])
@torch.no_grad()
def test_encoding_and_decoding_are_those_of_diffusers(frames, codec):
    pixels = torch.rand(2, frames, 3, 24, 40) * 2 - 1
    latents = codec.encode(pixels)
    assert latents.shape == (2, codec.latent_frames(frames), CHANNELS, 3, 5)
    assert close(latents, their_latents(codec.network, pixels))
    raw = latents * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    theirs = codec.network.decode(rearrange(raw, "b f c h w -> b c f h w")).sample
    ours = codec.decode(latents)
    assert ours.shape == pixels.shape and close(ours, rearrange(theirs, "b c f h w -> b f c h w"))
    assert ours.abs().mean() > 0.01 and (ours.abs() < 1).float().mean() > 0.2  # neither nothing nor all clamped


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [3, 1], [1, 3], [2, 2]], ids=str)
def test_a_stream_is_the_whole_clip(cuts, codec):
    pixels = torch.rand(2, 13, 3, 16, 24) * 2 - 1
    latents = codec.encode(pixels)
    state, parts = VaeState(), []
    for block in latents.split(cuts, dim=1):
        streamed = codec.decode_block(block, state)
        parts.append(streamed.value)
        state = streamed.state
    assert [part.shape[1] for part in parts] == [4 * cut - (3 if i == 0 else 0) for i, cut in enumerate(cuts)]
    assert close(torch.cat(parts, 1), codec.decode(latents), 1e-4)
    state, parts = VaeState(), []
    for block in pixels.split([4 * cut - (3 if i == 0 else 0) for i, cut in enumerate(cuts)], dim=1):
        streamed = codec.encode_block(block, state)
        parts.append(streamed.value)
        state = streamed.state
    assert close(torch.cat(parts, 1), latents, 1e-4)


def test_a_stream_can_be_forked(codec):
    latents = torch.randn(1, 4, CHANNELS, 2, 2)
    first = codec.decode_block(latents[:, :2], VaeState())
    once = codec.decode_block(latents[:, 2:], first.state).value
    codec.decode_block(-latents[:, 2:], first.state)
    assert torch.equal(codec.decode_block(latents[:, 2:], first.state).value, once)


def test_later_frames_change_no_earlier_ones(codec):
    latents = torch.randn(1, 3, CHANNELS, 2, 2)
    other = torch.cat([latents[:, :2], torch.randn(1, 1, CHANNELS, 2, 2)], 1)
    assert torch.equal(codec.decode(latents)[:, :5], codec.decode(other)[:, :5])


@pytest.mark.parametrize("shape", [(1, 4, 3, 16, 16), (1, 0, 3, 16, 16), (1, 5, 3, 12, 16)], ids=str)
def test_clips_that_do_not_fit_are_refused(shape, codec):
    with pytest.raises(ValueError, match="1 \\+ 4k frames|multiples of 8"):
        codec.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="1 \\+ 4 n frames"):
        codec.latent_frames(4)


def official(module, folder, stem):
    return torch.load(folder / f"{stem}.pth", weights_only=True)


def test_the_official_vae_is_accepted_by_the_conversion_of_diffusers():
    """At the released width: the names and shapes of the official file, through diffusers' own conversion."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    vae = WanVae(base_dim=96)
    with torch.device("meta"):
        network = vae.empty()
    numbered = {name: torch.full((1,), float(i)) for i, name in enumerate(dict(network.named_parameters()))}
    official = {wan_vae.official_name(name): value for name, value in numbered.items()}
    assert len(official) == len(numbered) == 194
    converted = convert_wan_vae_to_diffusers(dict(official))
    assert converted.keys() == numbered.keys()
    assert all(converted[name] == value for name, value in numbered.items())


@torch.no_grad()
def test_embeddings_are_those_of_transformers_with_padding_and_a_mask(folder, encoder):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    network = encoder.empty().eval()
    named = torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    state = {link.ours: named[link.theirs[0]] for link in umt5.links(network)}
    network.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    tokens = encoder._tokenizer(
        [prompt_clean(prompt) for prompt in PROMPTS], padding="max_length", max_length=ENCODER["length"],
        truncation=True, return_tensors="pt",
    )  # fmt: skip
    theirs = network(tokens.input_ids, tokens.attention_mask).last_hidden_state
    theirs = theirs * tokens.attention_mask[..., None]
    ours = encoder.encode(PROMPTS).embeddings
    assert ours.shape == (4, 12, 32) and close(ours, theirs)
    lengths = (ours != 0).any(-1).sum(1).tolist()
    assert lengths == [5, 3, 1, 12]  # each with its end, the last one cut


def test_original_names_of_the_text_encoder_are_the_published_ones():
    with torch.device("meta"):
        network = Umt5().empty()
    found = {link.theirs[0]: link.shape for link in umt5.links(network)}
    assert len(found) == 24 * 10 + 2
    assert found["token_embedding.weight"] == (256384, 4096)
    assert found["blocks.23.pos_embedding.embedding.weight"] == (32, 64)
    assert found["blocks.0.ffn.gate.0.weight"] == (10240, 4096) and found["blocks.0.ffn.fc2.weight"] == (4096, 10240)
    assert {"norm.weight", "blocks.5.norm1.weight", "blocks.5.norm2.weight", "blocks.5.attn.o.weight"} <= found.keys()


@torch.no_grad()
def test_the_original_names_say_what_each_weight_does(encoder, folder):
    """Written out from the published layer: fc2 (gelu(gate.0 x) * fc1 x), and an attention of q, k, v and o."""
    theirs = torch.load(next(folder.glob("models_t5*.pth")), weights_only=True)
    block, x = encoder._load().encoder.block[1], torch.randn(3, encoder.dim)
    gate, up, down = (theirs[f"blocks.1.ffn.{name}.weight"].float() for name in ("gate.0", "fc1", "fc2"))
    wanted = (torch.nn.functional.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T
    assert not torch.equal(gate, up) and close(block.layer[1].DenseReluDense(x), wanted)
    attention = block.layer[0].SelfAttention
    for name in "qkvo":
        assert torch.equal(getattr(attention, name).weight, theirs[f"blocks.1.attn.{name}.weight"].float())
    bias = theirs["blocks.1.pos_embedding.embedding.weight"].float()
    assert torch.equal(attention.relative_attention_bias.weight, bias)
    for number in (0, 1):
        assert torch.equal(block.layer[number].layer_norm.weight, theirs[f"blocks.1.norm{number + 1}.weight"].float())


@pytest.mark.parametrize(
    "prompt", ["a  red\n\tfox ", "Tom &amp;amp; Jerry", "schÃ¶n", "  ", "“quoted” — ﬁne", "&lt;b&gt; x"]
)
def test_prompts_are_cleaned_as_diffusers_does(prompt):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert umt5.clean(prompt) == prompt_clean(prompt)


def test_stored_embeddings_need_no_encoder(folder, tmp_path, monkeypatch):
    first = Umt5(**ENCODER, weights=folder, store=tmp_path, dtype=torch.float32)
    once = first.encode(PROMPTS).embeddings
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(PROMPTS)
    monkeypatch.setattr(Umt5, "_load", lambda self: pytest.fail("the encoder was loaded"))
    second = Umt5(**ENCODER, weights=folder, store=tmp_path, dtype=torch.float32)
    assert torch.equal(second.encode([f"  {prompt} " for prompt in PROMPTS]).embeddings, once)


@pytest.mark.parametrize("damage", ["truncated", "empty", "of another shape", "of another name"])
def test_a_broken_stored_embedding_is_computed_again_and_told(damage, folder, tmp_path, capsys):
    encoder = Umt5(**ENCODER, weights=folder, store=tmp_path, dtype=torch.float32)
    once = encoder.encode(["a red fox"]).embeddings
    (path,) = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    if damage in ("truncated", "empty"):
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    else:
        weights.write_tensors(path, {"embedding" if "shape" in damage else "other": torch.zeros(3, 31)})
    assert torch.equal(encoder.encode(["a red fox"]).embeddings, once)
    assert f"stored embedding {path} is left out and computed again" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_a_tokenizer_with_more_words_than_the_encoder_is_one_error(folder, encoder, tmp_path):
    """The last words of its list, ',' and '.', have the numbers 12 and 13."""
    small = {**ENCODER, "vocabulary_size": 13}
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "umt5-xxl").symlink_to(folder / "google" / "umt5-xxl")
    state = {**torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)}
    state["token_embedding.weight"] = state["token_embedding.weight"][:13].clone()
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    cut = Umt5(**small, weights=tmp_path, dtype=torch.float32)
    known = cut.encode(["fox ,"]).embeddings
    assert torch.equal(known, encoder.encode(["fox ,"]).embeddings)
    with pytest.raises(
        UserError, match=r"tokenizer in .*umt5-xxl and the text encoder in .*enc-bf16.* token 13, .* 13 "
    ):
        cut.encode(["fox ."])


def test_another_encoder_does_not_use_the_store_of_the_first(folder, tmp_path):
    one = Umt5(**ENCODER, weights=folder, store=tmp_path / "store", dtype=torch.float32)
    one.encode(["a"])
    named = torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "umt5-xxl").symlink_to(folder / "google" / "umt5-xxl")
    torch.save(named | {"norm.weight": named["norm.weight"] * 2}, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    other = Umt5(**ENCODER, weights=tmp_path, store=tmp_path / "store", dtype=torch.float32)
    assert torch.allclose(other.encode(["a"]).embeddings, 2 * one.encode(["a"]).embeddings, atol=1e-6)
    assert len(list((tmp_path / "store").rglob("*.safetensors"))) == 2


def test_folders_of_diffusers_are_read_as_well(folder, codec, encoder, tmp_path):
    codec.network.save_pretrained(tmp_path / "vae")
    network = encoder._load()
    network.save_pretrained(tmp_path / "text_encoder")
    encoder._tokenizer.save_pretrained(tmp_path / "tokenizer")
    pixels = torch.rand(1, 5, 3, 16, 16)
    assert torch.equal(WanVae(**CODEC, weights=tmp_path).encode(pixels), codec.encode(pixels))
    again = Umt5(**ENCODER, weights=tmp_path, dtype=torch.float32)
    assert torch.equal(again.encode(PROMPTS).embeddings, encoder.encode(PROMPTS).embeddings)


def test_what_is_missing_is_told(folder, tmp_path):
    with pytest.raises(UserError, match="say where with --weights"):
        WanVae().decode(torch.zeros(1, 1, 16, 1, 1))
    with pytest.raises(UserError, match="say where with --weights"):
        Umt5().encode(["a"])
    with pytest.raises(UserError, match=r"holds no Wan2\.1_VAE"):
        WanVae(weights=tmp_path).encode(torch.zeros(1, 1, 3, 8, 8))
    with pytest.raises(UserError, match="holds no models_t5"):
        Umt5(**ENCODER, weights=tmp_path, store=tmp_path).encode(["a"])
    with pytest.raises(UserError, match="has no tokenizer"):
        Umt5(**ENCODER, weights=tmp_path).tokens("a")
    with pytest.raises(UserError, match="does not fit the VAE of Wan2"):
        WanVae(base_dim=16, weights=folder).encode(torch.zeros(1, 1, 3, 8, 8))
    with pytest.raises(UserError, match="does not fit UMT5 of width 64"):
        Umt5(**{**ENCODER, "dim": 64}, weights=folder).encode(["a"])
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match="web page"):
        WanVae(weights=tmp_path).encode(torch.zeros(1, 1, 3, 8, 8))
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer"):
        Umt5(**ENCODER, weights=tmp_path).tokens("a")


def test_the_store_holds_prompts_without_their_padding(folder, tmp_path):
    Umt5(**ENCODER, weights=folder, store=tmp_path, dtype=torch.bfloat16).encode(["the snow"])
    (path,) = tmp_path.rglob("*.safetensors")
    stored = weights.read_tensors(path)[0]["embedding"]
    assert stored.shape == (3, 32) and stored.dtype == torch.bfloat16


def encoded(capsys, source, target, weights):
    """(exit status, counts, stderr) of the command."""
    parts = [
        f"{{name: wan_vae, base_dim: {CODEC['base_dim']}}}",
        f"{{name: umt5, {str(ENCODER)[1:-1]}}}".replace("'", ""),
    ]
    status = 0
    try:
        cli.main(["data", "encode", str(source), str(target), "--codec", parts[0], "--text-encoder", parts[1], "--json",
                  *(["--weights", str(weights)] if weights else [])])  # fmt: skip
    except SystemExit as end:
        status = end.code or 0
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if out else {}, " ".join(err.split())


def test_latents_are_known_by_the_content_of_the_weights_and_not_by_their_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CAUSVID_CACHE", str(tmp_path / "cache"))
    folder = official_folder(tmp_path / "wan")
    (tmp_path / "clips").mkdir()
    for number in range(2):
        (tmp_path / "clips" / f"{number}.mp4").write_bytes(video(levels(5 + 4 * number, 16, 24)))
        (tmp_path / "clips" / f"{number}.txt").write_text("a red fox runs")
    assert encoded(capsys, tmp_path / "clips", tmp_path / "first", folder)[:2] == (
        0, {"given": 2, "done": 2, "skipped": 0, "quarantined": 0, "output": str(tmp_path / "first")}
    )  # fmt: skip
    row = from_file(next((tmp_path / "first" / "latents").glob("1*")).read_bytes())
    pixels = rearrange(torch.from_numpy(all_frames(str(tmp_path / "clips" / "1.mp4"))), "f h w c -> 1 f c h w")
    ours = torch.from_numpy(row.arrays["latents"]).float()
    assert close(ours, WanVae(**CODEC, weights=folder).encode(pixels.float() / 127.5 - 1)[0], 1e-3)

    folder.rename(tmp_path / "moved")
    assert encoded(capsys, tmp_path / "clips", tmp_path / "first", tmp_path / "moved")[1]["skipped"] == 2
    (tmp_path / "moved").rename(folder)
    other = dict(torch.load(folder / "Wan2.1_VAE.pth", weights_only=True))
    other["conv1.bias"] = other["conv1.bias"] + 1
    torch.save(other, tmp_path / "other.pth")
    (tmp_path / "other.pth").replace(folder / "Wan2.1_VAE.pth")
    status, _, err = encoded(capsys, tmp_path / "clips", tmp_path / "first", folder)
    assert status == 2 and "made with other options (codec)" in err
    assert encoded(capsys, tmp_path / "clips", tmp_path / "second", folder)[1]["done"] == 2
    packing.pack(str(tmp_path / "first"), str(tmp_path / "store"))
    with pytest.raises(UserError, match="rows of another kind: its codec differ"):
        packing.pack(str(tmp_path / "second"), str(tmp_path / "store"))
    (folder / "google" / "umt5-xxl" / "tokenizer_config.json").write_text("{}")
    status, _, err = encoded(capsys, tmp_path / "clips", tmp_path / "second", folder)
    assert status == 2 and "made with other options (text_encoder)" in err

    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "inspect", str(tmp_path / "store"), str(tmp_path), "--weights", str(folder)])
    assert "not the weights that the store was made with" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit, match="0"):  # without weights latent channels show
        cli.main(["data", "inspect", str(tmp_path / "store"), str(tmp_path)])


def test_weights_that_nothing_takes_or_that_are_missing_are_told_before_any_clip(tmp_path, capsys):
    (tmp_path / "0.mp4").write_bytes(video(levels(5, 16, 24)))
    status, _, err = encoded(capsys, tmp_path, tmp_path / "out", None)
    assert status == 2 and "codec 'wan_vae' needs weights: say with --weights" in err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "encode", str(tmp_path), str(tmp_path / "out"), "--weights", str(tmp_path)])
    assert "'identity' and 'words' take no weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_content_of_files_and_folders_that_options_name_is_part_of_what_a_codec_is(tmp_path):
    codec = {"name": "test_wan_codec_text:FromFolder", "folder": str(tmp_path)}
    found = []
    for content in ("a", "b", "a"):
        (tmp_path / "inner").mkdir(exist_ok=True)
        (tmp_path / "inner" / "weights").write_text(content)
        found.append(cli_data._encoders({"codec": codec}, [])[1])
    assert found[0] == found[2] != found[1]


class FromFolder(Identity):
    """A codec of a user's own, whose weights lie in a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder


def test_what_libraries_say_of_their_own_parts_does_not_reach_a_person():
    """The first import of diffusers' network and transformers' encoder, which a process does once."""
    program = (
        "from causvid.models.umt5 import Umt5\n"
        "from causvid.models.wan_vae import WanVae\n"
        "Umt5(dim=8, layers=1, heads=2, ffn_dim=8, vocabulary_size=16).empty()\n"
        "WanVae(base_dim=4).empty()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "Skipping import" not in done.stderr + done.stdout

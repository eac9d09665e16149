"""Wan's VAE and text encoder as components, against the classes of diffusers and transformers on the same weights."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from wan_files import CODEC, ENCODER, official_folder

from causvid import weights
from causvid.errors import UserError
from causvid.models import umt5, wan_vae
from causvid.models.umt5 import Umt5
from causvid.models.wan_vae import CHANNELS, MEAN, STD, VaeState, WanVae

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

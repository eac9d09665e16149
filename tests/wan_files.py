"""Small Wan networks with random weights, and files of every layout, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from causvid import weights
from causvid.models.dit import VideoDiT
from causvid.models.wan import SIZES, Size
from causvid.randomness import Draw
from causvid.types import Text

SMALL = SIZES["wan_test"]


def random_model(size: Size = SMALL, seed: int = 0, **options: object) -> VideoDiT:
    """A network whose every weight is random, norms and biases too, so that no two of them can be confused."""
    model = size.build(**options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(one + noise * (0.2 if parameter.ndim == 1 or "modulation" in name else 0.15))
    return model.eval()


def random_input(
    size: Size = SMALL, batch: int = 2, frames: int = 3, height: int = 6, width: int = 10, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Text]:
    """(latents, times, text) for a network of this size."""
    draw = Draw(seed, "input", 0, range(batch))
    x = draw.normal("x", frames, size.channels, height, width)
    t = draw.uniform("t", 1).expand(-1, frames)
    return x, t, Text(draw.normal("text", 7, size.text_dim))


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random numbers in every weight, near 1 for scales, of a size that keeps activations in bounds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = "gamma" in name or "norm" in name
            spread = 0.1 if scale or parameter.ndim == 1 else (parameter[0].numel()) ** -0.5
            parameter.copy_((1.0 if scale else 0.0) + spread * noise)
    return module.eval()


WORDS = ["a", "red", "fox", "runs", "in", "the", "snow", "blurred", "bad", ",", "."]
CODEC = {"base_dim": 8}
ENCODER = {"dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48, "vocabulary_size": 64, "length": 12}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of a few words that ends prompts as T5's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    fast.save_pretrained(folder)


def in_folder(folder: Path) -> Path:
    """Where :func:`official_folder` put it."""
    return folder / "Wan2.1-T2V-cut"


def official_folder(folder: Path, size: Size = SMALL, shard_bytes: int = 10**9) -> Path:
    """A folder in the layout of the released Wan2.1-T2V, with random weights at a cut size."""
    from causvid.models import umt5, wan_files, wan_vae

    weights.write_tensors(folder / "ours" / "weights.safetensors", dict(random_model(size).named_parameters()))
    out = in_folder(folder)
    wan_files.write(wan_files.find(folder / "ours"), size, "official", out, shard_bytes)
    vae = randomise(wan_vae.WanVae(**CODEC).empty(), 1)
    state = dict(vae.named_parameters())
    named = {name: part for link in wan_vae.links(vae) for name, part in link.split(state[link.ours].detach())}
    torch.save(named, out / "Wan2.1_VAE.pth")
    encoder = randomise(umt5.Umt5(**ENCODER).empty(), 2)
    state = dict(encoder.named_parameters())
    named = {name: part for link in umt5.links(encoder) for name, part in link.split(state[link.ours].detach())}
    torch.save(named, out / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(out / "google" / "umt5-xxl")
    return out

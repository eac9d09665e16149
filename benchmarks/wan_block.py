"""Wan2.1-1.3B at full width and depth on this CPU: load a synthetic checkpoint, and run one block of three frames.

    python benchmarks/wan_block.py [--layers 30] [--height 30] [--width 52] [--folder /tmp/wan]

The checkpoint is random, in the official layout and bf16 (2.8 GB); latents of 30 x 52 are 15 x 26 tokens a frame.
Prints one JSON line: seconds, peak memory against that of the weights, and the share of the speed of a large product.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch

from causvid.attention.masks import BlockCausal
from causvid.models import wan_files
from causvid.models.wan import SIZES, Size, config_of, links
from causvid.tensor_files import write_shards
from causvid.types import Text
from causvid.weights import write_json


def write_checkpoint(folder: Path, size: Size) -> None:
    """A random checkpoint in the official layout, one tensor in memory at a time but for the open shard."""

    def tensors():
        for link in links(size, "official"):
            for name in link.theirs:
                yield name, (torch.randn(link.shape) * 0.02).to(torch.bfloat16)

    write_shards(folder, "diffusion_pytorch_model", tensors(), 500_000_000)
    write_json(folder / "config.json", config_of(size, "official"))


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def product_flops(dtype: torch.dtype) -> float:
    """Operations per second of a product of this network's widest shapes."""
    a, b = torch.randn(1170, 1536).to(dtype), torch.randn(1536, 8960).to(dtype)
    a @ b
    start = time.perf_counter()
    for _ in range(3):
        a @ b
    return 3 * 2 * 1170 * 1536 * 8960 / (time.perf_counter() - start)


def block_flops(size: Size, tokens: int, text: int) -> int:
    """Multiply-adds, counted twice, of one pass over a block with no past: projections, attention and feed-forward."""
    d = size.dim
    layer = 2 * tokens * d * (4 * d + 2 * d + 2 * size.ffn_dim) + 2 * text * d * 2 * d
    attention = 4 * tokens * tokens * d + 4 * tokens * text * d
    return size.layers * (layer + attention)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 30), ("height", 30), ("width", 52)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/wan"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    size, dtype = SIZES["wan_1_3b"].cut(options.layers), getattr(torch, options.dtype)
    if not options.folder.exists():
        write_checkpoint(options.folder, size)
    before = peak_gigabytes()
    start = time.perf_counter()
    found = wan_files.find(options.folder)
    with torch.device("meta"):
        model = size.build(mask=BlockCausal(block_frames=3))
    wan_files.load(model, size, found, dtype, "cpu")
    loading = time.perf_counter() - start
    held = sum(p.nbytes for p in model.parameters()) / 1e9
    loaded = peak_gigabytes()
    x = torch.randn(1, 3, size.channels, options.height, options.width, dtype=dtype)
    text = Text(torch.randn(1, 512, size.text_dim, dtype=dtype))
    start = time.perf_counter()
    out = model(x, torch.ones(1, 3), text, cache=model.new_cache(), commit=True)
    seconds = time.perf_counter() - start
    tokens = 3 * (options.height // 2) * (options.width // 2)
    speed = block_flops(size, tokens, 512) / seconds
    numbers = {
        "layers": size.layers, "dtype": options.dtype, "threads": torch.get_num_threads(), "tokens": tokens,
        "finite": bool(torch.isfinite(out.velocity).all()), "load_seconds": loading, "block_seconds": seconds,
        "weights_gigabytes": held, "peak_before_gigabytes": before, "peak_loaded_gigabytes": loaded,
        "peak_gigabytes": peak_gigabytes(), "gigaflops": speed / 1e9,
        "share_of_product": speed / product_flops(dtype), "cache_bytes": out.cache.bytes,
    }  # fmt: skip
    print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in numbers.items()}))


if __name__ == "__main__":
    main()

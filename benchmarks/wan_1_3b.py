"""Wan2.1-T2V-1.3B at full width and depth on this machine: load it, and run one block of three latent frames.

    python benchmarks/wan_1_3b.py [--repeats 1] [--layers 30] [--json]

A checkpoint of the official layout with random weights (5.7 GB) is written to a temporary folder. A process of its own
then builds the network on the meta device, loads the weights, and denoises one block at 30 x 52 latents (1,170 tokens)
at the start of a stream, and commits it. Told are the peak of resident memory while loading as a multiple of the
weights, the same while running, and the time of a forward pass, of which the share of the GEMM peak is made: matrix
products of the network's own feed-forward layer are timed in turns with the passes, in process time on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from causvid import tensor_files, weights
from causvid.attention.masks import BlockCausal
from causvid.models import wan_files
from causvid.models.wan import SIZES, Size, config_of, links
from causvid.types import Text

FRAMES, HEIGHT, WIDTH, TEXT = 3, 30, 52, 512


def write(folder: Path, size: Size) -> None:
    """Random weights in the official layout, tensor by tensor."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for link in links(size, "official"):
            for name in link.theirs:
                yield name, torch.randn(link.shape, generator=generator) * 0.02

    tensor_files.write_shards(folder, wan_files.OFFICIAL_STEM, tensors(), shard_bytes=1_000_000_000)
    weights.write_json(folder / "config.json", config_of(size, "official"))


def peak() -> int:
    """Peak of this process's resident memory so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(process seconds, seconds on the clock)."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


@torch.no_grad()
def measure(folder: Path, size: Size, repeats: int) -> dict[str, float]:
    """Everything, in this process, which has loaded nothing before."""
    torch.set_num_threads(1)
    before = peak()
    found = wan_files.find(folder)
    with torch.device("meta"):
        model = size.build(mask=BlockCausal(FRAMES))
    loading = timed(lambda: wan_files.load(model, size, found, torch.float32, "cpu"))
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    loaded = peak() - before
    x = torch.randn(1, FRAMES, size.channels, HEIGHT, WIDTH)
    text, t = Text(torch.randn(1, TEXT, size.text_dim)), torch.ones(1, FRAMES)
    counter = FlopCounterMode(display=False)
    tokens = FRAMES * (HEIGHT // 2) * (WIDTH // 2)
    a, b = torch.randn(tokens, size.dim), torch.randn(size.dim, size.ffn_dim)
    passes, products = [], []
    for _ in range(repeats):
        products += [timed(lambda: a @ b)[0] for _ in range(4)]
        with counter:  # its own work is nothing beside a pass of minutes
            passes.append(timed(lambda: model(x, t, text, cache=model.new_cache(), commit=True)))
        products += [timed(lambda: a @ b)[0] for _ in range(4)]
    # The counter knows matrix products, and not the CPU's attention kernel.
    flops = counter.get_total_flops() + 4 * size.layers * size.dim * tokens * (tokens + TEXT)
    gemm = 2 * tokens * size.dim * size.ffn_dim / min(products)
    own_rate = flops / statistics.median(cpu for cpu, _ in passes)
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "weights_gb": own / 1e9,
        "load_seconds": loading[1], "load_peak_over_weights": loaded / own, "peak_gb": peak() / 1e9,
        "forward_tflop": flops / 1e12, "forward_cpu_seconds": statistics.median(cpu for cpu, _ in passes),
        "forward_wall_seconds": statistics.median(wall for _, wall in passes),
        "gemm_gflops": gemm / 1e9, "share_of_gemm_peak": own_rate / gemm,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES["wan_1_3b"].cut(options.layers)
    if options.folder:
        print(json.dumps(measure(options.folder, size, options.repeats)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "wan", size)
        command = [sys.executable, __file__, "--folder", str(Path(scratch) / "wan"), "--layers", str(options.layers)]
        command += ["--repeats", str(options.repeats)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    results = json.loads(out)
    if options.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:<24} {value:,.3f}")


if __name__ == "__main__":
    main()

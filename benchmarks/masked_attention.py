"""How much of the masked work do block slices save? Blockwise against dense-masked SDPA, in turns in one process.

    python benchmarks/masked_attention.py [--json]

Prints the ratio dense / blockwise, forward and forward with backward, medians over repeats with their spread, for a
block-causal mask of 7 blocks of 3 frames. With B blocks the dense kernel does 2B / (B + 1) times the work: 1.75 here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from causvid.attention.kernels import Blockwise, Grid, Kernel, Sdpa
from causvid.attention.masks import BlockCausal, Pattern
from causvid.attention.positions import Absolute


def seconds(kernel: Kernel, pattern: Pattern, grid: Grid, qkv: list[Tensor], backward: bool) -> float:
    attend = kernel.plan(pattern, Absolute(), grid)
    begin = time.perf_counter()
    out = attend(*qkv)
    if backward:
        out.sum().backward()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pattern = Pattern(BlockCausal(3), 21)
    grid = Grid(8, 8, 64, 10000.0, torch.float32, torch.device("cpu"))
    shape = (1, 4, 21 * grid.tokens_per_frame, 64)
    results: dict[str, dict[str, float]] = {}
    for name, backward in (("forward", False), ("forward_backward", True)):
        qkv = [torch.randn(shape, requires_grad=backward) for _ in range(3)]
        run: Callable[[Kernel], float] = lambda kernel, b=backward, x=qkv: seconds(kernel, pattern, grid, x, b)  # noqa: E731
        run(Sdpa()), run(Blockwise())
        ratios = sorted(run(Sdpa()) / run(Blockwise()) for _ in range(options.repeats))
        results[name] = {
            "ratio": statistics.median(ratios), "low": ratios[len(ratios) // 4], "high": ratios[-1 - len(ratios) // 4]
        }  # fmt: skip
    if options.json:
        print(json.dumps(results))
    else:
        for name, row in results.items():
            print(
                f"{name:<18} dense / blockwise {row['ratio']:.2f}  (middle half {row['low']:.2f} to {row['high']:.2f})"
            )


if __name__ == "__main__":
    main()

"""Wan2.1-T2V-1.3B at its full size on one GPU, with random weights: attention kernels, a stream, and training.

    python benchmarks/gpu.py kernels stream teacher train --folder /tmp/wan --out gpu.json

Files of the official layout are written to ``--folder`` first (19 GB: transformer, VAE, text encoder, tokenizer), and
everything is loaded from them. ``kernels`` times self-attention over 21 latents of 480 x 832 under the block-causal
mask, in turns, checked against each other. ``stream`` loads as ``causvid generate --spec wan/causal`` does and streams.
``teacher`` makes a clip in 50 steps with guidance. ``train`` runs the stages of wan/causal_dmd with one clip a batch.
Beside each stand the memory and the operations that ``causvid plan`` foretells.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import wan_1_3b
from torch import Tensor

from causvid import costs, experiment, runs, sampling_costs, training
from causvid import spec as specs
from causvid.attention.kernels import Blockwise, Flex, Grid, Kernel, Sdpa
from causvid.attention.masks import BlockCausal, Pattern
from causvid.attention.positions import Absolute
from causvid.models import umt5, wan_vae
from causvid.models.wan import SIZES
from causvid.streaming.session import Session
from causvid.wan_generation import Request, Studio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
SIZE = SIZES["wan_1_3b"]
FRAMES, HEIGHT, WIDTH = 21, 30, 52  # of tokens: 81 frames of 480 x 832
PROMPT = "a red fox in the snow"
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def waited() -> float:
    """The clock, once the device has done all that it was given."""
    torch.accelerator.synchronize()
    return time.perf_counter()


@contextmanager
def measured(into: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds, and the peak of memory that tensors took, in GB."""
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    begin = waited()
    yield
    into[f"{name}_s"] = round(waited() - begin, 3)
    into[f"{name}_peak_gb"] = round(torch.accelerator.max_memory_allocated() / 1e9, 2)


def write_folder(folder: Path) -> None:
    """Transformer, VAE, text encoder and tokenizer in the official layout, with random weights."""
    from wan_files import write_tokenizer  # type: ignore[import-not-found]

    wan_1_3b.write(folder, SIZE)
    vae = wan_vae.WanVae().empty()
    state = dict(vae.named_parameters())
    named = {name: part for link in wan_vae.links(vae) for name, part in link.split(state[link.ours].detach())}
    torch.save(named, folder / "Wan2.1_VAE.pth")
    with torch.device("meta"):
        encoder = umt5.Umt5().empty()
    random = {
        name: (torch.randn(link.shape, device=DEVICE) * 0.02).bfloat16().cpu()
        for link in umt5.links(encoder)
        for name in link.theirs
    }
    torch.save(random, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")


def kernels(repeats: int = 5) -> dict[str, Any]:
    """Milliseconds, TFLOP/s over the pairs that see each other, and how far apart the kernels' results are."""
    out: dict[str, Any] = {}
    grid = Grid(HEIGHT, WIDTH, SIZE.dim // SIZE.heads, 10000.0, torch.bfloat16, DEVICE)
    for name, pattern in {
        "block_causal": Pattern(BlockCausal(3), FRAMES),
        "block_causal, clean context": Pattern(BlockCausal(3), FRAMES, teacher_forcing=True),
    }.items():
        shape = (1, SIZE.heads, pattern.slots * grid.tokens_per_frame, grid.head_dim)
        qkv = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        upstream = torch.randn_like(qkv[0])
        flops = 4 * SIZE.dim * int(pattern.matrix().sum()) * grid.tokens_per_frame**2
        forward: dict[str, list[float]] = {}
        backward: dict[str, list[float]] = {}
        results: dict[str, list[Tensor]] = {}
        candidates: tuple[Kernel, ...] = (Blockwise(), Flex(), Sdpa())
        for turn in range(repeats + 1):
            for kernel in candidates:
                attend = kernel.plan(pattern, Absolute(), grid)
                begin = waited()
                made = attend(*qkv)
                half = waited()
                found = torch.autograd.grad(made, qkv, upstream)
                end = waited()
                key = type(kernel).__name__.lower()
                results[key] = [made.detach(), *found]
                if turn:  # the first compiles and warms up
                    forward.setdefault(key, []).append(half - begin)
                    backward.setdefault(key, []).append(end - half)
        wanted = results["sdpa"]
        out[name] = {
            key: {
                "forward_ms": round(statistics.median(forward[key]) * 1e3, 2),
                "backward_ms": round(statistics.median(backward[key]) * 1e3, 2),
                "forward_tflops": round(flops / statistics.median(forward[key]) / 1e12, 1),
                "apart": [round(float((a.double() - b.double()).norm() / b.double().norm()), 5)
                          for a, b in zip(results[key], wanted, strict=True)],
            } for key in results
        }  # fmt: skip
    return out


def foretold(name: str, changes: list[str], stages: list[str]) -> dict[str, Any]:
    """What ``causvid plan`` says of memory and operations, by stage."""
    arm = specs.load(name, changes)
    found = [*costs.of(arm, stages, 1), *sampling_costs.of(arm, stages)]
    return {each.stage: {"peak_gb": round(each.peak / 1e9, 2), "pflop": round(each.flops / 1e15, 3)} for each in found}


def studio(name: str, folder: Path, changes: tuple[str, ...] = ()) -> Studio:
    model = None if "teacher" in name else folder  # random weights are anybody's
    return Studio(
        Request(name, folder, (PROMPT,), folder / "out.mp4", changes, model, store=folder / "text", device="auto")
    )


def stream(folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {"foretold": foretold("wan/causal", [], [])}
    made = studio("wan/causal", folder)
    with measured(out, "text"):
        made.world.text_encoder.encode([PROMPT])
    made.world.text_encoder.release()
    with measured(out, "load"):
        engine = made.engine
    blocks = len(engine.mask.blocks(engine.frames))
    for turn in ("first", "second"):  # the first warms up
        with measured(out, turn):
            session = Session(engine, PROMPT)
            shown = [session.step().frames for _ in range(blocks)]
        out[turn] = session.ledger.summary()
        out[f"{turn}_blocks_s"] = [round(row.total, 3) for row in session.ledger.rows]
    video = torch.cat(shown, 1)
    out["frames"], out["finite_and_moving"] = video.shape[1], bool(video.float().std() > 1)
    del session, shown, video, engine, made
    windowed = studio("wan/causal_window", folder).engine
    with measured(out, "window"):
        session = Session(windowed, PROMPT)
        for _ in range(25):
            session.step()
    rows = list(session.ledger.rows)
    parts = {part: round(statistics.median(getattr(row, part) for row in rows[10:]), 4)
             for part in ("text", "transformer", "cache", "codec", "total")}  # fmt: skip
    fps, frames = round(rows[-1].frames / parts["total"], 2), sum(row.frames for row in rows)
    out["window"] = {"block": parts, "fps": fps, "frames": frames, "cache_gb": session.moment.cache.bytes / 1e9}
    return out


def teacher(folder: Path) -> dict[str, Any]:
    out: dict[str, Any] = {"foretold": foretold("wan/teacher_euler", [], [])}
    made = studio("wan/teacher_euler", folder)
    texts = made.world.text_encoder.encode([PROMPT, "bad"]).to(DEVICE)
    made.world.text_encoder.release()
    made.model(torch.zeros(1, *made.world.latent_shape, device=DEVICE), torch.ones(1, FRAMES, device=DEVICE), texts[:1])
    with measured(out, "clip"):
        made.video(texts[:1], texts[1:], 0, lambda done: None)
    return out


def train(folder: Path) -> dict[str, Any]:
    """Every stage in turn; of those that update, the seconds of an update after the first."""
    from wan_training import write_store  # type: ignore[import-not-found]

    write_store(folder / "store", (FRAMES, 16, 2 * HEIGHT, 2 * WIDTH), SIZE.text_dim, 512, [60] * 4)
    base = [
        f"world.dataset.path={folder / 'store'}", f"runtime.weights={folder}", "runtime.checkpoint_seconds=1e9",
        "student.steps=3", "ode_pairs={count: 2, steps: 3, keep: [3], batch: 1}",
        "ode_init.batch=1", "ode_init.iterations=5", "distill.batch=1", "distill.iterations=3",
    ]  # fmt: skip
    out: dict[str, Any] = {}
    ends: list[float] = []
    after = training.Session.after

    def stamped(self: training.Session, *arguments: Any, **numbers: float) -> None:
        after(self, *arguments, **numbers)
        ends.append(waited())

    training.Session.after = stamped  # type: ignore[method-assign]
    variants = {
        "ode_pairs": [], "ode_init": [], "distill": [], "ode_init, flex": ["causal.kernel=flex"],
        "distill, self_rollout": ["student.input=self_rollout"],
    }  # fmt: skip
    for name, more in variants.items():
        stage = name.split(",")[0]
        arm = specs.load("wan/causal_dmd", [*base, *more, f"until={stage}"])
        row: dict[str, Any] = {"foretold": foretold("wan/causal_dmd", [*base, *more], [stage])[stage]}
        store, plan = runs.Store(folder / "runs"), experiment.plan(arm, stage)
        store.execute(plan[:-1], arm, lambda text: None)
        ends.clear()
        try:
            with measured(row, "stage"):
                store.execute(plan, arm, lambda text: None)
        except torch.OutOfMemoryError as error:
            row["out_of_memory"] = str(error)[:200]
        if len(ends) > 1:
            row["update_s"] = round(statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False)), 3)
        out[name] = row
        print(name, json.dumps(row), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["kernels", "stream", "teacher", "train"])
    parser.add_argument("--folder", type=Path, required=True, help="where the files are written; 25 GB are needed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if DEVICE.type == "cpu":
        sys.exit("no accelerator here")
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": kernels, "stream": lambda: stream(options.folder), "teacher": lambda: teacher(options.folder),
        "train": lambda: train(options.folder),
    }  # fmt: skip
    if options.alone:
        options.alone.write_text(json.dumps(jobs[options.parts[0]]()))
        return
    if set(options.parts) - {"kernels"}:
        write_folder(options.folder)
    found: dict[str, Any] = {"torch": torch.__version__, "device": torch.get_device_module(DEVICE).get_device_name()}
    options.folder.mkdir(parents=True, exist_ok=True)
    for part in options.parts:  # each in a process of its own, so that none finds what another left in memory
        told = options.folder / f"{part}.json"
        command = [sys.executable, __file__, part, "--folder", str(options.folder), "--alone", str(told)]
        subprocess.run(command, check=True)
        found[part] = json.loads(told.read_text())
        print(part, json.dumps(found[part]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

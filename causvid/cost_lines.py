"""Costs in words: those of each stage, whether they fit into a GPU's memory, and what would make them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from causvid import build, costs, ranks, sampling_costs
from causvid.costs import RATE, SECTIONS, Cost, Setting
from causvid.errors import UserError
from causvid.spec import Spec

# What no stage of a run does, and one GPU does alone; and how its line begins.
ALONE = {"generate": "one clip: ", "encode": "one clip: ", "text": "one prompt, before any network is loaded: "}


def memory_of(text: str) -> float:
    """Bytes of ``24GB``, ``80 GiB`` or a number of bytes.

    Raises:
        UserError: it is none.
    """
    units = {"": 1.0, "MB": 1e6, "GB": 1e9, "MIB": 2.0**20, "GIB": 2.0**30}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in units:
        raise UserError(f"runtime.memory: '{text}' is no size; write it as 24GB or 80GiB")
    return float(found[1]) * units[found[2].upper()]


def misfits(spec: Spec, found: list[Cost]) -> dict[str, list[str]]:
    """Stages that do not fit into ``runtime.memory``, and what would make each fit; empty where nothing limits it."""
    if not spec["runtime.memory"]:
        return {}
    limit = memory_of(spec["runtime.memory"])
    return {cost.stage: remedies(spec, cost.stage, planned(spec), limit) for cost in found if cost.peak > limit}


def lines(spec: Spec, found: list[Cost], unfit: dict[str, list[str]] | None = None) -> list[str]:
    """The costs for a person, whether they fit into ``runtime.memory``, and what would make them.

    Args:
        unfit: from :func:`misfits`; default computed here.
    """
    gpus = planned(spec)
    unfit = misfits(spec, found) if unfit is None else unfit
    chosen = "" if spec["runtime.gpus"] else " (as many as processes run here; runtime.gpus=N plans for N)"
    training = any(cost.stage not in ALONE for cost in found)
    where = f"on {gpus} GPU(s){chosen}" if training else "on one GPU"
    rates = ", ".join(f"{rate / 1e12:g} in {name}" for name, rate in RATE.items())
    out = [f"{where}, estimated, at so many TFLOP/s each: {rates}"] if found else []
    for cost in found:
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in cost.memory.items() if size)
        clip = ALONE.get(cost.stage, "")
        size = f"{cost.parameters / 1e9:.3g} G parameters, " if cost.parameters else ""
        out.append(
            f"{cost.stage:<10} {clip}{size}{cost.flops / 1e15:.4g} PFLOP, "
            f"{_time(cost.gpu_hours)}, {cost.peak / 1e9:.3g} GB per GPU ({parts})"
        )
        if cost.stage in unfit:
            ways = unfit[cost.stage]
            advice = f"it would with {' | or '.join(ways)}" if ways else "no option here makes it fit"
            if cost.stage in SECTIONS and any(".batch=" in way for way in ways):
                advice += "; another batch is another recipe, and gradients can't be accumulated over several batches"
            if cost.stage == "text":
                advice = f"encode on the CPU first ({ways[0]})"
            out.append(f"{cost.stage:<10} does not fit into {spec['runtime.memory']}; {advice}")
        if cost.not_counted:
            out.append(f"{cost.stage:<10} not counted here: {', '.join(cost.not_counted)}")
    if found:
        out.append("not counted: latents and text of a batch, workspaces of kernels, fragmentation (docs/wan.md)")
    return out


def planned(spec: Spec) -> int:
    """How many GPUs are planned for: ``runtime.gpus``, or where nobody says it as many as processes run here."""
    return spec["runtime.gpus"] or ranks.count()


def _time(gpu_hours: float) -> str:
    return f"{gpu_hours:.3g} GPU-hours" if gpu_hours >= 0.1 else f"{gpu_hours * 3600:.3g} GPU-seconds"


def remedies(spec: Spec, stage: str, gpus: int, limit: float) -> list[str]:
    """Changes by which a stage that does not fit would; each is enough, and none is listed that was not computed."""
    if stage in ALONE:
        return sampling_costs.remedies(spec, stage, limit)
    world = build.World(spec)
    if stage == "ode_pairs":
        return ["ode_pairs.batch=1"] if costs.pairs(spec, world, 1).peak <= limit else []
    trained, frozen = costs.players(spec, world, stage)
    out = []
    for words, setting in _changes(SECTIONS[stage], costs.training(spec, stage, gpus)):
        if sum(costs.train_memory(trained, frozen, setting).values()) <= limit:
            out.append(words)
            if "gpus" in words:  # more of them fit as well
                break
    return out


def _changes(section: str, now: Setting) -> Iterator[tuple[str, Setting]]:
    lean = now
    if not now.checkpointing:
        lean = replace(lean, checkpointing=True)
        yield f"{section}.activation_checkpointing=true", lean
    if now.clips > 1:
        lean = replace(lean, batch=now.gpus)
        yield f"{section}.batch={now.gpus}" + ("" if now.checkpointing else " with activation checkpointing"), lean
    if now.ema:
        yield f"{section}.ema=0 with these", replace(lean, ema=False)
    for doubled in range(1, 11):
        count = now.gpus * 2**doubled
        batch = max(lean.batch, count)
        words = f"runtime.gpus={count}" + (f" {section}.batch={batch}" if batch != now.batch else "")
        extra = "" if now.checkpointing else f" {section}.activation_checkpointing=true"
        yield words + extra, replace(lean, gpus=count, batch=batch)

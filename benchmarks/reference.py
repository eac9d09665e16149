"""Make experiments/reference/: the recorded outcomes of the shipped specs, over training seeds.

    python benchmarks/reference.py run --runs runs --shard 0/2      # and 1/2 in a second process
    python benchmarks/reference.py write --runs runs
    python benchmarks/reference.py fresh --runs runs

``run`` executes what is not done, one thread a process; arms share stages through the store, and a killed run goes on.
``write`` takes only what is finished and says what is missing; of the first seed it also keeps the curves of each
training stage, averaged over fiftieths, so that a user sees what a healthy one looks like. ``fresh`` judges the default
arms and the teacher on as many pairs of caption and noise again, on none of which any setting was chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from ship_teacher import curves

from causvid import build, experiment, runs, spec, weights
from causvid.eval.shapes_truth import ShapesTruth
from causvid.eval.statistics import over_seeds
from causvid.randomness import Draw
from causvid.spec import Spec
from causvid.stages.sample import SPLIT, from_bytes, held_out, load_student
from causvid.types import Text

Clips = Callable[[Text, Text, Draw], torch.Tensor]
SEEDS = (0, 1, 2)
KEPT = ("student.", "rollout_first.", "rollout_last.", "teacher.", "real.", "timings.")  # of every seed
ONCE = (0,)  # arms that are reported, but from which no claim is drawn
SHOWN = ("ok", "shape", "direction", "fidelity", "contrast", "trajectory", "ok_first_tenth", "ok_last_tenth")
ROLLOUTS = "student.input={name: self_rollout, given_blocks: 3}"
WINDOW = "student.cache=trained"  # streams without a sink; the training is the same
MAIN = {
    "causvid": ("tiny/causvid", [], SEEDS),
    "self_rollout": ("tiny/self_rollout", [], SEEDS),
    "causvid, window alone": ("tiny/causvid", [WINDOW], SEEDS),
    "self_rollout, window alone": ("tiny/self_rollout", [WINDOW], SEEDS),
    "causvid, noisy context": ("tiny/causvid", ["student.input.context=noisy"], ONCE),
    "causvid, 2 steps": ("tiny/causvid", ["student.steps=2"], ONCE),
    "causvid, 1 step": ("tiny/causvid", ["student.steps=1"], ONCE),
    "interactive": ("tiny/interactive", [], SEEDS[:2]),
    "self_rollout, rollouts alone": ("tiny/self_rollout", [ROLLOUTS], ONCE),
    "self_rollout, 2 steps": ("tiny/self_rollout", ["student.steps=2"], ONCE),
    "self_rollout, 1 step": ("tiny/self_rollout", ["student.steps=1"], ONCE),
}
FRESH = ("causvid", "self_rollout")
TABLE = "ablations/teacher_x_init"


def arms(which: str) -> list[tuple[str, int, Spec]]:
    """(arm, seed, spec) of everything to run, first seeds first, so that a part is useful.

    ``main``: the default arms and those beside them; ``table``: the grid.
    """
    if which == "table":
        return [
            (", ".join(arm[key]["name"] for key in ("teacher", "init", "student.input")), arm["seed"], arm)
            for _, arm in experiment.arms_of(TABLE, ["runtime.threads=1"])
        ]
    return [
        (name, seed, spec.load(base, [*changes, f"seed={seed}", "runtime.threads=1", *monitor(seed)]))
        for seed in SEEDS
        for name, (base, changes, seeds) in MAIN.items()
        if seed in seeds
    ]


def monitor(seed: int) -> list[str]:
    """Of the first seed the curves are kept, those of the metrics included."""
    return ["runtime.monitor=held_out"] if seed == SEEDS[0] else []


def run(which: str, root: Path, shard: int, shards: int) -> None:
    torch.set_num_threads(1)
    store = runs.Store(root.resolve())
    for number, (name, seed, arm) in enumerate(arms(which)):
        if number % shards == shard:
            print(f"{name}, seed {seed}", file=sys.stderr)
            store.execute(experiment.plan(arm, "evaluate"), arm, lambda text: print(text, file=sys.stderr))


def write(which: str, root: Path, out: Path) -> None:
    store = runs.Store(root.resolve())
    found: dict[str, dict[int, dict[str, float]]] = {}
    missing: list[str] = []
    healthy: dict[str, dict[str, dict]] = {}
    trained: set[Path] = set()
    for name, seed, arm in arms(which):
        *before, node = experiment.plan(arm, "evaluate")
        if store.done(node):
            logged = {each.name: store.folder(each) / "curves.jsonl" for each in before}
            if seed == SEEDS[0] and logged["distill"] not in trained:  # arms that share their training have one entry
                trained.add(logged["distill"])
                healthy[name] = {stage: curves(path, 50) for stage, path in logged.items() if path.is_file()}
            sampled = next(each for each in before if each.name == "sample")
            timings = json.loads((store.folder(sampled) / "timings.json").read_text())
            metrics = json.loads((store.folder(node) / "metrics.json").read_text())
            found.setdefault(name, {})[seed] = metrics | {f"timings.{key}": value for key, value in timings.items()}
        else:
            missing.append(f"{name}, seed {seed}")
    (out / f"{which}_curves.json").write_text(json.dumps(healthy, sort_keys=True) + "\n")
    rows = {name: summary(by_seed) for name, by_seed in found.items()}
    (out / f"{which}.json").write_text(json.dumps({"missing": missing, "arms": rows}, indent=1, sort_keys=True) + "\n")
    header = ["arm", "seeds", *SHOWN, "share of teacher's ok"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, row in rows.items():
        cells = [_cell(row["student"].get(key)) for key in SHOWN]
        lines.append("| " + " | ".join([name, str(row["seeds"]), *cells, _cell(row["share"])]) + " |")
    (out / f"{which}.md").write_text("\n".join(lines) + "\n" + "".join(f"\nnot run: {name}\n" for name in missing))
    print(out / f"{which}.md")


def fresh(root: Path, out: Path) -> None:
    store, base = runs.Store(root.resolve()), spec.load("tiny/causvid")
    world = build.World(base)
    found = {"teacher": {"0": judge(world, many_steps(base, world))}}
    for name, seed, arm in arms("main"):
        distill = next(node for node in experiment.plan(arm, "evaluate") if node.name == "distill")
        if name in FRESH and store.done(distill):
            found.setdefault(name, {})[str(seed)] = judge(world, few_steps(arm, world, store.folder(distill)))
    weights.write_json(out / "fresh.json", found)
    print(out / "fresh.json")


def many_steps(arm: Spec, world: build.World) -> Clips:
    net = build.load_network(arm, world, build.teacher_rule(arm), build.shipped_teacher(arm))
    sampler = build.teacher_sampler(arm)
    return lambda text, free, draw: sampler(net, draw.normal("noise", *world.latent_shape), text, free).last


def few_steps(arm: Spec, world: build.World, folder: Path) -> Clips:
    student = load_student(arm, world, folder)
    return lambda text, free, draw: student(world.latent_shape, text, draw)


def judge(world: build.World, clips: Clips) -> dict[str, float]:
    """Means over the 256 held-out pairs of caption and noise that follow those of the experiments."""
    parts = [range(start, start + 64) for start in range(256, 512, 64)]
    videos = torch.cat([held_out(world, part, clips) for part in parts])
    scores = ShapesTruth()(from_bytes(videos), [prompt for part in parts for prompt in world.prompts(part, SPLIT)[0]])
    return {name: round(float(scores[name].float().nanmean()), 4) for name in SHOWN[:6]}


def summary(by_seed: dict[int, dict[str, float]]) -> dict:
    """Means over seeds with 95% t-intervals, of the student and of what it is compared with."""

    def over(key: str) -> list[float | None] | None:
        values = [metrics[key] for metrics in by_seed.values() if key in metrics]
        return _interval(values) if values else None

    named = {key.partition(".")[0] for metrics in by_seed.values() for key in metrics}
    reference = ["untrained", "ode_init", *sorted(name for name in named if name.startswith("teacher"))]
    shares = [metrics["student.ok"] / max(metrics["teacher.ok"], 1e-9) for metrics in by_seed.values()]
    return {
        "seeds": len(by_seed),
        "by_seed": {
            seed: {key: value for key, value in metrics.items() if key.startswith(KEPT) and key.count(".") == 1}
            for seed, metrics in by_seed.items()
        },
        "student": {key: over(f"student.{key}") for key in SHOWN},
        "share": _interval(shares),
        **{name: {key: over(f"{name}.{key}") for key in SHOWN[:6]} for name in reference},
    }


def _interval(values: list[float]) -> list[float | None]:
    """(mean, low, high); one seed has no interval."""
    return [None if value != value else value for value in over_seeds(values)]


def _cell(value: list[float | None] | None) -> str:
    if value is None:
        return "-"
    mean, low, high = value
    return f"{mean:.3f}" if low is None else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "write", "fresh"))
    parser.add_argument("--which", choices=("main", "table"), default="main")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--out", type=Path, default=spec.experiments_folder() / "reference")
    options = parser.parse_args()
    if options.action == "run":
        shard, shards = map(int, options.shard.split("/"))
        run(options.which, options.runs, shard, shards)
    elif options.action == "fresh":
        torch.set_num_threads(1)
        fresh(options.runs, options.out)
    else:
        write(options.which, options.runs, options.out)


if __name__ == "__main__":
    main()

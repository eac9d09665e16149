"""A whole experiment: from a spec's name to what ran and what came out."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from causvid import arm_labels, build, checks, cost_lines, costs, progress, ranks, registry, runs, sampling_costs
from causvid import spec as specs
from causvid.errors import UserError
from causvid.spec import Spec
from causvid.validate import options_of


@dataclass(frozen=True)
class Outcome:
    """What a run did and where its results are."""

    run: Path
    executed: list[str]
    skipped: list[str]
    metrics: dict[str, float]
    timings: dict[str, float]
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def report(self) -> Path | None:
        """The page, where the run went so far."""
        path = self.run / "report.html"
        return path if path.is_file() else None

    def as_json(self) -> dict[str, Any]:
        report = str(self.report) if self.report else None
        return {
            "run": str(self.run), "report": report, "executed": self.executed, "skipped": self.skipped,
            "metrics": self.metrics, "timings": self.timings,
        }  # fmt: skip


def stages() -> dict[str, runs.Stage]:
    """Every registered stage, by name."""
    return {name: found.target() for name, found in registry.components("stage").items()}


def plan(spec: Spec, target: str | None = None) -> list[runs.Node]:
    """The stages of a checked spec up to a target, inputs first."""
    checks.check(spec)
    return runs.graph(spec, stages(), target or spec["until"])


def explain(name: str, overrides: Sequence[str], root: Path) -> list[dict[str, Any]]:
    """For each stage of a spec: its name, identity, whether and why it would run, and what it costs."""
    return explained(name, overrides, root)[0]


def explained(name: str, overrides: Sequence[str], root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(what :func:`explain` tells, lines about the costs for a person)."""
    store = runs.Store(root.resolve())
    spec = single(name, overrides)
    nodes = plan(spec)
    rows = [{"stage": n.name, "identity": n.identity, "state": store.explain(n)} for n in nodes]
    if sampling_costs.only_samples(spec):  # its stages could not run
        rows = [{"stage": "generate", "identity": None, "state": f"by 'causvid generate --spec {name}'"}]
    stages = [row["stage"] for row in rows]
    # The formulas are those of one network.
    known = spec["model"]["name"] == "dit"
    found = [*costs.of(spec, stages, cost_lines.planned(spec)), *sampling_costs.of(spec, stages)] if known else []
    unfit, limited = cost_lines.misfits(spec, found), bool(spec["runtime.memory"])
    verdicts = {c.stage: {"fits": c.stage not in unfit if limited else None, "remedies": unfit.get(c.stage, [])}
                for c in found}  # fmt: skip
    by_stage = {cost.stage: cost.as_json() | verdicts[cost.stage] for cost in found}
    lines = cost_lines.lines(spec, found, unfit)
    differs = build.train_stream_mismatch(spec, build.World(spec).latent_shape[0])
    told = [*lines, f"train_stream_mismatch: {differs}"] if differs else lines
    return [row | {"cost": by_stage.get(row["stage"])} for row in rows], told


def single(name: str, overrides: Sequence[str]) -> Spec:
    """The spec of one arm.

    Raises:
        UserError: the spec has a sweep, and the overrides do not say which of its arms is meant.
    """
    spec = specs.load(name, overrides)
    swept = {part.strip() for key in spec["sweep"] for part in key.split(",")}
    open_keys = sorted(swept - {override.partition("=")[0] for override in overrides})
    if open_keys:
        chosen = " ".join(f"{key}=..." for key in open_keys)
        raise UserError(
            f"{name} sweeps over {', '.join(open_keys)}: run all arms with 'causvid sweep {name}', or choose one of "
            f"them with {chosen}"
        )
    return spec


def check(names: Sequence[str]) -> list[str]:
    """Check specs, by default every shipped one, with every arm of their sweeps; returns the names.

    Raises:
        UserError: anything wrong, in all of them.
    """
    root = specs.experiments_folder()
    names = list(names) or sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))
    errors = []
    for name in names:
        try:
            spec = specs.load(name)
            for arm in [spec] if not spec["sweep"] else [arm for _, arm in arms_of(name, [])]:
                plan(arm)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))
    return names


def describe(name: str) -> str:
    """Signature, documentation and place of a component, given as ``group.name``.

    Raises:
        UserError: no such component.
    """
    group, dot, short = name.partition(".")
    if not dot:
        raise UserError(f"'{name}' is not of the form GROUP.NAME, as in loss.dmd; see 'causvid list'")
    found = registry.find(group, short)
    options = options_of(group, found).values()
    lines = [f"{name}  ({found.where})", "", inspect.getdoc(found.target) or "", "", "options in a spec:"]
    lines += [f"  {option}".replace("'", "") for option in options] or ["  none"]
    return "\n".join(lines)


def render_report(name: str, overrides: Sequence[str], root: Path) -> Path:
    """Render the report of a finished run again.

    Raises:
        UserError: the run is not finished.
    """
    spec = single(name, overrides)
    store = runs.Store(root.resolve())
    nodes = plan(spec, "report")
    missing = [node.name for node in nodes[:-1] if not store.done(node)]
    if missing:
        raise UserError(f"'{name}' is not finished ({', '.join(missing)} to do); run it first: causvid run {name}")
    store.execute(nodes[-1:], spec, progress.say, others=nodes, again=True)
    return store.folder(nodes[-1]) / "report.html"


def set_threads(spec: Spec) -> None:
    if spec["runtime.threads"] > 0:
        torch.set_num_threads(spec["runtime.threads"])


def run(name: str, overrides: Sequence[str], root: Path) -> Outcome:
    """Run what is not done of a spec.

    Raises:
        UserError: the spec is wrong, or a stage refuses its input.
    """
    return run_spec(single(name, overrides), root)


def run_spec(spec: Spec, root: Path) -> Outcome:
    """Run what is not done of a loaded spec, with all processes that ``torchrun`` started.

    Raises:
        UserError: they are not as many as ``runtime.gpus``.
    """
    set_threads(spec)
    build.device(spec)  # joins the processes
    wanted = spec["runtime.gpus"]
    if wanted not in (None, ranks.count()):
        raise UserError(
            f"runtime.gpus is {wanted}, and {ranks.count()} process(es) run: start them with torchrun --nproc-per-node "
            f"{wanted} -m causvid run {spec.name} (on several machines: docs/wan.md)"
        )
    if not ranks.first():
        progress.silence()
    store = runs.Store(root.resolve())
    nodes = ranks.agreed(lambda: plan(spec))
    executed, skipped = store.execute(nodes, spec, progress.say)
    return outcome(nodes, store, executed, skipped)


def outcome(
    nodes: Sequence[runs.Node], store: runs.Store, executed: Sequence[str] = (), skipped: Sequence[str] = ()
) -> Outcome:
    """What finished stages left."""
    folders = {node.name: store.folder(node) for node in nodes}
    metrics = _json(folders["evaluate"] / "metrics.json") if "evaluate" in folders else {}
    timings = _json(folders["sample"] / "timings.json") if "sample" in folders else {}
    return Outcome(folders[nodes[-1].name], list(executed), list(skipped), metrics, timings, folders)


def _json(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Arm:
    """An arm of a sweep: what it sets, what it is called without its seed, and what came out or why it failed."""

    values: dict[str, Any]
    label: str
    outcome: Outcome | None
    error: str = ""


def sweep(name: str, overrides: Sequence[str], root: Path) -> list[Arm]:
    """Run every arm of a spec's ``sweep`` mapping (dotted keys to lists): their grid, in order.

    An arm that fails is told, kept with its error, and does not stop the rest.

    Raises:
        UserError: no sweep in the spec, or a key or value that is wrong in any arm; nothing has run then.
    """
    arms = arms_of(name, overrides)
    for _, arm in arms:
        plan(arm)
    out = []
    for (values, arm), label, told in zip(arms, arm_labels.labels(arms), arm_labels.labels(arms, True), strict=True):
        try:
            out.append(Arm(values, label, run_spec(arm, root)))
        except Exception as error:  # the other arms are worth as much as before
            out.append(Arm(values, label, None, f"{type(error).__name__}: {error}"))
            progress.console.print(f"failed: {told}: {out[-1].error}", markup=False, soft_wrap=True)
    return out


def sweep_status(name: str, overrides: Sequence[str], root: Path) -> list[dict[str, Any]]:
    """For each arm what it sets, its name, how many of its stages are done, and the first that is not."""
    store, rows, arms = runs.Store(root.resolve()), [], arms_of(name, overrides)
    for (values, arm), label in zip(arms, arm_labels.labels(arms, True), strict=True):
        nodes = plan(arm)
        waiting = [node for node in nodes if not store.done(node)]
        next_stage = f"{waiting[0].name}: {store.explain(waiting[0])}" if waiting else ""
        rows.append(
            {"arm": values, "label": label, "done": len(nodes) - len(waiting), "stages": len(nodes), "next": next_stage}
        )
    return rows


def arms_of(name: str, overrides: Sequence[str]) -> list[tuple[dict[str, Any], Spec]]:
    """The arms of a sweep: what each sets, and its whole spec.

    Raises:
        UserError: two arms are one experiment, which would count one training as two.
    """
    arms = [(values, specs.load(name, [*overrides, *as_overrides(values)])) for values in grid(name, overrides)]
    for number, (values, arm) in enumerate(arms):
        for earlier, other in arms[:number]:
            if arm.data == other.data:
                raise UserError(f"{name}: sweep: {earlier} and {values} are one experiment; name each arm once")
    return arms


def grid(name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The arms of a sweep, each a mapping of dotted keys to values.

    A key that names several, ``student.steps, loss.guidance``, goes through its list of rows with all of them at once.
    """
    keys = specs.load(name, overrides)["sweep"]
    if not keys:
        raise UserError(
            f"{name} has no 'sweep:' (a mapping of dotted keys to lists); use 'causvid run' for a single arm"
        )
    for override in overrides:
        given = override.partition("=")[0]
        swept = [key for key in keys if f"{key}.".startswith(f"{given}.") or f"{given}.".startswith(f"{key}.")]
        if swept:
            raise UserError(
                f"override '{override}': the sweep of {name} sets {swept[0]} itself; run one arm with 'causvid run'"
            )
    for key, values in keys.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{name}: sweep.{key}: expected a list of values, got {values!r}")
    columns, named = [], []
    for key, values in keys.items():
        names = [part.strip() for part in key.split(",")]
        named += names
        rows = [value if len(names) > 1 else [value] for value in values]
        for row in rows:
            if not isinstance(row, list) or len(row) != len(names):
                raise UserError(f"{name}: sweep.{key}: each row gives {len(names)} values, got {row!r}")
        columns.append([dict(zip(names, row, strict=True)) for row in rows])
    if len(named) != len(set(named)):
        raise UserError(f"{name}: sweep: a key is given twice: {', '.join(named)}")
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*columns)]


def as_overrides(values: dict[str, Any]) -> list[str]:
    """An arm's settings as ``key=value``."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]

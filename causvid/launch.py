"""Where the arms of a sweep run: here one after another, here several at a time, or on a cluster through submitit.

An arm is a run of the command line, or a job that does the same. Its results are in the store, and arms that share a
stage wait for the one that makes it. So a launcher only starts arms and says which failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causvid import arm_labels, experiment, progress
from causvid.errors import UserError
from causvid.registry import did_you_mean

TAIL = 2000  # characters of a failed arm's output that are kept
POLL_S = 5.0
RESERVED = {"array_parallelism", "name"}  # set by us
TIMES = {"timeout_min", "slurm_time"}


@dataclass(frozen=True)
class Work:
    """An arm to run: the spec, its overrides, and its name with the seed."""

    spec: str
    overrides: tuple[str, ...]
    label: str

    def command(self, root: Path) -> list[str]:
        """The command line that runs it."""
        return [sys.executable, "-m", "causvid.cli", "run", self.spec, *self.overrides, "--runs", str(root), "--json"]


def works(spec: str, overrides: Sequence[str]) -> list[Work]:
    """The arms of a sweep as work, all of them checked.

    Raises:
        UserError: no sweep in the spec, or a key or value that is wrong in any arm.
    """
    found, arms = [], experiment.arms_of(spec, overrides)
    for (values, arm), label in zip(arms, arm_labels.labels(arms, True), strict=True):
        experiment.plan(arm)
        found.append(Work(spec, (*overrides, *experiment.as_overrides(values)), label))
    return found


def local(arms: Sequence[Work], root: Path, workers: int, threads: int) -> list[str]:
    """Run arms as processes of this machine, at most ``workers`` at a time; returns each one's error, empty where none.

    Each gets ``threads`` threads, unless the spec says otherwise. Output goes to ``sweeps/logs`` in the store.
    """
    logs = root / "sweeps" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running: set[subprocess.Popen[bytes]] = set()

    def run(number: int) -> str:
        path = logs / f"{number:03d}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                arms[number].command(root), stdout=log, stderr=subprocess.STDOUT, env=environment
            )  # fmt: skip
            running.add(process)
            status = process.wait()
            running.discard(process)
        progress.say(f"arm {number + 1} of {len(arms)} {'done' if status == 0 else 'failed'}: {arms[number].label}")
        return "" if status == 0 else f"exit status {status}: {_tail(path)}"

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        jobs = [pool.submit(run, number) for number in range(len(arms))]
        try:
            return [job.result() for job in jobs]
        except BaseException:  # stopped: those that wait never start, those that run stop at their last checkpoint
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise


def _tail(path: Path) -> str:
    """The end of a log: the message, where there is one."""
    text = path.read_text("utf-8", errors="replace").strip()[-TAIL:]
    return text[text.rfind("error:") :] if "error:" in text else text


class RunArm:
    """An arm as a job of submitit: picklable, and submitted again where the cluster preempts it or its time is up."""

    def __init__(self, work: Work, root: Path) -> None:
        self.work, self.root = work, root

    def __call__(self) -> str:
        outcome = experiment.run(self.work.spec, self.work.overrides, self.root)
        return str(outcome.run)

    def checkpoint(self) -> Any:
        """What is submitted in its place: the same, which goes on from the last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def executor(root: Path, cluster: str, options: Sequence[str], parallel: int, dry: bool = False) -> Any:
    """A submitit executor with ``KEY=VALUE`` options, as ``slurm_partition=gpu`` or ``timeout_min=600``.

    Args:
        cluster: ``slurm``, or ``local``: processes of this machine, to try it.
        parallel: how many jobs of the array may run at once.
        dry: only to show scripts; works where Slurm is not.

    Raises:
        UserError: submitit is not installed, the cluster is not there, or an option it does not know.
    """
    try:
        import submitit
        from submitit.slurm.slurm import SlurmExecutor
    except ImportError as error:
        raise UserError("launching on a cluster needs submitit: pip install 'causvid[cluster]'") from error
    folder = root.resolve() / "sweeps" / "jobs" / "%j"
    try:
        made = submitit.AutoExecutor(folder=folder, cluster="debug" if dry else cluster)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"no cluster '{cluster}' can be used here: {error}; --dry-run shows the scripts") from error
    if dry and cluster == "slurm":

        class Elsewhere(SlurmExecutor):
            """Writes Slurm's scripts where Slurm is not, and so can't submit them."""

            @classmethod
            def affinity(cls) -> int:
                return 1

        made.cluster, made._executor = cluster, Elsewhere(folder)
    values: dict[str, Any] = {"name": "causvid"}
    if cluster == "slurm":
        values["slurm_array_parallelism"] = parallel
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or key in RESERVED:
            raise UserError(f"--cluster-option '{option}' is not of the form KEY=VALUE, as slurm_partition=gpu")
        values[key] = int(text) if text.lstrip("-").isdigit() else text
    if cluster == "slurm" and not TIMES & set(values):
        progress.say(
            "no time is given, and submitit then asks Slurm for 5 minutes a job; an arm that takes longer needs "
            "--cluster-option timeout_min=MINUTES"
        )
    try:
        made.update_parameters(**values)
    except (NameError, TypeError, ValueError, AssertionError) as error:
        known = sorted(made._valid_parameters()) if hasattr(made, "_valid_parameters") else []
        unknown = next((key for key in values if key in str(error)), "")
        raise UserError(f"--cluster-option: {error}{did_you_mean(unknown, known)}") from error
    return made


def cluster(
    arms: Sequence[Work],
    root: Path,
    made: Any,
    say: Callable[[str], None] = progress.say,
    poll_s: float = POLL_S,
) -> list[str]:
    """Submit arms as one array, and wait; returns each one's error, empty where none.

    Stopping this process leaves the jobs to the cluster: ``causvid sweep SPEC --status`` says how far they are, and the
    same sweep, run again, finds what is done.
    """
    with made.batch():
        jobs = [made.submit(RunArm(work, root)) for work in arms]
    say(f"submitted {len(jobs)} jobs: {', '.join(str(job.job_id) for job in jobs)}; logs in {root}/sweeps/jobs")
    told: set[int] = set()
    while len(told) < len(jobs):
        for number, job in enumerate(jobs):
            if number not in told and job.done():
                told.add(number)
                say(f"arm {number + 1} of {len(jobs)} ended: {arms[number].label}")
        if len(told) < len(jobs):
            time.sleep(poll_s)
    return [_error(job) for job in jobs]


def _error(job: Any) -> str:
    """What went wrong with a finished job; empty where nothing did."""
    try:
        error = job.exception()
    except Exception as lost:  # the job ended without a result, as when its node was lost
        return f"job {job.job_id}: {lost}"
    if error is None:
        return ""
    # submitit tells the trace between rules of dashes, and then where its logs are.
    trace = str(error).split("You can check full logs")[0].strip().strip("-").strip()
    return f"job {job.job_id}: {trace.splitlines()[-1]}"


def scripts(arms: Sequence[Work], made: Any) -> str:
    """What would be submitted: Slurm's script for the whole array, and the arm of each task.

    submitit writes the real script into its folder while it submits; this is the same text, from the same function.
    """
    inner = made._executor
    lines = [f"# arm {number}: {' '.join(work.overrides)}" for number, work in enumerate(arms)]
    inner.parameters["map_count"] = len(arms)
    try:
        text = inner._make_submission_file_text(inner._submitit_command_str, "dry-run")
    finally:
        inner.parameters.pop("map_count")
    return "\n".join([*lines, "", text])

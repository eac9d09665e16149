"""What training stages share: players with optimizers and averages, exact resume, curves. Functions, not a trainer.

Schedules, seeding, activation checkpointing and outside loggers are torchtune's, imported when training begins (its
import takes tens of seconds).
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from causvid import build, checkpoint, progress, ranks, weights
from causvid.errors import UserError
from causvid.randomness import key
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.types import DenoiserOutput, LossOutput, Text
from causvid.validate import Bound


class Player:
    """A network in training: optimizers, learning-rate schedule, clipping, and an average of its weights.

    Args:
        module: the network.
        optimizer: its validated optimizer component.
        options: the training section of the spec (``warmup``, ``decay``, ``ema``, ``gradient_clip``).
        updates: how many updates it will get, for the schedule.
    """

    def __init__(self, module: nn.Module, optimizer: Any, options: Mapping[str, Any], updates: int) -> None:
        self.module = module
        self.optimizers: list[torch.optim.Optimizer] = build.construct(optimizer, model=module)
        self.schedules = [_schedule(each, options, updates) for each in self.optimizers]
        self.clip, self.decay = options["gradient_clip"], options["ema"]
        self.updates = 0
        self.average = (
            {name: value.detach().clone() for name, value in module.state_dict().items()} if self.decay > 0 else None
        )

    def step(self, loss: Tensor) -> float:
        """Backward and one update; returns the gradient's norm before clipping.

        What other players' losses left in this network's gradients is cleared first.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.module.parameters() if p.grad is not None], self.clip if self.clip > 0 else float("inf")
        )
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        self.updates += 1
        if self.average is not None:
            # A short memory at first, so that the average is not held back by the initial weights.
            decay = min(self.decay, self.updates / (self.updates + 9))
            with torch.no_grad():
                for name, value in self.module.state_dict().items():
                    self.average[name].lerp_(value, 1 - decay)
        return float(ranks.whole(norm))

    def final(self) -> dict[str, Tensor]:
        """The weights to keep: the average where there is one; whole, in the first process alone."""
        return _gathered(self.average if self.average is not None else dict(self.module.state_dict()))

    def state(self) -> dict[str, Any]:
        """All that goes on; whole tensors, in the first process alone, so that any number of processes can go on."""
        return _gathered(
            {
                "module": dict(self.module.state_dict()),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "schedules": [_plain(schedule.state_dict()) for schedule in self.schedules],
                "average": self.average,
                "updates": self.updates,
            }
        )

    def load_state(self, state: Mapping[str, Any]) -> None:
        like = self.module.state_dict()
        self.module.load_state_dict(_shared(state["module"], like))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states = {}
            for number, each in saved["state"].items():
                states[number] = _shared(each, {name: parameters[int(number)] for name in each})
            optimizer.load_state_dict({**saved, "state": states})
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        self.average = None if state["average"] is None else _shared(state["average"], like)
        self.updates = state["updates"]


def _gathered(node: Any) -> Any:
    """A tree with its shards put together, one after the other: by all processes, for the first one."""
    if isinstance(node, Tensor):
        whole = ranks.whole(node)
        return whole if whole is node else whole.cpu() if ranks.first() else None
    if isinstance(node, Mapping):
        return {key: _gathered(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_gathered(value) for value in node]
    return node


def _shared(state: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Any]:
    """This process's part of every tensor that has the shape of its like, on whose device it comes to lie."""
    return {
        name: ranks.part(value, like[name]).to(like[name].device)
        if isinstance(value, Tensor) and value.shape == like[name].shape
        else value
        for name, value in state.items()
    }


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without its functions, which are made anew from the spec."""
    return {key: value for key, value in state.items() if key != "lr_lambdas"} | {"lr_lambdas": [None]}


def _schedule(
    optimizer: torch.optim.Optimizer, options: Mapping[str, Any], updates: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if options["decay"] == "cosine":
        from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

        return get_cosine_schedule_with_warmup(optimizer, options["warmup"], max(updates, 1))
    warmup = options["warmup"]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))


def seed_everything(spec: Spec, stage: str) -> None:
    """Seed the global generators, from which fresh weights are drawn."""
    # What torchtune and torchao say at import and at seeding concerns no user of causvid.
    logging.disable(logging.WARNING)
    try:
        from torchtune.training.seed import set_seed

        number = key(spec["seed"], stage, "weights") % 2**31
        set_seed(number)
        torch.manual_seed(number)  # the same in all processes: each keeps its part of the same fresh weights
    finally:
        logging.disable(logging.NOTSET)


def prepare(module: nn.Module, options: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The module in training mode, sharded, with activation checkpointing where the spec asks for it."""
    if options["activation_checkpointing"]:
        from torchtune.training import set_activation_checkpointing

        from causvid.models.blocks import Block

        set_activation_checkpointing(module, auto_wrap_policy={Block})
    return shard(module, device).train()


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its weights, and so gradients and optimizer, in equal parts over all processes (FSDP2).

    A block's weights are put together while it works. Alone, the module as it is.
    """
    if ranks.count() == 1:
        return module
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _show_tensors()
    mesh = init_device_mesh(device.type, (ranks.count(),))
    for name, part in module.named_modules():
        if re.fullmatch(r"blocks\.\d+", name):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


@cache
def _show_tensors() -> None:
    """Let sharding see the tensors inside what networks take and return, at which it starts its work."""
    from torch.utils._pytree import register_dataclass

    for kind in (Text, DenoiserOutput):
        register_dataclass(kind)


class Logger(Protocol):
    """Takes numbers as they are produced."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


@register("logger", "jsonl")
class JsonLines:
    """One line per step in ``curves.jsonl``; a resumed run drops the lines that it will write again."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        path = folder / "curves.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < start]
        weights.write_bytes(path, "".join(kept).encode())
        # By lines, so that a kill after a checkpoint loses no line from before it.
        self._stream = path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._stream.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self._stream.close()


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@register("logger", "wandb")
class Wandb:
    """Weights & Biases through torchtune's logger; ``offline`` needs no account.

    Args:
        project: project to log to.
        mode: ``offline`` or ``online``.
    """

    def __init__(self, folder: Path, project: str = "causvid", mode: str = "offline", start: int = 0) -> None:
        from torchtune.training.metric_logging import WandBLogger

        self._logger = WandBLogger(project=project, dir=str(folder), mode=mode, log_dir=str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._logger.log_dict(dict(values), step)

    def close(self) -> None:
        self._logger.close()


class Session:
    """A training run under way: curves, checkpoints, progress."""

    def __init__(self, context: Context, players: Mapping[str, Player], total: int, show: progress.Bar) -> None:
        self.players, self._context, self._total, self._show = players, context, total, show
        self._path = context.checkpoint
        self._saved = time.monotonic()
        self.start = 0
        if ranks.agreed(self._path.is_file):
            tree = checkpoint.load(self._path)
            for name, player in players.items():
                player.load_state(tree["players"][name])
            self.start = tree["step"]
            context.say(f"resumed at step {self.start} of {total}")
        runtime = context.spec["runtime"]
        self._every = runtime["checkpoint_seconds"]
        # The report and a resumed run read the curves, wherever else they go.
        wanted = [Bound("logger", {"name": "jsonl"}), *(each for each in runtime["loggers"] if each["name"] != "jsonl")]
        self._loggers: list[Logger] = [
            build.construct(logger, folder=context.folder, start=self.start) for logger in wanted if ranks.first()
        ]
        self._monitor = (
            build.construct(runtime["monitor"], context=context, total=total) if runtime["monitor"] else None
        )

    def after(self, step: int, output: LossOutput, **numbers: float) -> None:
        """Log a finished step, and what the monitor finds; write a checkpoint when one is due.

        Raises:
            UserError: the loss is not finite.
        """
        logs = {k: float(v.detach() if isinstance(v, Tensor) else v) for k, v in output.logs.items()}
        values = {"loss": float(output.value.detach()), **logs, **numbers}
        due = time.monotonic() - self._saved > self._every
        if ranks.count() > 1:  # the losses of the whole batch, and the first process's clock
            mine = [*values.values(), float(due and ranks.first())]
            told = torch.tensor(mine, dtype=torch.float64)
            missing = told.isnan()  # a band of noise levels may be empty in one process
            known = 1 - ranks.mean(missing.double())
            means = (ranks.mean(told.masked_fill(missing, 0)) / known).tolist()
            values, due = dict(zip(values, means, strict=False)), means[-1] > 0
            if known[0] < 1:
                values["loss"] = float("nan")
        if values["loss"] != values["loss"] or abs(values["loss"]) == float("inf"):
            raise UserError(
                f"the loss is {values['loss']} at step {step}; lower the learning rate or clip gradients "
                f"(curves: {self._context.folder / 'curves.jsonl'})"
            )
        if self._monitor:
            values |= self._monitor(step, self.players["student"].final)
        for logger in self._loggers:
            logger.log(step, values)
        self._show(step + 1, f"loss {values['loss']:.4f}")
        if due and step + 1 < self._total:
            self.save(step + 1)

    def save(self, step: int) -> None:
        """Everything needed to go on exactly from ``step``."""
        states = {name: player.state() for name, player in self.players.items()}
        if ranks.first():
            checkpoint.save(self._path, {"step": step, "players": states})
        self._saved = time.monotonic()

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()

    def finish(self, **files: Mapping[str, Tensor]) -> None:
        """Write final weights, one ``NAME.safetensors`` each; the checkpoint goes when the stage is done."""
        for name, tensors in files.items() if ranks.first() else ():
            weights.write_tensors(self._context.folder / f"{name}.safetensors", tensors)


@contextmanager
def session(context: Context, title: str, players: Mapping[str, Player], total: int) -> Iterator[Session]:
    """Resume if there is something to resume, and close everything at the end, however it ends."""
    with progress.bar(title, total) as show:
        running = Session(context, players, total, show)
        try:
            yield running
        finally:
            running.close()

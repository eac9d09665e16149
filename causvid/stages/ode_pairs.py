"""Trajectories of the teacher: where an ODE-initialised student starts and where it must arrive.

Writes ``pairs-NNNN.safetensors``, one file per batch, each with ``states`` (``k b f c h w``, fp16) and ``times``;
which captions and which noise they belong to follows from the sample indices, so they need not be stored. A killed run
goes on with the next batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from causvid import build, progress, ranks, weights
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.tensor_files import TensorFiles, open_tensors
from causvid.types import Trajectory


@register("stage", "ode_pairs")
class OdePairs:
    """Solves the teacher's ODE and stores the states that students start from."""

    name = "ode_pairs"

    def shared(self, spec: Spec) -> bool:
        return True

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return (*build.teacher_reads(spec), "teacher_sampling", "ode_pairs", "precision")

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ("teacher",)

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return ()

    def run(self, context: Context) -> None:
        spec = context.spec
        options = spec["ode_pairs"]
        world = build.World(spec)
        world.ready_text()
        teacher = build.load_network(
            spec,
            world,
            build.teacher_rule(spec),
            context.inputs["teacher"] / "weights.safetensors",
        )
        solver = build.teacher_sampler(spec, options["steps"])
        wanted = build.stored_times(spec).tolist()
        keep = [i for i, time in enumerate(solver.times.tolist()) if time in wanted]
        count, batch = options["count"], options["batch"]
        with progress.bar("ode pairs", count) as show:
            for start in range(0, count, batch):
                number = start // batch
                path = context.folder / f"pairs-{number:04d}.safetensors"
                if number % ranks.count() == ranks.number() and not path.is_file():
                    samples = range(start, min(start + batch, count))
                    _, text, unconditional = world.batch(samples)
                    # Pairs are data, not training: every seed of an experiment regresses the same ones.
                    noise = Draw(0, "ode_pairs", 0, samples, world.device).normal("noise", *world.latent_shape)
                    trajectory = solver(teacher, noise, text, unconditional, keep)
                    weights.write_tensors(
                        path,
                        {
                            "states": trajectory.states.to(torch.float16),
                            "times": trajectory.times,
                        },
                    )
                show(min(start + batch, count))


class Pairs:
    """Pairs of a finished stage, in the order of their samples; a pair is read when it is asked for.

    Attributes:
        times: times of the states.

    Raises:
        UserError: files are missing, damaged, or disagree on their times.
    """

    def __init__(self, folder: Path) -> None:
        files = [open_tensors(path) for path in sorted(folder.glob("pairs-*.safetensors"))]
        times = [file.read("times") for file in files]
        if not files or any(not torch.equal(each, times[0]) for each in times):
            raise UserError(f"{folder} holds no pairs, or pairs of different times; delete it and run again")
        self.times = times[0]
        self._where = [(file, row) for file in files for row in range(file.shapes["states"][1])]

    def __len__(self) -> int:
        return len(self._where)

    def rows(self, indices: Sequence[int]) -> Trajectory:
        """Trajectories of these pairs, states ``k b f c h w`` in fp32."""
        parts = [file.part("states", (slice(None), slice(row, row + 1))) for file, row in map(self._at, indices)]
        return Trajectory(torch.cat(parts, dim=1).float(), self.times)

    def _at(self, index: int) -> tuple[TensorFiles, int]:
        return self._where[index]

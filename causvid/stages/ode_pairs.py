"""Trajectories of the teacher: where an ODE-initialised student starts and where it must arrive.

Writes ``pairs-NNNN.safetensors``, one file per batch, each with ``states`` (``k b f c h w``, fp16) and ``times``;
which captions and which noise they belong to follows from the sample indices, so they need not be stored. A killed run
goes on with the next batch.
"""

from __future__ import annotations

from pathlib import Path

import torch

from causvid import build, progress, weights
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.types import Trajectory


@register("stage", "ode_pairs")
class OdePairs:
    """Solves the teacher's ODE and stores the states that students start from."""

    name = "ode_pairs"

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return (*build.teacher_reads(spec), "teacher_sampling", "ode_pairs")

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ("teacher",)

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return ()

    def run(self, context: Context) -> None:
        spec = context.spec
        options = spec["ode_pairs"]
        world = build.World(spec)
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
                path = context.folder / f"pairs-{start // batch:04d}.safetensors"
                if not path.is_file():
                    samples = range(start, min(start + batch, count))
                    _, text, unconditional = world.batch(samples)
                    # Pairs are data, not training: every seed of an experiment regresses the same ones.
                    noise = Draw(0, "ode_pairs", 0, samples).normal("noise", *world.latent_shape)
                    trajectory = solver(teacher, noise, text, unconditional, keep)
                    weights.write_tensors(
                        path,
                        {
                            "states": trajectory.states.to(torch.float16),
                            "times": trajectory.times,
                        },
                    )
                show(min(start + batch, count))


def read_pairs(folder: Path) -> Trajectory:
    """All pairs of a finished stage, in the order of their samples: states ``k b f c h w`` in fp16.

    Raises:
        UserError: files are missing or disagree on their times.
    """
    parts = [weights.read_tensors(path)[0] for path in sorted(folder.glob("pairs-*.safetensors"))]
    if not parts or any(not torch.equal(part["times"], parts[0]["times"]) for part in parts):
        raise UserError(f"{folder} holds no pairs, or pairs of different times; delete it and run again")
    return Trajectory(torch.cat([part["states"] for part in parts], dim=1), parts[0]["times"])

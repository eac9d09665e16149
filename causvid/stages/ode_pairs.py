"""Trajectories of the teacher: where an ODE-initialised student starts and where it must arrive.

Writes a store ``pairs`` (see ``causvid.data.lmdb_store``): a row per sample with its states (``k f c h w``, fp16), its
caption and its text; the states' times stand in the header. A killed run goes on with the next batch.
"""

from __future__ import annotations

from pathlib import Path

from causvid import build, progress
from causvid.data import trajectories
from causvid.data.digest import finish
from causvid.data.lmdb_store import Writer
from causvid.randomness import Draw
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec

STORE = "pairs"


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
        times = build.stored_times(spec)
        keep = [i for i, time in enumerate(solver.times.tolist()) if time in times.tolist()]
        count, batch = options["count"], options["batch"]
        made_by = {
            "codec": dict(spec["world.codec"]), "text_encoder": dict(spec["world.text_encoder"]),
            "provenance": {"from": "ode_pairs"},
        }  # fmt: skip
        header = trajectories.header(times, world.latent_shape, world.unconditional(1), made_by)
        with progress.bar("ode pairs", count) as show, Writer(context.folder / STORE, header) as writer:
            there = writer.keys()
            for start in range(0, count, batch):
                samples = range(start, min(start + batch, count))
                if trajectories.key_of(start) not in there:  # a batch is added whole or not at all
                    captions, text, unconditional = world.prompts(samples)
                    # Pairs are data, not training: every seed of an experiment regresses the same ones.
                    noise = Draw(0, "ode_pairs", 0, samples).normal("noise", *world.latent_shape)
                    trajectory = solver(teacher, noise, text, unconditional, keep)
                    writer.add(trajectories.rows_of(samples, captions, text, trajectory))
                show(samples.stop)
        finish(context.folder / STORE)

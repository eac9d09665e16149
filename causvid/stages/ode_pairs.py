"""Trajectories of the teacher: where an ODE-initialised student starts and where it must arrive.

Writes a store ``pairs`` (see ``causvid.data.lmdb_store``): a row per sample with its states (``k f c h w``, fp16), its
caption and its text; the states' times stand in the header. Batches are files first, which several processes write, and
the first process puts them into the store. A killed run goes on with the next batch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from causvid import build, progress, ranks, weights
from causvid.data import trajectories
from causvid.data.digest import finish
from causvid.data.lmdb_store import Writer
from causvid.randomness import Draw
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.types import Text, Trajectory

STORE, PARTS = "pairs", "parts"


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
        times = build.stored_times(spec)
        keep = [i for i, time in enumerate(solver.times.tolist()) if time in times.tolist()]
        count, batch = options["count"], options["batch"]
        parts = {
            context.folder / PARTS / f"{start:08d}.safetensors": range(start, min(start + batch, count))
            for start in range(0, count, batch)
        }
        if (context.folder / STORE / "digest.json").is_file():
            return
        with progress.bar("ode pairs", count) as show:
            for number, (path, samples) in enumerate(parts.items()):
                if number % ranks.count() == ranks.number() and not path.is_file():
                    captions, text, unconditional = world.prompts(samples)
                    # Pairs are data, not training: every seed of an experiment regresses the same ones.
                    noise = Draw(0, "ode_pairs", 0, samples, world.device).normal("noise", *world.latent_shape)
                    trajectory = solver(teacher, noise, text, unconditional, keep)
                    tensors = {"states": trajectory.states.to(torch.float16), "text": text.embeddings}
                    weights.write_tensors(path, tensors, {"captions": json.dumps(captions)})
                show(samples.stop)
        ranks.wait()
        made_by = {
            "codec": dict(spec["world.codec"]), "text_encoder": dict(spec["world.text_encoder"]),
            "provenance": {"from": "ode_pairs"},
        }  # fmt: skip
        header = trajectories.header(times, world.latent_shape, world.unconditional(1), made_by)
        if ranks.first():
            with Writer(context.folder / STORE, header) as writer:
                for path, samples in parts.items():
                    tensors, told = weights.read_tensors(path)
                    found = Trajectory(tensors["states"], times)
                    captions, text = json.loads(told["captions"]), Text(tensors["text"])
                    writer.add(trajectories.rows_of(samples, captions, text, found))
            finish(context.folder / STORE)
            shutil.rmtree(context.folder / PARTS)
        ranks.wait()

"""Whether a spec can run: what is cheap is tried, so that nothing fails half way that could have been told before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from causvid import build, ranks, registry, schedule
from causvid.attention.kernels import Blockwise, Grid
from causvid.attention.masks import Pattern, Rule
from causvid.data.folders import Folder
from causvid.errors import UserError
from causvid.fingerprint import bound
from causvid.spec import Spec
from causvid.types import Text
from causvid.validate import Bound

STAGES = ("teacher", "ode_pairs", "ode_init", "distill", "report")  # where 'until' may stop, in order
# What each stage's loss may take from the scene.
GIVEN = {
    "teacher_training.loss": {"data"},
    "ode_init.loss": {"trajectory", "edits"},
    "loss": {"data", "samples", "edits"},
}


def check(spec: Spec) -> None:
    """Build everything that is cheap, so that what does not fit together is told before anything runs.

    Raises:
        UserError: the first thing that does not fit.
    """
    world = build.World(spec)
    players = _check_losses(spec, world)
    _check_networks(spec, world, players)
    _check_sampling(spec, world)
    _check_sharing(spec)
    group = getattr(world.dataset, "group", 0)
    for path in ("teacher_training.batch", "ode_pairs.batch", "distill.batch"):
        if group % spec[path]:
            raise UserError(f"world.dataset.group: must be a multiple of {path} = {spec[path]}, got {group}")
    options = spec["teacher_training"]
    if options["weights"] == "train" and options["iterations"] < 1:
        raise UserError("teacher_training.iterations: must be at least 1 to train a teacher")
    if options["start"] is not None:
        try:
            registry.find("teacher", options["start"])
        except registry.UnknownName as error:
            raise UserError(f"teacher_training.start: {error}") from error
    build.teacher_files(spec)
    if spec["init"]["name"] == "ode" and spec["ode_init.pairs"]:
        if Folder(spec["ode_init.pairs"]).is_local:  # what lies elsewhere is fetched by the stage
            build.stored_pairs(spec, world)
    elif spec["init"]["name"] == "ode":
        schedule.state_indices(build.stored_times(spec), [*build.student_times(spec), 0.0])


def _check_losses(spec: Spec, world: build.World) -> tuple[str, ...]:
    """Each stage has what its loss needs; returns the players of distillation."""
    players: tuple[str, ...] = ()
    for path, given in GIVEN.items():
        if not hasattr(world.dataset, "edits"):
            given = given - {"edits"}
        loss = build.construct(spec[path])
        players = tuple(getattr(loss, "players", ()))
        if "student" not in players:
            raise UserError(
                f"{path}: training needs a loss for the student; this one trains {', '.join(players) or 'no one'}"
            )
        if path != "loss" and players != ("student",):
            raise UserError(f"{path}: '{spec[path]['name']}' trains others than the student; it belongs in 'loss'")
        missing = sorted(set(getattr(loss, "needs", ())) - given)
        if missing:
            raise UserError(
                f"{path}: '{spec[path]['name']}' needs {' and '.join(missing)}, and this stage has "
                f"{' and '.join(sorted(given))}"
            )
        if "edits" in getattr(loss, "needs", ()):
            world.edits([0], build.student_rule(spec).blocks(world.latent_shape[0]))
    penalised = any(part.get("r1", 0) for part in bound(spec["loss"]))
    if penalised and spec["distill.activation_checkpointing"]:
        raise UserError(
            "distill.activation_checkpointing: a GAN's r1 penalty differentiates twice, which recomputed activations "
            "do not allow; set one of them to 0 or false"
        )
    # Where nobody trains by them, a base's settings are a record and mean nothing.
    used = {"student.input": build.student_rule(spec)}
    used |= {"teacher_training.loss": build.teacher_rule(spec)} if spec["teacher_training.weights"] == "train" else {}
    used |= {"ode_init.loss": build.student_rule(spec)} if spec["init"]["name"] == "ode" else {}
    for path, rule in used.items():
        if not rule.causal and any(part.get("context") == "clean" for part in bound(spec[path])):
            raise UserError(f"{path}.context: 'clean' changes nothing under a mask that is not causal; use 'noisy'")
    return players


def _check_networks(spec: Spec, world: build.World, players: tuple[str, ...]) -> None:
    """Every network takes the world's latents and text: one forward each, on tensors that hold no numbers."""
    rules = {"teacher": build.teacher_rule(spec), "student": build.student_rule(spec)}
    model, real = (_shallow(spec[key], "discriminator" in players) for key in ("model", "real_score"))
    with torch.device("meta"):
        nets: dict[str, Any] = {n: build.network(spec, world, rule, Blockwise(), model) for n, rule in rules.items()}
        nets["real_score"] = nets["teacher"]
        if real:
            nets["real_score"] = build.network(spec, world, rules["teacher"], Blockwise(), real)
        nets["fake_score"] = nets[spec["fake_score"]]
        if "discriminator" in players:
            nets["discriminator"] = build.discriminator(spec)
        for name in players:
            path = "distill.optimizer" if name == "student" else "distill.critic_optimizer"
            build.construct(spec[path], model=nets[name])
        for stage in ("teacher_training", "ode_init"):
            build.construct(spec[f"{stage}.optimizer"], model=nets["student"])
    text = _text(spec, world).to("meta")
    for shape in _shapes(world):
        x = torch.empty(1, *shape, device="meta")
        t = torch.empty(x.shape[:2], device="meta")
        try:
            for name in (*rules, *(["real_score"] if real else [])):
                nets[name](x, t, text)
            if "discriminator" in players:
                nets["discriminator"](x, t, text, nets["fake_score"])
            _check_kernel(spec, world.device, nets["teacher"], rules.values(), x.shape[1])
        except (ValueError, TypeError, RuntimeError, LookupError) as error:
            raise UserError(f"model: it does not run on latents {tuple(shape)} (f c h w): {error}") from error


def _shapes(world: build.World) -> tuple[tuple[int, ...], ...]:
    """Latent shapes ``f c h w`` that training meets, the clip's own last."""
    return (*getattr(world.dataset, "also", ()), world.latent_shape)


def _shallow(model: Bound | None, tapped: bool) -> Bound | None:
    """The model with two blocks at most: all of ours are alike, and large ones take seconds to try."""
    if model is None or model["name"] != "dit" or tapped:
        return model
    return Bound("model", {**model, "layers": min(model["layers"], 2)})


def _text(spec: Spec, world: build.World) -> Text:
    """A caption's text; where its encoder needs outside weights, or the data is a store, tokens of the right width."""
    if spec["teacher_training.weights"] == "given" or world.holds_latents:
        return Text(torch.empty(1, 1, world.text_encoder.dim))
    return world.text_encoder.encode(world.dataset.batch([0])[1])


def _check_kernel(spec: Spec, device: torch.device, model: Any, rules: Iterable[Rule], frames: int) -> None:
    """Kernels give the same shapes and differ in what they can do: the spec's own, on the CPU on one token a frame."""
    kernel, position = build.construct(spec["causal.kernel"]), build.construct(spec["causal.position"])
    trains = spec["until"] != "teacher" or spec["teacher_training.weights"] == "train"
    q = torch.zeros(1, 1, frames, model.head_dim, requires_grad=trains)
    for rule in rules:
        kernel.check(rule, position)
        if device.type == "cpu":  # elsewhere it may have to be compiled first
            grid = Grid(1, 1, model.head_dim, model.theta, q.dtype, device)
            kernel.plan(Pattern(rule, frames), position, grid)(q, q, q)


def _check_sharing(spec: Spec) -> None:
    """What several processes can do together, for as many as there are or are planned for."""
    if spec["fake_score"] == "real_score" and not spec["real_score"]:
        raise UserError("fake_score: 'real_score' needs a network of its own there; real_score is null")
    count, far = max(ranks.count(), spec["runtime.gpus"] or 1), STAGES.index(spec["until"])
    if spec["student.input"]["name"] == "mixed" and far >= STAGES.index("distill"):
        inputs = len(spec["student.input"]["of"])
        if spec["distill.batch"] < inputs * count:
            raise UserError(
                f"distill.batch: {spec['distill.batch']} samples are too few for {inputs} student inputs in {count} "
                f"process{'es' * (count > 1)}, which each need one of every input: at least {inputs * count}"
            )
    if count == 1:
        return
    used = ["teacher_training"] if spec["teacher_training.weights"] == "train" else []
    used += ["ode_init"] if far >= STAGES.index("ode_init") and spec["init"]["name"] == "ode" else []
    used += ["distill"] if far >= STAGES.index("distill") else []
    for section in used:
        if spec[f"{section}.batch"] % count:
            raise UserError(
                f"{section}.batch: {spec[f'{section}.batch']} samples can't be shared by {count} processes; choose a "
                "multiple of them"
            )
        for key in ("optimizer", "critic_optimizer"):
            if spec[section].get(key, {}).get("name") == "muon":
                raise UserError(
                    f"{section}.{key}: 'muon' needs whole matrices, and {count} processes hold a part each; use adamw"
                )
    if "distill" in used and any(part.get("r1", 0) for part in bound(spec["loss"])):
        raise UserError("loss: a GAN's r1 penalty differentiates twice, which sharded weights do not allow; set r1: 0")


def _check_sampling(spec: Spec, world: build.World) -> None:
    """The student's input and sampler and the teacher's sampler are what this student and the stages can use."""
    sampling, few = spec["teacher_sampling"]["name"], spec["student.sampler"]["name"]
    causal = build.student_rule(spec).causal
    if getattr(build.student_input(spec), "streams", False) and not causal:
        raise UserError(f"student.input: '{spec['student.input']['name']}' streams, and student.causal is false")
    fewest = min(len(build.student_rule(spec).blocks(shape[0])) for shape in _shapes(world))
    given = max(part.get("given_blocks", 0) for part in bound(spec["student.input"]))
    if given >= fewest:
        raise UserError(f"student.input: given_blocks must be below the {fewest} blocks of a clip, got {given}")
    if "times" not in registry.find("sampler", few).signature.parameters:
        raise UserError(f"student.sampler: '{few}' does not take the student's times")
    sampler = build.construct(spec["student.sampler"], times=build.student_times(spec))
    if causal and not hasattr(sampler, "stream"):
        raise UserError(f"student.sampler: '{few}' does not stream, as a causal student must")
    if causal:
        build.stream_cache(spec["student.cache"], build.causal_rule(spec), world.latent_shape[0])
    if hasattr(sampler, "stream") and not causal:
        raise UserError(f"student.sampler: '{few}' streams, and student.causal is false; use few_step")
    build.construct(spec["teacher_sampling"])
    if not isinstance(spec["teacher_sampling"].get("steps"), int):
        raise UserError("teacher_sampling.steps: expected a count, by which the teacher's samples are named")
    if not hasattr(build.teacher_sampler(spec), "times"):
        raise UserError(f"teacher_sampling: '{sampling}' does not tell its times, at which pairs are taken")
    if spec["evaluation.rollout_samples"] > spec["evaluation.samples"]:
        raise UserError("evaluation.rollout_samples: at most evaluation.samples, whose captions they take")

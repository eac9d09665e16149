"""From a validated spec to objects: networks, masks, samplers, and where their weights are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from causvid import schedule
from causvid.attention.cache import KVCache
from causvid.attention.kernels import Kernel
from causvid.attention.masks import Bidirectional, BlockCausal, Rule
from causvid.data.trajectories import Trajectories
from causvid.errors import UserError
from causvid.models import wan_files
from causvid.models.dit import VideoDiT
from causvid.models.layouts import fill, same, shapes_of
from causvid.models.wan import Size
from causvid.spec import Spec, complete, experiments_folder, flat
from causvid.tensor_files import open_tensors
from causvid.validate import Bound
from causvid.world import World, construct, device, weights_folder

__all__ = ["World", "construct", "device"]  # used through this module
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
Ready = Callable[[nn.Module], nn.Module]


def causal_rule(spec: Spec) -> Rule:
    """The causal mask of the spec."""
    return construct(spec["causal.mask"])


def teacher_rule(spec: Spec) -> Rule:
    """What the teacher sees."""
    return construct(spec["teacher"]).mask(causal_rule(spec))


def teacher_reads(spec: Spec) -> tuple[str, ...]:
    """Spec paths that a many-step network of the spec's kind depends on; the causal mask only where it sees by it."""
    seen = ("causal",) if teacher_rule(spec).causal else ("causal.position", "causal.kernel")
    return ("world", "model", "teacher", *seen)


def student_rule(spec: Spec) -> Rule:
    """What the student sees: the causal mask, or everything, whatever the teacher sees."""
    return causal_rule(spec) if spec["student.causal"] else Bidirectional()


def teacher_sampler(spec: Spec, steps: int | None = None) -> Any:
    """The many-step sampler of the spec, by default with its own number of steps."""
    options = spec["teacher_sampling"]
    return construct(options if steps is None else Bound(options.group, {**options, "steps": steps}))


def student_input(spec: Spec) -> Any:
    """What the student is trained on; one that streams commits its context when the student's sampler does."""
    return construct(spec["student.input"], context_t=spec["student.sampler"].get("context_t", 0.0))


def session_sampler(spec: Spec) -> Any:
    """The student's sampler, for sessions: they make a block, and then the next.

    Raises:
        UserError: it makes several at once.
    """
    sampler = construct(spec["student.sampler"], times=student_times(spec))
    if getattr(sampler, "window_blocks", 1) != 1:
        raise UserError(
            "student.sampler.window_blocks: a session may be steered at every block, so it makes one at a time; set "
            f"it to 1, not {sampler.window_blocks}"
        )
    return sampler


def stream_cache(policy: Bound, mask: Rule, frames: int, first_block_frames: int | None = None) -> KVCache:
    """An empty cache under a policy, for a network that was trained under ``mask`` on clips of ``frames`` latents.

    Args:
        first_block_frames: frames of the first block, where it is not that of training.

    Raises:
        UserError: the policy does not fit the mask.
    """
    made = construct(policy)
    try:
        rule = made.rule(mask, frames)
        if first_block_frames is not None:
            if not isinstance(rule, BlockCausal):
                raise ValueError(f"mask '{type(rule).__name__}' has no first block of another size")
            rule = replace(rule, first_block_frames=first_block_frames)
    except ValueError as error:
        raise UserError(f"cache '{policy['name']}': {error}") from error
    return KVCache(rule, position=made.place())


def train_stream_mismatch(spec: Spec, frames: int) -> str:
    """How streams of a causal student differ from its training, in words; empty where they do not."""
    if not spec["student.causal"]:
        return ""
    mask, position = causal_rule(spec), construct(spec["causal.position"])
    cache = stream_cache(spec["student.cache"], mask, frames)
    frame = torch.arange(10 * frames)
    query, key = frame[:, None], frame[None]  # by what they say: a rule has more than one spelling
    same = torch.equal(mask.sees(query, key), cache.rule.sees(query, key))
    differ = [] if same else [f"trained under {mask}, streams under {cache.rule}"]
    if cache.position not in (None, position):
        differ.append(f"trained with {position} positions, streams with {cache.position}")
    return "; ".join(differ)


def network(spec: Spec, world: World, mask: Rule, kernel: Kernel | None = None, model: Bound | None = None) -> VideoDiT:
    """The spec's network under a mask, with fresh weights from the global seed.

    Args:
        kernel: default the spec's.
        model: geometry; default the spec's ``model``.

    Raises:
        UserError: geometry, mask, positions and kernel do not fit together.
    """
    return construct(
        model or spec["model"],
        channels=world.latent_shape[1],
        text_dim=world.text_encoder.dim,
        mask=mask,
        position=construct(spec["causal.position"]),
        kernel=kernel or construct(spec["causal.kernel"]),
        precision=PRECISIONS[spec["precision"]],
    )


def size_of(world: World, model: Bound) -> Size:
    """The geometry of a model in a world, as one of Wan2.1's kind."""
    known = {f.name for f in fields(Size)}
    options = {key: value for key, value in model.items() if key in known}
    return Size(**options, channels=world.latent_shape[1], text_dim=world.text_encoder.dim)


def load_network(
    spec: Spec, world: World, mask: Rule, path: Path, ready: Ready | None = None, model: Bound | None = None
) -> VideoDiT:
    """A network with the weights of a file, on the world's device, in fp32.

    It is built without memory and filled tensor by tensor, so a large one needs little beside its own weights.

    Args:
        path: a safetensors file, whose place an index and its shards may take.
        ready: what is done to the network before it is filled, such as sharding it.
        model: geometry; default the spec's ``model``.

    Raises:
        UserError: the file is damaged or does not fit.
    """
    with torch.device("meta"):
        empty = network(spec, world, mask, model=model)
    links = same(shapes_of(empty))
    files = open_tensors(path) if path.is_file() else open_tensors(path.parent, path.stem)
    filled = fill(ready(empty) if ready else empty, links, files, "the model of this spec", torch.float32, world.device)
    return cast(VideoDiT, filled.eval())


def shipped_teacher(spec: Spec, kind: str | None = None) -> Path:
    """The trained teacher that ships for this world and a kind, by default the spec's: the one whose record agrees.

    Raises:
        UserError: none ships, or what the records say they were made for is not what the spec describes.
    """
    world, kind = spec["world.dataset"]["name"], str(kind or spec["teacher"]["name"])
    places = sorted((experiments_folder() / "teachers").glob(f"*/{kind}.safetensors"))
    made = {path: _made(spec, kind, path.with_suffix(".json")) for path in places}
    made = {path: values for path, values in made.items() if values["world"]["dataset"]["name"] == world}
    if not made:
        raise UserError(
            f"no trained '{kind}' teacher ships for world '{world}' (looked at {', '.join(map(str, places)) or 'none'}"
            "); train one with teacher_training.weights=train"
        )
    differences = {path: _differences(spec, values) for path, values in made.items()}
    nearest = min(differences, key=lambda path: len(differences[path]))
    if differences[nearest]:
        raise UserError(
            f"the shipped '{kind}' teacher was trained for another spec: {'; '.join(differences[nearest])}. Change the "
            "spec back, or train one with teacher_training.weights=train"
        )
    return nearest


def _made(spec: Spec, kind: str, record: Path) -> dict[str, Any]:
    """What a shipped teacher was trained for; shapes that fit prove nothing."""
    sees = construct(Bound("teacher", {"name": kind})).mask(causal_rule(spec))
    sections = ("world", "model", *(["causal"] if sees.causal else []))
    try:
        values = json.loads(record.read_text())["values"]
        made = complete({name: values[name] for name in sections}, str(record))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record}, the record of a shipped teacher, does not say what it was trained for ({error!r}); reinstall, "
            "or train one with teacher_training.weights=train"
        ) from error
    return {name: made[name] for name in sections}


def _differences(spec: Spec, made: dict[str, Any]) -> list[str]:
    """Where the spec is not what a teacher was made for, but for the kernel: all give the same numbers."""
    left, right = flat(made), flat({name: spec[name] for name in made})
    return [
        f"{key} is {right.get(key)}, the teacher's {left.get(key)}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key) and not key.startswith("causal.kernel")
    ]


def teacher_files(spec: Spec) -> tuple[Path, ...]:
    """Shipped weights that the spec's teacher is taken from, or that its training starts from, and the data's digest.

    Raises:
        UserError: weights that the spec asks for do not ship.
    """
    data = tuple(getattr(construct(spec["world.dataset"]), "files", ()))
    if spec["teacher_training.weights"] == "shipped":
        return (shipped_teacher(spec), *data)
    if spec["teacher_training.weights"] == "given":
        encoder = construct(spec["world.text_encoder"], weights=weights_folder(spec), vocabulary=())
        place = spec["runtime.teacher"] or spec["runtime.weights"]
        return (*_given_files(place), *getattr(encoder, "sources", ()), *data)
    start = spec["teacher_training.start"]
    return (shipped_teacher(spec, start), *data) if start else data


def _given_files(place: str | None) -> tuple[Path, ...]:
    """The files that given weights are read from; none as long as nothing says where they are."""
    return wan_files.find(Path(place)).files.sources if place else ()


def real_score_files(spec: Spec) -> tuple[Path, ...]:
    """The files of another network for the real score."""
    return _given_files(spec["runtime.real_score"])


def student_times(spec: Spec) -> list[float]:
    """Times of the student's steps, descending from 1, without the final 0.

    Raises:
        UserError: times that are not a descending list within (0, 1].
    """
    try:
        times = schedule.grid(spec["student.steps"], spec["student.shift"])[:-1].tolist()
    except ValueError as error:
        raise UserError(f"student.steps: {error}") from error
    if times[0] != 1.0:
        raise UserError(f"student.steps: a student starts from pure noise, t = 1; the first time is {times[0]}")
    return times


def discriminator(spec: Spec) -> torch.nn.Module:
    """The discriminator of the spec, on its network's features."""
    model = spec["real_score"] if spec["fake_score"] == "real_score" else spec["model"]
    return construct(spec["distill.discriminator"], dim=model["dim"], layers=model["layers"])


def stored_times(spec: Spec) -> torch.Tensor:
    """Times of the trajectory states that ``ode_pairs`` stores: those in ``keep`` and of its step counts, and 0.

    Raises:
        UserError: a step count whose times are not on the solver's grid.
    """
    steps = spec["ode_pairs.steps"]
    times = teacher_sampler(spec, steps).times
    indices: set[int] = {steps}
    for kept in spec["ode_pairs.keep"]:
        if kept < 1:
            indices.update(schedule.state_indices(times, [kept]))
            continue
        if kept % 1 or steps % kept:
            raise UserError(
                f"ode_pairs.keep: {kept} does not divide ode_pairs.steps = {steps}, so its times are not solved"
            )
        indices.update(range(0, steps, steps // int(kept)))
    return times[sorted(indices)]


def stored_pairs(spec: Spec, world: World, path: Path | None = None) -> Trajectories:
    """The trajectories of a store, by default that of ``ode_init.pairs``, at the times of the spec's student.

    Raises:
        UserError: it holds none that fit the spec.
    """
    expected = {"codec": spec["world.codec"], "text_encoder": spec["world.text_encoder"]}
    times = [*student_times(spec), 0.0]
    return Trajectories(str(path or spec["ode_init.pairs"]), times, world.latent_shape, expected, "ode_init.pairs")

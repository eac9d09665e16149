"""From a validated spec to objects: the only place that calls constructors by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from causvid import registry, schedule, weights
from causvid.attention.kernels import Kernel
from causvid.attention.masks import Bidirectional, Rule
from causvid.data.trajectories import Trajectories
from causvid.errors import UserError
from causvid.models.dit import VideoDiT
from causvid.spec import Spec, complete, experiments_folder, flat
from causvid.types import Text
from causvid.validate import Bound


def construct(bound: Bound, **supplied: Any) -> Any:
    """The component, with its options; components among them are constructed too.

    Args:
        bound: a validated component of a spec.
        supplied: arguments that come from elsewhere, where the spec leaves them open; those that the component does
            not take are left out.

    Raises:
        UserError: the component refuses its options.
    """
    found = registry.find(bound.group, bound["name"])
    parameters = found.signature.parameters
    options = {key: _construct_nested(value) for key, value in bound.items() if key != "name"}
    options.update({k: v for k, v in supplied.items() if k in parameters and options.get(k) is None})
    try:
        return found.target(**options)
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{bound.group} '{bound['name']}': {error}") from error


def _construct_nested(value: Any) -> Any:
    if isinstance(value, Bound):
        return construct(value)
    if isinstance(value, list):
        return [_construct_nested(item) for item in value]
    return value


class World:
    """Dataset, codec and text encoder of a spec, and the geometry that follows from them.

    Attributes:
        latent_shape: (f, c, h, w) of a clip's latents.
    """

    def __init__(self, spec: Spec, **supplied: Any) -> None:
        """Build a spec's world; ``supplied`` is what codec and text encoder take from outside, as their weights."""
        codec, text_encoder = spec["world.codec"], spec["world.text_encoder"]
        self.dataset = construct(spec["world.dataset"], codec=codec, text_encoder=text_encoder)
        self.codec = construct(codec, **supplied)
        self.text_encoder = construct(text_encoder, vocabulary=self.dataset.vocabulary, **supplied)
        self.negative_prompt: str = spec["world.negative_prompt"]
        # Some datasets hold latents already, and the embeddings of their captions.
        self.holds_latents = hasattr(self.dataset, "latents")
        if self.holds_latents:
            self.latent_shape = self.dataset.latent_shape
            return
        frames, channels, height, width = self.dataset.pixel_shape
        try:
            latent_frames = self.codec.latent_frames(frames)
        except ValueError as error:
            raise UserError(f"world.dataset and world.codec do not fit: {error}") from error
        scale = self.codec.scale
        if height % scale or width % scale:
            raise UserError(f"world.codec: height and width must be multiples of {scale}, got {height}x{width}")
        self.latent_shape = (latent_frames, self.codec.latent_channels(channels), height // scale, width // scale)

    def batch(self, indices: Sequence[int], split: str = "train") -> tuple[torch.Tensor, Text, Text]:
        """(latents ``b f c h w``, text, the empty prompt as often) of the given samples."""
        latents, captions, text = self._read(indices, split)
        text = self.text_encoder.encode(captions) if text is None else text
        return latents, text, self.unconditional(len(captions))

    def prompts(self, indices: Sequence[int], split: str = "train") -> tuple[list[str], Text, Text]:
        """(captions, text, the empty prompt as often) of the given samples."""
        _, captions, text = self._read(indices, split)
        text = self.text_encoder.encode(captions) if text is None else text
        return captions, text, self.unconditional(len(captions))

    def _read(self, indices: Sequence[int], split: str) -> tuple[torch.Tensor, list[str], Text | None]:
        if self.holds_latents:
            return self.dataset.latents(indices, split)
        pixels, captions = self.dataset.batch(indices, split)
        return self.codec.encode(pixels), captions, None

    def pixels(self, indices: Sequence[int], split: str = "train") -> tuple[torch.Tensor, list[str]]:
        """Real videos ``b f c h w``, decoded where the dataset holds latents, and their captions."""
        if self.holds_latents:
            latents, captions, _ = self.dataset.latents(indices, split)
            return self.codec.decode(latents), captions
        return self.dataset.batch(indices, split)

    def unconditional(self, count: int) -> Text:
        stored = self.dataset.unconditional() if self.holds_latents else None
        if stored is None:
            return self.text_encoder.encode([self.negative_prompt] * count)
        return Text(stored.expand(count, -1, -1))


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


def network(spec: Spec, world: World, mask: Rule, kernel: Kernel | None = None) -> VideoDiT:
    """The spec's network under a mask, with fresh weights from the global seed; the kernel is the spec's by default.

    Raises:
        UserError: geometry, mask, positions and kernel do not fit together.
    """
    return construct(
        spec["model"],
        channels=world.latent_shape[1],
        text_dim=world.text_encoder.dim,
        mask=mask,
        position=construct(spec["causal.position"]),
        kernel=kernel or construct(spec["causal.kernel"]),
    )


def load_network(spec: Spec, world: World, mask: Rule, path: Path) -> VideoDiT:
    """A network with the weights of a file.

    Raises:
        UserError: the file is damaged or does not fit.
    """
    model = network(spec, world, mask)
    weights.load_into(model, weights.read_tensors(path)[0], str(path))
    return model.eval()


def shipped_teacher(spec: Spec, kind: str | None = None) -> Path:
    """The trained teacher that ships for this world and a kind, by default the spec's.

    Raises:
        UserError: none ships, or what its record says it was made for is not what the spec describes.
    """
    world, kind = spec["world.dataset"]["name"], str(kind or spec["teacher"]["name"])
    path = experiments_folder() / "teachers" / world / f"{kind}.safetensors"
    if not path.is_file():
        raise UserError(
            f"no trained '{kind}' teacher ships for world '{world}' (looked for {path}); train one with "
            "teacher_training.weights=train"
        )
    _check_record(spec, kind, path.with_suffix(".json"))
    return path


def _check_record(spec: Spec, kind: str, path: Path) -> None:
    """Refuse weights that were trained for something else; shapes that fit prove nothing.

    The kernel is left out: all give the same numbers.
    """
    sees = construct(Bound("teacher", {"name": kind})).mask(causal_rule(spec))
    sections = ("world", "model", *(["causal"] if sees.causal else []))
    try:
        made = complete({name: json.loads(path.read_text())["values"][name] for name in sections}, str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}, the record of a shipped teacher, does not say what it was trained for ({error!r}); reinstall, or "
            "train one with teacher_training.weights=train"
        ) from error
    left, right = (flat({name: each[name] for name in sections}) for each in (made, spec))
    differences = [
        f"{key} is {right.get(key)}, the teacher's {left.get(key)}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key) and not key.startswith("causal.kernel")
    ]
    if differences:
        raise UserError(
            f"the shipped '{kind}' teacher was trained for another spec: {'; '.join(differences)}. Change the spec "
            "back, or train one with teacher_training.weights=train"
        )


def teacher_files(spec: Spec) -> tuple[Path, ...]:
    """Shipped weights that the spec's teacher is taken from, or that its training starts from, and the data's digest.

    Raises:
        UserError: weights that the spec asks for do not ship.
    """
    data = tuple(getattr(construct(spec["world.dataset"]), "files", ()))
    if spec["teacher_training.weights"] == "shipped":
        return (shipped_teacher(spec), *data)
    if spec["teacher_training.weights"] == "given":
        return data
    start = spec["teacher_training.start"]
    return (shipped_teacher(spec, start), *data) if start else data


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
    return construct(spec["distill.discriminator"], dim=spec["model"]["dim"], layers=spec["model"]["layers"])


def stored_times(spec: Spec) -> torch.Tensor:
    """Times of the trajectory states that ``ode_pairs`` stores: those of every step count in ``keep``, and 0.

    Raises:
        UserError: a step count whose times are not on the solver's grid.
    """
    steps = spec["ode_pairs.steps"]
    indices: set[int] = {steps}
    for count in spec["ode_pairs.keep"]:
        if count < 1 or steps % count:
            raise UserError(
                f"ode_pairs.keep: {count} does not divide ode_pairs.steps = {steps}, so its times are not solved"
            )
        indices.update(range(0, steps, steps // count))
    return teacher_sampler(spec, steps).times[sorted(indices)]


def stored_pairs(spec: Spec, world: World, path: Path | None = None) -> Trajectories:
    """The trajectories of a store, by default that of ``ode_init.pairs``, at the times of the spec's student.

    Raises:
        UserError: it holds none that fit the spec.
    """
    expected = {"codec": spec["world.codec"], "text_encoder": spec["world.text_encoder"]}
    times = [*student_times(spec), 0.0]
    return Trajectories(str(path or spec["ode_init.pairs"]), times, world.latent_shape, expected, "ode_init.pairs")

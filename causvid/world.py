"""Components made from their validated options, and a spec's world: dataset, codec and text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from causvid import ranks, registry, weights
from causvid.errors import UserError
from causvid.spec import Spec
from causvid.types import Edits, Text
from causvid.validate import Bound


def construct(bound: Bound, **supplied: Any) -> Any:
    """The component, with its options; components among them are constructed too.

    Args:
        bound: a validated component of a spec.
        supplied: arguments that come from elsewhere, where the spec leaves them open; those that the component does
            not take are left out. Nested components of the same group get them, too.

    Raises:
        UserError: the component refuses its options.
    """
    found = registry.find(bound.group, bound["name"])
    parameters = found.signature.parameters
    nested = partial(_construct_nested, group=bound.group, supplied=supplied)
    options = {key: nested(value) for key, value in bound.items() if key != "name"}
    options.update({k: v for k, v in supplied.items() if k in parameters and options.get(k) is None})
    try:
        return found.target(**options)
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{bound.group} '{bound['name']}': {error}") from error


def _construct_nested(value: Any, group: str, supplied: Mapping[str, Any]) -> Any:
    if isinstance(value, Bound):
        return construct(value, **(supplied if value.group == group else {}))
    if isinstance(value, list):
        return [_construct_nested(item, group, supplied) for item in value]
    return value


def weights_folder(spec: Spec) -> Path | None:
    """Where codec and text encoder find their weights, where the spec says so."""
    return Path(spec["runtime.weights"]) if spec["runtime.weights"] else None


def device(spec: Spec) -> torch.device:
    """The device of ``runtime.device``: of this process, where several train together.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    return ranks.start(existing(spec["runtime.device"], "runtime.device"))


def existing(name: str, asked: str) -> torch.device:
    """The device of a name, if it is here; ``auto`` is an accelerator where there is one.

    Args:
        asked: the key or option that gave the name, for the message.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{asked}: torch knows no '{name}'; accepted: auto, cpu, or one of torch's") from error
    there = accelerator.type if accelerator else None
    if found.type not in ("cpu", there) or (found.index or 0) >= (torch.accelerator.device_count() if there else 1):
        have = f"{there}, {torch.accelerator.device_count()} of them" if there else "no accelerator"
        raise UserError(f"{asked}: there is no '{name}' here; this machine has {have}. 'auto' takes what is there")
    return found


class World:
    """Dataset, codec and text encoder of a spec, and the geometry that follows from them.

    Attributes:
        latent_shape: (f, c, h, w) of a clip's latents.
    """

    def __init__(self, spec: Spec, **supplied: Any) -> None:
        """Build a spec's world.

        Args:
            supplied: what codec and text encoder take from outside, by default what ``runtime`` says: ``weights``,
                ``device``, and a ``store`` of embeddings.
        """
        codec, text_encoder = spec["world.codec"], spec["world.text_encoder"]
        self.device = torch.device(supplied.get("device") or device(spec))
        outside = {"weights": weights_folder(spec), "store": weights.cache_folder() / "text"}
        supplied = {**outside, **supplied, "device": self.device}
        self.dataset = construct(spec["world.dataset"], codec=codec, text_encoder=text_encoder)
        self.codec = construct(codec, **supplied)
        self.text_encoder = construct(text_encoder, vocabulary=self.dataset.vocabulary, **supplied)
        self.negative_prompt: str = spec["world.negative_prompt"]
        self._unconditional: Text | None = None
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
        down, across = (scale * side for side in spec["model"].get("patch", (1, 1)))
        if height % down or width % across:
            units = f"{down}" if down == across else f"{down} and of {across}"
            raise UserError(
                f"world.dataset: height and width must be multiples of {units}, got {height}x{width}: a latent of "
                f"codec '{codec['name']}' is {scale} pixels wide, and a token of the network {down // scale} x "
                f"{across // scale} latents"
            )
        self.latent_shape = (latent_frames, self.codec.latent_channels(channels), height // scale, width // scale)

    def batch(self, indices: Sequence[int], split: str = "train") -> tuple[torch.Tensor, Text, Text]:
        """(latents ``b f c h w``, text, the empty prompt as often) of the given samples."""
        latents, _, text = self._read(indices, split)
        return latents.to(self.device), text.to(self.device), self.unconditional(len(text))

    def prompts(self, indices: Sequence[int], split: str = "train") -> tuple[list[str], Text, Text]:
        """(captions, text, the empty prompt as often) of the given samples."""
        _, captions, text = self._read(indices, split)
        return captions, text.to(self.device), self.unconditional(len(captions))

    def edits(self, indices: Sequence[int], blocks: Sequence[tuple[int, int]], split: str = "train") -> Edits:
        """Clips that a prompt changes: from one of the blocks [start, stop) on, or as a whole.

        Raises:
            UserError: the dataset makes none, or clips have one block alone.
        """
        if not hasattr(self.dataset, "edits"):
            raise UserError(f"world.dataset: '{type(self.dataset).__name__}' makes no clips that a prompt changes")
        if len(blocks) < 2:
            raise UserError("causal.mask: a prompt that changes in mid-stream needs clips of two blocks or more")
        first = {self.codec.pixel_frames(start): start for start, _ in blocks[1:]}
        clips = self.dataset.edits(indices, list(first), split)
        start = torch.tensor([first.get(frame, 0) for frame in clips.start.tolist()], device=self.device)
        source, target = (self.codec.encode(each).to(self.device) for each in (clips.source, clips.target))
        before, after = (self.text_encoder.encode(each).to(self.device) for each in (clips.before, clips.after))
        return Edits(source, target, before, after, start)

    def _read(self, indices: Sequence[int], split: str) -> tuple[torch.Tensor, list[str], Text]:
        if self.holds_latents:
            latents, captions, text = self.dataset.latents(indices, split)
        else:
            pixels, captions = self.dataset.batch(indices, split)
            latents, text = self.codec.encode(pixels), None
        return latents, captions, self.text_encoder.encode(captions) if text is None else text

    def ready_text(self) -> None:
        """Have all embeddings that training will read, and let go of the encoder: before any network is loaded.

        One process computes what is neither in the data nor in the store of embeddings; the others wait and read.
        """
        if ranks.first() and hasattr(self.text_encoder, "release"):
            reader = self.dataset.reader if self.holds_latents else None
            if reader is not None and "text" not in reader.header["fields"]:
                for entry in reader.entries.values():
                    self.text_encoder.encode([str(entry.facts.get("caption", ""))])
            self.unconditional(1)
            self.text_encoder.release()
        ranks.wait()

    def pixels(self, indices: Sequence[int], split: str = "train") -> tuple[torch.Tensor, list[str]]:
        """Real videos ``b f c h w``, decoded where the dataset holds latents, and their captions."""
        if self.holds_latents:
            latents, captions, _ = self.dataset.latents(indices, split)
            return self.codec.decode(latents).cpu(), captions
        return self.dataset.batch(indices, split)

    def unconditional(self, count: int) -> Text:
        """What guidance leads away from, ``count`` times: the negative prompt, or the data's own empty one."""
        if self._unconditional is None:
            # A store holds the embeddings of the empty prompt, and of no other.
            stored = self.dataset.unconditional() if self.holds_latents and not self.negative_prompt else None
            text = self.text_encoder.encode([self.negative_prompt]) if stored is None else Text(stored[None])
            self._unconditional = text = text.to(self.device)
        else:
            text = self._unconditional
        return Text(text.embeddings.expand(count, -1, -1))

"""Regression on clips whose prompt changes in mid-stream: what follows shows the text and keeps the rest."""

from __future__ import annotations

import torch

from causvid import ranks, schedule
from causvid.registry import register
from causvid.types import LossOutput, Scene, Text


@register("loss", "edits")
class Edits:
    """Regress x0 of the blocks that follow a change of the prompt, from clean context: there the answer is known.

    In all other training text and context agree, so nothing says which to believe where a session changes its prompt,
    or restyles a video. Here they differ: earlier blocks have the earlier text, as under a session's policy ``keep``.
    Part of the blocks take their noise over the unedited clip, which is what restyling starts from.

    Frames before the change do not count, nor does the first block where only the text says what is in it: many
    videos fit, and regression would blur them.

    Args:
        from_noise: share of blocks at t = 1, where a session decides what a block shows.
        restyle: share of the other blocks that begin as the unedited clip, where it moves as the edited one.
        shift: of the other times.
    """

    players = ("student",)
    needs = ("edits",)

    def __init__(self, from_noise: float = 0.4, restyle: float = 0.5, shift: float = 1.0) -> None:
        for name, value in (("from_noise", from_noise), ("restyle", restyle)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        self.from_noise, self.restyle, self.shift = from_noise, restyle, shift

    def __call__(self, player: str, scene: Scene) -> LossOutput:
        """Mean squared error over the frames that count."""
        if scene.edit is None:
            raise ValueError("this loss needs clips whose prompt changes, and the stage has none")
        clips, draw, blocks = scene.edit(), scene.draw, len(scene.blocks)
        frame = torch.arange(clips.edited.shape[1], device=clips.start.device)
        after = frame >= clips.start[:, None]
        drawn = schedule.shift(draw.uniform("edit_t", blocks), self.shift)
        t = scene.per_block(torch.where(draw.uniform("edit_from_noise", blocks) < self.from_noise, 1.0, drawn))
        restyled = scene.per_block(draw.uniform("edit_restyle", blocks) < self.restyle)
        restyled = restyled & after & clips.restyled[:, None] & (t < 1)
        seen = torch.where(restyled[:, :, None, None, None], clips.unedited, clips.edited)
        x_t = schedule.add_noise(seen, draw.normal("edit_noise", *seen.shape[1:]), t)
        embeddings = (each.embeddings[:, None] for each in (clips.after, clips.before))
        text = Text(torch.where(after[:, :, None, None], *embeddings))
        output = scene.nets["student"](x_t, t, text, context=clips.edited)
        error = (output.x0 - clips.edited).pow(2).mean((2, 3, 4))
        counts = after & (restyled | (frame >= scene.blocks[0][1]))
        return LossOutput(ranks.weighted_mean(error, counts.to(error.dtype)))

"""Regression on clips that a prompt changes: what follows shows the text and keeps the rest."""

from __future__ import annotations

import torch

from causvid import ranks, schedule
from causvid.registry import register
from causvid.types import LossOutput, Scene, Text


@register("loss", "edits")
class Edits:
    """Regress x0 of the blocks that a prompt changes, from clean context: there the right answer is known.

    In all other training the text agrees with the context and with what noise lies over, so nothing says which to
    believe where a session changes its prompt or restyles a video. Here they differ. In clips that change in
    mid-stream, earlier blocks have the earlier text, as under a session's policy ``keep``. In clips that are restyled
    as a whole, noise lies over the clip as it was.

    Args:
        from_noise: share of blocks at t = 1 in clips that change in mid-stream: there a block's content is decided.
            Where only the text says what a first block shows, many videos fit, and regression would blur them.
        shift: of all other times, which are uniform before it: a session may restyle at any strength.
    """

    players = ("student",)
    needs = ("edits",)

    def __init__(self, from_noise: float = 0.4, shift: float = 1.0) -> None:
        if not 0 <= from_noise <= 1:
            raise ValueError(f"from_noise must be in [0, 1], got {from_noise}")
        self.from_noise, self.shift = from_noise, shift

    def __call__(self, player: str, scene: Scene) -> LossOutput:
        """Mean squared error over the frames from the change on."""
        if scene.edit is None:
            raise ValueError("this loss needs clips that a prompt changes, and the stage has none")
        clips, draw, blocks = scene.edit(), scene.draw, len(scene.blocks)
        start = clips.start[:, None]
        u = draw.uniform("edit_t", blocks)
        u = torch.where((draw.uniform("edit_from_noise", blocks) < self.from_noise) & (start > 0), 1.0, u)
        t = scene.per_block(schedule.shift(u, self.shift))
        x_t = schedule.add_noise(clips.source, draw.normal("edit_noise", *clips.source.shape[1:]), t)
        after = torch.arange(t.shape[1], device=t.device) >= start
        embeddings = (each.embeddings[:, None] for each in (clips.after, clips.before))
        text = Text(torch.where(after[:, :, None, None], *embeddings))
        output = scene.nets["student"](x_t, t, text, context=clips.target)
        error = (output.x0 - clips.target).pow(2).mean((2, 3, 4))
        return LossOutput(ranks.weighted_mean(error, after.to(error.dtype)))

"""Kinds of teacher: what a many-step network sees, and how its training times are drawn.

A kind holds no numbers: guidance and steps are in ``teacher_sampling``, and weights are looked up by world and kind, so
that ``teacher: causal`` is the whole ablation.
"""

from __future__ import annotations

from typing import Literal

from causvid.attention.masks import Bidirectional, Rule
from causvid.registry import register


@register("teacher", "bidirectional")
class BidirectionalTeacher:
    """Sees the whole clip, at one time for all frames: the paper's teacher."""

    times: Literal["shared", "per_block"] = "shared"

    def mask(self, causal: Rule) -> Rule:
        return Bidirectional()


@register("teacher", "causal")
class CausalTeacher:
    """Sees by the causal mask, with a time per block (diffusion forcing, arXiv 2407.01392)."""

    times: Literal["shared", "per_block"] = "per_block"

    def mask(self, causal: Rule) -> Rule:
        return causal

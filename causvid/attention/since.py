"""The visibility of a stream that forgot what was before, as after ``Session.prompt(text, "cut")``.

Apart from masks.py, whose rules a spec names: no training and no sampling depends on this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from causvid.attention.masks import BlockCausal, Rule


@dataclass(frozen=True)
class Since(Rule):
    """The rule of a stream that begins anew: frames before ``first`` are not seen, and sinks are those from it on.

    Attributes:
        rule: the rule of the stream that it was.
        first: frame with which the next block begins.
    """

    rule: Rule
    first: int

    def block_of(self, frame: Any) -> Any:
        return self.rule.block_of(frame)

    def block_range(self, block: int) -> tuple[int, int]:
        return self.rule.block_range(block)

    def sees(self, query: Any, key: Any) -> Any:
        rule = self.rule
        if isinstance(rule, BlockCausal):  # what begins here is a whole block, whatever the first of all was
            rule = replace(rule, first_block_frames=None)
        return (key >= self.first) & rule.sees(query - self.first, key - self.first)

"""What a network can do while it trains: the spec's metrics on a few held-out pairs, for its curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from causvid import build, ranks
from causvid.randomness import Draw
from causvid.registry import register
from causvid.runs import Context
from causvid.stages.evaluate import judges_of
from causvid.stages.sample import SPLIT, from_bytes, held_out, student_with
from causvid.types import Text


@register("monitor", "held_out")
class HeldOut:
    """Samples the network as it is judged at the end, and logs the mean of every metric as ``held_out.NAME``.

    The teacher is sampled by ``teacher_sampling``, a student by its few steps. Nothing that trains is touched: weights
    come out the same with a monitor and without. 'causvid plan' does not count it.

    Args:
        times: how often, evenly, beside the first step.
        samples: number of captions; at most ``evaluation.samples``.

    Raises:
        ValueError: not at least one time and one caption.
    """

    def __init__(self, context: Context, total: int, times: int = 8, samples: int = 32) -> None:
        if times < 1 or samples < 1:
            raise ValueError(f"needs at least one time and one caption, got {times} and {samples}")
        self.context, self.spec, self.total = context, context.spec, total
        self.every = -(-total // times)
        self.samples = range(min(samples, self.spec["evaluation.samples"]))

    def due(self, step: int) -> bool:
        """Whether the network is judged after this step."""
        return step == 0 or (step + 1) % self.every == 0 or step + 1 == self.total

    def __call__(self, step: int, weights: Callable[[], Mapping[str, Tensor]]) -> dict[str, float]:
        """The metrics after a step that is due, else nothing.

        Args:
            weights: gives the weights as the stage would write them; called by all processes, whole in the first.
        """
        if not self.due(step):
            return {}
        whole = weights()
        return ranks.agreed(lambda: self._judged(whole))

    @cached_property
    def _world(self) -> build.World:
        return build.World(self.spec)

    @cached_property
    def _truth(self) -> tuple[list, list[str]]:
        """(judges, captions)."""
        pixels, captions = self._world.pixels(self.samples, SPLIT)
        return judges_of(self.spec["evaluation.metrics"], self._world, pixels, captions), captions

    def _judged(self, whole: Mapping[str, Tensor]) -> dict[str, float]:
        spec, world = self.spec, self._world
        teacher = self.context.folder.parent.name == "teacher"
        rule = build.teacher_rule(spec) if teacher else build.student_rule(spec)
        with torch.random.fork_rng(), torch.no_grad():  # building draws weights, which are replaced
            network = build.network(spec, world, rule).to(world.device).eval()
            network.load_state_dict(whole)
            sampler, student = build.teacher_sampler(spec), student_with(spec, world, network)

            def clips(text: Text, free: Text, draw: Draw) -> Tensor:
                if teacher:
                    return sampler(network, draw.normal("noise", *world.latent_shape), text, free).last
                return student(world.latent_shape, text, draw)

            videos = from_bytes(held_out(world, self.samples, clips))
        judges, captions = self._truth
        found = {name: value for judge in judges for name, value in judge(videos, captions).items() if value.ndim == 1}
        return {f"held_out.{name}": float(value.float().mean()) for name, value in found.items()}

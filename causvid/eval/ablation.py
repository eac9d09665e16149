"""Whether two arms of an ablation differ: paired, with training seeds first, through the whole aggregation.

Arms share their prompts, sampling seeds and initial noise, so they are compared prompt by prompt. Two trainings of one
spec differ too, and that difference is no effect: the first level of resampling is the training seed, the second the
prompts within their suite. Five training seeds or more give a verdict by bootstrap; two to four a t-interval over
seeds; with one there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from causvid.errors import UserError
from causvid.eval.statistics import Z95, t95
from causvid.randomness import key

SEEDS_FOR_VERDICT = 5
DRAWS = 10_000
POWER = 0.8
Verdict = Literal["better", "worse", "inconclusive", "under five seeds: no verdict", "one seed: no verdict"]

# Scores of an arm: suite -> dimension -> (training seeds, prompts). One suite's dimensions share its prompts.
Arm = Mapping[str, Mapping[str, Tensor]]
Statistic = Callable[[Mapping[str, Tensor]], Tensor]  # means by dimension, each (draws,) -> (draws,)


@dataclass(frozen=True)
class Difference:
    """Arm minus base in one measure. ``p`` is two-sided; NaN where one seed allows none."""

    name: str
    value: float
    low: float
    high: float
    p: float
    seeds: int
    verdict: Verdict

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "difference": self.value, "low": self.low, "high": self.high, "p": self.p,
                "seeds": self.seeds, "verdict": self.verdict}  # fmt: skip


def mean_of(dimension: str) -> Statistic:
    """The statistic that is one dimension's mean."""
    return lambda means: means[dimension]


def _check(arm: Arm, base: Arm) -> tuple[int, int]:
    """(seeds of the arm, seeds of the base).

    Raises:
        UserError: arms that do not share suites, dimensions and prompts, or a score that is not finite.
    """
    if {s: set(d) for s, d in arm.items()} != {s: set(d) for s, d in base.items()}:
        raise UserError("the arms are not judged in the same dimensions of the same suites, so they can't be paired")
    counts: list[set[int]] = [set(), set()]
    for suite in arm:
        prompts = set()
        for side, scores in enumerate((arm[suite], base[suite])):
            for values in scores.values():
                if values.ndim != 2 or 0 in values.shape or not bool(torch.isfinite(values).all()):
                    raise UserError(f"{suite}: scores must be finite and of every training seed and prompt")
                counts[side].add(values.shape[0])
                prompts.add(values.shape[1])
        if len(prompts) != 1:
            raise UserError(f"{suite}: the arms have {sorted(prompts)} prompts; they must be the same ones")
    if len(counts[0]) != 1 or len(counts[1]) != 1:
        raise UserError("every dimension must be judged for the same training seeds")
    return counts[0].pop(), counts[1].pop()


def _means(arm: Arm, seeds: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean of each dimension in each draw: ``seeds`` (draws, k) seed indices, ``weights`` suite -> (draws, prompts)."""
    out = {}
    for suite, scores in arm.items():
        for name, values in scores.items():
            per_seed = weights[suite] @ values.double().T  # draws, seeds
            out[name] = per_seed.gather(1, seeds).mean(1)
    return out


def _prompt_weights(arm: Arm, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Suite -> the weight of each prompt in each draw, (draws, prompts)."""
    weights = {}
    for suite, scores in arm.items():
        prompts = next(iter(scores.values())).shape[1]
        rows = torch.randint(prompts, (draws, prompts), generator=generator)
        counts = torch.zeros(draws, prompts, dtype=torch.float64)
        weights[suite] = counts.scatter_add_(1, rows, torch.ones_like(rows, dtype=torch.float64)) / prompts
    return weights


def bootstrap(arm: Arm, base: Arm, statistic: Statistic, draws: int = DRAWS, paired_seeds: bool = False) -> Tensor:
    """Bootstrap draws of the difference in a statistic, arm minus base, sorted.

    Training seeds of the arms are drawn apart (together where seed i of both shares what training draws:
    ``paired_seeds``), prompts together. The spread over k seeds is widened by sqrt(k / (k - 1)): resampling k values
    gives a variance that is too small by that.
    """
    k, m = _check(arm, base)
    if paired_seeds and k != m:
        raise UserError(f"paired seeds need as many in both arms, got {k} and {m}")
    generator = torch.Generator().manual_seed(key("ablation", k, m, draws))
    mine = torch.randint(k, (draws, k), generator=generator)
    other = mine if paired_seeds else torch.randint(m, (draws, m), generator=generator)
    weights = _prompt_weights(arm, draws, generator)
    drawn = statistic(_means(arm, mine, weights)) - statistic(_means(base, other, weights))
    centre = point(arm, base, statistic)
    least = min(k, m)
    widen = math.sqrt(least / (least - 1)) if least > 1 else 1.0
    return (centre + (drawn - centre) * widen).sort().values


def point(arm: Arm, base: Arm, statistic: Statistic) -> float:
    """The difference of the arms' statistics over all seeds and prompts."""
    values = []
    for each in (arm, base):
        means = {name: v.double().mean().reshape(1) for scores in each.values() for name, v in scores.items()}
        values.append(float(statistic(means)))
    return values[0] - values[1]


def per_seed(arm: Arm, statistic: Statistic) -> list[float]:
    """The statistic of each training seed."""
    means = {name: values.double().mean(1) for scores in arm.values() for name, values in scores.items()}
    return statistic(means).tolist()


def compare(name: str, arm: Arm, base: Arm, statistic: Statistic, draws: int = DRAWS) -> Difference:
    """The difference with its 95% interval, and "inconclusive" where that holds 0.

    Where it does not, five training seeds an arm make a verdict; fewer have the interval alone. That is the wider of
    the bootstrap's and Welch's t-interval over seeds, which knows how few seeds there are.
    """
    k, m = _check(arm, base)
    value = point(arm, base, statistic)
    if min(k, m) < 2:
        return Difference(name, value, math.nan, math.nan, math.nan, min(k, m), "one seed: no verdict")
    error, freedom = _welch(per_seed(arm, statistic), per_seed(base, statistic))
    half = t95(freedom) * error
    low, high, p = value - half, value + half, _t_p(value, error, freedom)
    # Few seeds that happen to score alike give a t-interval without width, which says nothing; prompts still differ.
    if min(k, m) >= SEEDS_FOR_VERDICT or error == 0:
        drawn = bootstrap(arm, base, statistic, draws)
        low = min(low, float(drawn[int(0.025 * len(drawn))]))
        high = max(high, float(drawn[int(0.975 * len(drawn)) - 1]))
        p = max(p, _tail(drawn, value))
    return Difference(name, value, low, high, p, min(k, m), _verdict(low, high, min(k, m)))


def _tail(drawn: Tensor, value: float) -> float:
    """Two-sided p of the draws; by the normal law where none crosses 0: Holm may ask for less than 1 in draws."""
    crossed = 2 * min(int((drawn <= 0).sum()), int((drawn >= 0).sum())) / len(drawn)
    if crossed:
        return min(1.0, crossed)
    deviation = float(drawn.std())
    beyond = 2 * float(torch.special.ndtr(torch.tensor(-abs(value) / deviation))) if deviation else 0.0
    return min(1 / len(drawn), beyond)


def _verdict(low: float, high: float, seeds: int) -> Verdict:
    if low <= 0 <= high:
        return "inconclusive"
    if seeds < SEEDS_FOR_VERDICT:
        return "under five seeds: no verdict"
    return "better" if low > 0 else "worse"


def _welch(first: Sequence[float], second: Sequence[float]) -> tuple[float, int]:
    """(standard error of the difference of means, degrees of freedom, rounded down)."""
    parts = []
    for values in (first, second):
        spread = torch.tensor(values, dtype=torch.float64).var(unbiased=True).item()
        parts.append((spread / len(values), len(values)))
    total = sum(part for part, _ in parts)
    if total == 0:
        return 0.0, min(len(first), len(second)) - 1
    return math.sqrt(total), max(1, int(total**2 / sum(part**2 / (count - 1) for part, count in parts)))


def _t_p(value: float, error: float, freedom: int) -> float:
    """Two-sided p of Student's t, by the trapezoid rule over its density (to about 1e-6)."""
    if error == 0:
        return 1.0 if value == 0 else 0.0
    end = math.atan(abs(value) / error / math.sqrt(freedom))
    angle = torch.linspace(0, end, 4001, dtype=torch.float64)
    # With t = sqrt(v) tan(a) the density becomes cos(a)^(v - 1), up to a constant.
    whole = torch.linspace(0, math.pi / 2, 4001, dtype=torch.float64)
    part = torch.trapezoid(angle.cos() ** (freedom - 1), angle) / torch.trapezoid(whole.cos() ** (freedom - 1), whole)
    return max(0.0, 1 - float(part))


def holm(differences: Sequence[Difference], level: float = 0.05) -> list[Difference]:
    """The same differences with p adjusted for their number (Holm 1979), and only those below ``level`` decided."""
    order = sorted(range(len(differences)), key=lambda i: (math.isnan(differences[i].p), differences[i].p))
    tested = sum(not math.isnan(each.p) for each in differences)
    out, reached = list(differences), 0.0
    for rank, index in enumerate(order):
        each = differences[index]
        if math.isnan(each.p):
            continue
        reached = max(reached, min(1.0, (tested - rank) * each.p))
        verdict = each.verdict if reached < level else "inconclusive"
        out[index] = Difference(each.name, each.value, each.low, each.high, reached, each.seeds, verdict)
    return out


def false_positives(base: Arm, statistic: Statistic, splits: int = 200, draws: int = 1000) -> float:
    """Share of random splits of one arm's training seeds into two halves that are called different (A/A).

    Raises:
        UserError: fewer than four seeds, so that a half would have one.
    """
    seeds, _ = _check(base, base)
    if seeds < 4:
        raise UserError(f"an A/A test needs at least four training seeds, got {seeds}")
    generator = torch.Generator().manual_seed(key("a/a", seeds, splits))
    wrong = 0
    for _ in range(splits):
        order = torch.randperm(seeds, generator=generator)
        halves = (order[: seeds // 2], order[seeds // 2 : 2 * (seeds // 2)])
        one, two = ({s: {n: v[half] for n, v in d.items()} for s, d in base.items()} for half in halves)
        wrong += compare("a/a", one, two, statistic, draws).verdict != "inconclusive"
    return wrong / splits


@dataclass(frozen=True)
class Spread:
    """What a statistic of one training varies by, as standard deviations.

    Attributes:
        seeds: between trainings, on the same prompts; NaN of one training.
        prompts: the part of it that other prompts would change: what a training does to each prompt in its own way.
    """

    seeds: float
    prompts: float

    @property
    def known(self) -> bool:
        """False of one training, and where all scores of all trainings agree, which says nothing of their spread."""
        return max(self.seeds, self.prompts) > 1e-12 and not math.isnan(self.seeds + self.prompts)


UNKNOWN = Spread(math.nan, math.nan)


def spread(arm: Arm, statistic: Statistic, draws: int = 1000) -> Spread:
    """The spread of an arm's trainings, and by a bootstrap over prompts the prompts' part in it."""
    values = torch.tensor(per_seed(arm, statistic), dtype=torch.float64)
    trained = len(values)
    if trained < 2:
        return UNKNOWN
    weights = _prompt_weights(arm, draws, torch.Generator().manual_seed(key("spread", trained, draws)))
    every = torch.arange(trained)[:, None, None].expand(-1, draws, 1)
    drawn = torch.stack([statistic(_means(arm, seed, weights)) for seed in every])  # trainings, draws
    own = (drawn - drawn.mean(0)).var(1).mean() * trained / (trained - 1)
    return Spread(float(values.std()), float(own.sqrt()))


def detectable(pilot: Arm, statistic: Statistic, seeds: int) -> float:
    """The least difference that 80% of comparisons with so many training seeds an arm would call one.

    Args:
        pilot: scores of one arm, of at least two training seeds, on the prompts that will be used.
        seeds: training seeds of each arm, at least two.

    Raises:
        UserError: too few seeds to know, or to find, anything.
    """
    trained, _ = _check(pilot, pilot)
    if trained < 2 or seeds < 2:
        raise UserError(
            f"a pilot of {trained} and a comparison of {seeds} training seeds: both need two, or the spread between "
            "trainings is unknown and nothing can be told apart"
        )
    return detectable_at(spread(pilot, statistic), seeds)


def detectable_at(of: Spread, seeds: int) -> float:
    """As :func:`detectable`, from what one arm's trainings vary by.

    Up to four seeds Welch's t-interval alone decides; from five the bootstrap has its say, too (:func:`compare`). Its
    variance holds the prompts' part three times: with the seeds, with the prompts and with both. That an arm may suit
    some prompts more than others, and Holm's correction, are not in it: a pilot of one arm can't know them.
    """
    least = max(of.seeds, of.prompts)  # the whole is no less than its part: few seeds may agree by chance
    error, more = least * math.sqrt(2 / seeds), 0.0
    if seeds >= SEEDS_FOR_VERDICT and least:
        more = (1 + seeds / (seeds - 1)) * (of.prompts / least) ** 2
    return _shift(seeds, more) * error


@cache
def _shift(seeds: int, more: float) -> float:
    """The difference, in standard errors, that is found with POWER."""
    low, high = 0.0, 100.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if power_of(middle, seeds, more) < POWER else (low, middle)
    return low


def power_of(shift: float, seeds: int, more: float = 0.0) -> float:
    """How often a difference of ``shift`` standard errors between arms of so many seeds is called one, at 5%.

    Called so where it exceeds Welch's t times the estimated error, and 1.96 times that of a bootstrap whose variance is
    larger by ``more`` (in squared standard errors). The laws of both arms' deviations, chi's, are integrated by the
    trapezoid rule.
    """
    freedom = seeds - 1
    x = torch.linspace(1e-3, math.sqrt(freedom) + 6, 201, dtype=torch.float64)
    law = torch.exp((freedom - 1) * x.log() - x**2 / 2)
    law[[0, -1]] /= 2  # the trapezoid rule
    law = law / law.sum()
    one, two = x[:, None] ** 2, x[None] ** 2
    estimated = ((one + two) / (2 * freedom)).sqrt()
    degrees = (freedom * (one + two) ** 2 / (one**2 + two**2) + 1e-9).long().clamp(1)
    limit = torch.tensor([math.nan, *(t95(n) for n in range(1, 2 * freedom + 1))])[degrees] * estimated
    if more:
        limit = torch.maximum(limit, Z95 * (estimated**2 + more).sqrt())
    found = torch.special.ndtr(shift - limit) + torch.special.ndtr(-shift - limit)
    return float(law @ found @ law)

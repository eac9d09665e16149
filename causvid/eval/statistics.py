"""Intervals: of a mean over prompts, of a difference of proportions, and of a mean over training seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from causvid.randomness import key

Z95 = 1.959963984540054
# Two-sided 95% quantiles of Student's t for 1 to 10 degrees of freedom.
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
Share = tuple[float, float, float]  # a proportion and its interval: (share, low, high)


def wilson(successes: float, count: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson's score interval): right at 0 and 1, where the normal one has no width."""
    if count < 1:
        raise ValueError("an interval needs at least one observation")
    share = successes / count
    middle = share + Z95**2 / (2 * count)
    spread = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def difference(first: Share, second: Share) -> tuple[float, float]:
    """95% interval of ``first`` - ``second`` from their Wilson intervals, as of independent samples.

    Newcombe 1998, method 10.
    """
    (p, low_p, high_p), (q, low_q, high_q) = first, second
    return p - q - math.hypot(p - low_p, high_q - q), p - q + math.hypot(high_p - p, q - low_q)


def interval(values: Tensor, draws: int = 2000) -> tuple[float, float]:
    """95% interval of the mean of ``values`` (1-D): Wilson's for yes or no (bool), else a percentile bootstrap."""
    if values.dtype == torch.bool:
        return wilson(float(values.sum()), len(values))
    generator = torch.Generator().manual_seed(key("bootstrap", len(values)))
    rows = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.double()[rows].mean(1).sort().values
    return float(means[int(0.025 * draws)]), float(means[int(0.975 * draws) - 1])


def t95(freedom: int) -> float:
    """Two-sided 95% quantile of Student's t; beyond the table its expansion at infinity (error below .003)."""
    if freedom <= len(T95):
        return T95[freedom - 1]
    z = Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) over training seeds with a 95% t-interval; one seed has no interval (NaN)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = t95(len(values) - 1) * deviation / math.sqrt(len(values))
    return mean, mean - half, mean + half

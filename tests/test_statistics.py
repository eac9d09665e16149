"""Intervals against published values, coverage by simulation, and the t table."""

from __future__ import annotations

import math

import pytest
import torch

from causvid.eval.statistics import difference, interval, over_seeds, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # these four: Newcombe 1998, table I, score interval
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (20, 20, 0.8389, 1.0000),
    ],
)
def test_wilson(successes, count, low, high):
    assert wilson(successes, count) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("count", [1, 7, 256])
def test_wilsons_ends_solve_the_score_equation(count):
    for successes in {0, 1, count // 2, count}:
        for end in wilson(successes, count):
            if 1e-9 < end < 1 - 1e-9:
                score = (successes / count - end) / math.sqrt(end * (1 - end) / count)
                assert abs(score) == pytest.approx(1.959964, abs=1e-5)


def test_no_observation_has_no_interval():
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_outcomes_have_wilsons_interval():
    assert interval(torch.tensor([1, 0, 1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)) == wilson(8, 10)
    assert interval(torch.ones(20, dtype=torch.bool)) == wilson(20, 20)


def test_numbers_that_happen_to_be_0_or_1_are_no_outcomes():
    assert interval(torch.zeros(20)) == (0.0, 0.0)


def test_bootstrap_is_deterministic_and_shifts_and_scales_with_the_values():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    low, high = interval(values)
    assert interval(values) == (low, high)
    assert interval(values * 3 + 1) == pytest.approx((low * 3 + 1, high * 3 + 1), abs=1e-5)
    assert low < values.mean() < high


def test_bootstrap_of_many_values_is_the_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    half = 1.96 * values.std().item() / 20
    low, high = interval(values)
    assert (values.mean().item() - low, high - values.mean().item()) == pytest.approx((half, half), rel=0.08)


def test_bootstrap_interval_holds_the_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = -torch.rand(400, 60, generator=generator).log()  # exponential, mean 1
    hits = sum(low <= 1 <= high for low, high in (interval(row, 400) for row in samples))
    assert 0.90 <= hits / 400 <= 0.97  # skewed laws fall a little short of .95


@pytest.mark.parametrize(
    ("values", "quantile"),
    [([0.9, 0.94], 12.7062), ([1.0, 2.0, 4.0], 4.3027), ([0.0, 1.0, 1.0, 2.0, 5.0, 3.0], 2.5706),
     ([float(i) for i in range(11)], 2.2281), ([float(i % 5) for i in range(13)], 2.1788),
     ([float(i % 7) for i in range(31)], 2.0423)],
)  # fmt: skip
def test_interval_over_seeds_is_students(values, quantile):
    mean, low, high = over_seeds(values)
    data = torch.tensor(values, dtype=torch.float64)
    half = quantile * data.std(unbiased=True).item() / math.sqrt(len(values))
    assert mean == pytest.approx(data.mean().item())
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=1e-3)


def test_two_seeds_by_hand():
    assert over_seeds([0.9, 0.94]) == pytest.approx((0.92, 0.92 - 12.7062 * 0.02, 0.92 + 12.7062 * 0.02), abs=1e-6)


def test_one_seed_has_no_interval():
    mean, low, high = over_seeds([0.7])
    assert mean == 0.7 and math.isnan(low) and math.isnan(high)


def test_the_interval_of_a_difference_is_newcombes():
    """Newcombe (1998), Statistics in Medicine 17:873, table II, case (a), method 10: 56 of 70 and 48 of 80."""
    low, high = difference((56 / 70, *wilson(56, 70)), (48 / 80, *wilson(48, 80)))
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference((48 / 80, *wilson(48, 80)), (56 / 70, *wilson(56, 70))) == pytest.approx((-high, -low))


def test_one_miss_in_256_against_none_is_chance_and_ten_are_not():
    none = (1.0, *wilson(256, 256))
    assert difference((255 / 256, *wilson(255, 256)), none)[1] > 0 > difference((246 / 256, *wilson(246, 256)), none)[1]

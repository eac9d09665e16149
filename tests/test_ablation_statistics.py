"""Differences between arms: closed forms, real coverage by simulation, and that two seeds of one spec are no effect."""

from __future__ import annotations

import math

import pytest
import torch

from causvid.errors import UserError
from causvid.eval import ablation
from causvid.eval.ablation import Difference, bootstrap, compare, detectable, false_positives, holm, mean_of
from causvid.eval.aggregate import half_score, scales, total_score
from causvid.eval.statistics import t95

MEAN = mean_of("ok")


def arm(seeds, prompts=40, shift=0.0, between=0.05, noise=0.1, key=0):
    """Scores with an effect of the prompt (the same in all arms), of the training seed, and noise."""
    easy = torch.randn(prompts, generator=torch.Generator().manual_seed(99)) * 0.2
    g = torch.Generator().manual_seed(key)
    values = (
        0.5
        + shift
        + easy
        + torch.randn(seeds, 1, generator=g) * between
        + torch.randn(seeds, prompts, generator=g) * noise
    )
    return {"suite": {"ok": values.double()}}


def full(seeds, key, shift=0.0):
    """All sixteen dimensions in two suites."""
    g = torch.Generator().manual_seed(key)
    names = list(scales())
    return {
        suite: {name: (0.6 + shift + 0.1 * torch.rand(seeds, 20, generator=g)).double() for name in part}
        for suite, part in (("one", names[:9]), ("two", names[9:]))
    }


def test_a_clear_difference_is_found_and_its_sign_is_right():
    up = compare("ok", arm(5, shift=0.3, key=1), arm(5, key=2), MEAN)
    assert up.verdict == "better" and up.low < up.value < up.high and up.value == pytest.approx(0.3, abs=0.1)
    assert compare("ok", arm(5, key=2), arm(5, shift=0.3, key=1), MEAN).verdict == "worse" and up.p < 0.01


def test_the_whole_aggregation_goes_through():
    one, two = full(6, 1, 0.1), full(6, 2)
    found = compare("total", one, two, total_score)
    by_hand = [float(total_score({n: v.mean() for d in each.values() for n, v in d.items()})) for each in (one, two)]
    assert found.value == pytest.approx(by_hand[0] - by_hand[1], abs=1e-12) and found.verdict == "better"
    assert compare("quality", two, one, lambda means: half_score(means, "quality")).verdict == "worse"


def test_the_draws_spread_as_the_two_level_model_says():
    seeds, prompts = 8, 50
    values = torch.randn(seeds, prompts, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    flat = {"suite": {"ok": torch.zeros(seeds, prompts, dtype=torch.float64)}}
    drawn = bootstrap({"suite": {"ok": values}}, flat, MEAN, 40_000)
    means, columns = values.mean(1), values.mean(0)
    seed_part = means.var(unbiased=False) / seeds
    prompt_part = columns.var(unbiased=False) / prompts
    both = (values - means[:, None] - columns[None] + values.mean()).pow(2).mean() / (seeds * prompts)
    expected = float(seed_part + prompt_part + both) * seeds / (seeds - 1)
    assert drawn.var().item() == pytest.approx(expected, rel=0.04)
    assert drawn.mean().item() == pytest.approx(values.mean().item(), abs=0.005)


def test_what_all_arms_share_is_no_noise():
    base = arm(5, between=0.0, noise=0.0)
    moved = {"suite": {"ok": base["suite"]["ok"] + 0.01}}  # prompts differ by .2, the arms by .01 on each
    found = compare("ok", moved, base, MEAN)
    assert (found.low, found.high) == pytest.approx((0.01, 0.01), abs=1e-9) and found.verdict == "better"


def test_two_seeds_of_one_spec_are_no_effect():
    first, second = arm(1, between=0.3, noise=0.01, key=1), arm(1, between=0.3, noise=0.01, key=5)
    found = compare("ok", first, second, MEAN)
    assert abs(found.value) > 0.1 and found.verdict == "one seed: no verdict" and math.isnan(found.p)


def test_two_seeds_that_score_alike_do_not_make_one_prompt_certain():
    """The t-interval over seeds has no width then; the prompts' own spread still counts."""
    one = {"suite": {"ok": torch.tensor([[1.0, *[0.0] * 7]] * 2)}}
    found = compare("ok", {"suite": {"ok": torch.zeros(2, 8)}}, one, MEAN)
    assert found.value == -0.125 and found.verdict == "inconclusive" and found.p > 0.1


def test_few_seeds_have_students_interval():
    one = {"s": {"ok": torch.tensor([[1.0], [3.0]])}}
    two = {"s": {"ok": torch.tensor([[0.0], [2.0]])}}
    found = compare("ok", one, two, MEAN)  # error sqrt(2/2 + 2/2), 2 degrees of freedom, t = 4.3027
    assert (found.value, found.low, found.high) == pytest.approx(
        (1, 1 - 4.3027 * 2**0.5, 1 + 4.3027 * 2**0.5), abs=1e-4
    )
    assert found.verdict == "inconclusive"
    # t of 1/sqrt(2) at 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2)
    assert found.p == pytest.approx(1 - 0.5**0.5 / 2.5**0.5, abs=1e-5)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_arms_of_one_spec_are_called_different_at_most_as_often_as_said(seeds):
    trials = 250
    wrong = sum(
        compare("ok", arm(seeds, key=2 * n), arm(seeds, key=2 * n + 1), MEAN, 400).verdict != "inconclusive"
        for n in range(trials)
    )
    assert wrong / trials <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / trials)


@pytest.mark.parametrize(
    ("seeds", "between", "noise"), [(3, 0.05, 0.1), (5, 0.05, 0.1), (5, 0.01, 0.3), (8, 0.01, 0.3), (10, 0.01, 0.3)]
)
def test_a_real_effect_is_found_as_often_as_the_power_says(seeds, between, noise):
    """Whichever is the wider of the two intervals: that over seeds (first rows), or the bootstrap (last ones)."""
    effect = detectable(arm(200, between=between, noise=noise, key=77), MEAN, seeds)
    trials, hits = 250, 0
    for n in range(trials):
        one = arm(seeds, shift=effect, between=between, noise=noise, key=2 * n)
        hits += compare("ok", one, arm(seeds, between=between, noise=noise, key=2 * n + 1), MEAN, 300).low > 0
    assert hits / trials == pytest.approx(0.8, abs=0.09)


def test_more_seeds_see_more_and_one_sees_nothing():
    pilot = arm(20, key=77)
    assert detectable(pilot, MEAN, 10) < detectable(pilot, MEAN, 5) < detectable(pilot, MEAN, 3)
    with pytest.raises(UserError, match="need two"):
        detectable(arm(1), MEAN, 5)
    assert math.isnan(ablation.spread(arm(1), MEAN).seeds)


def test_the_spread_of_trainings_and_the_prompts_part_in_it():
    found = ablation.spread(arm(400, between=0.05, noise=0.3, key=3), MEAN, 2000)
    assert found.prompts == pytest.approx(0.3 / 40**0.5, rel=0.05)
    assert found.seeds == pytest.approx((0.05**2 + 0.3**2 / 40) ** 0.5, rel=0.1)


def test_two_seeds_that_agree_by_chance_do_not_promise_to_find_anything():
    """Their means are equal, and each prompt differs: what prompts alone make of a training is the least spread."""
    values = torch.tensor([[0.0, 1.0] * 4, [1.0, 0.0] * 4], dtype=torch.float64)
    of = ablation.spread({"s": {"ok": values}}, MEAN)
    assert of.seeds < 1e-12 < of.prompts and of.known
    assert ablation.detectable_at(of, 5) == pytest.approx(
        ablation.detectable_at(ablation.Spread(of.prompts, of.prompts), 5)
    )
    tiny = ablation.Spread(of.prompts / 1000, of.prompts)
    assert ablation.detectable_at(tiny, 5) > 3 * of.prompts / 5**0.5
    assert not ablation.spread({"s": {"ok": torch.ones(2, 8, dtype=torch.float64)}}, MEAN).known


def test_with_five_seeds_prompts_count_and_with_four_they_do_not():
    """One prompt alone differs, alike in all trainings: sure over the seeds, and chance over the prompts."""
    for seeds, verdict in ((4, "under five seeds: no verdict"), (5, "inconclusive")):
        base = {"s": {"ok": 0.01 * torch.arange(seeds, dtype=torch.float64)[:, None].expand(-1, 12).clone()}}
        one = {"s": {"ok": base["s"]["ok"].clone()}}
        one["s"]["ok"][:, 3] += 1.2
        found = compare("ok", one, base, MEAN)
        assert found.value == pytest.approx(0.1) and found.verdict == verdict
        assert (found.low > 0) == (seeds == 4)


def test_many_comparisons_can_still_find_what_is_clear():
    """The p of 10,000 draws would end at 1e-4, and Holm's correction over 1,000 at .1."""
    clear = compare("ok", arm(10, shift=0.7, key=1), arm(10, key=2), MEAN)
    assert clear.p < 1e-9
    none = [Difference(f"m{n}", 0.0, -1.0, 1.0, 0.9, 10, "inconclusive") for n in range(999)]
    assert holm([*none, clear])[-1].verdict == "better"
    near = compare("ok", arm(10, shift=0.12, key=1), arm(10, key=2), MEAN)
    assert 1e-6 < near.p < 1


def test_a_a_over_splits_of_one_arm_stays_at_the_nominal_rate():
    assert false_positives(arm(10, key=4), MEAN, 150, 300) <= 0.05
    with pytest.raises(UserError, match="four"):
        false_positives(arm(3), MEAN)


def test_ignoring_training_seeds_would_not_stay_there():
    """The fault that the first level cures: prompts alone, of one training each."""
    wrong = 0
    for n in range(100):
        difference = (arm(1, key=2 * n)["suite"]["ok"] - arm(1, key=2 * n + 1)["suite"]["ok"])[0]
        wrong += abs(difference.mean()) > 1.96 * difference.std() / len(difference) ** 0.5
    assert wrong / 100 > 0.3


def difference(p, verdict="better"):
    return Difference("x", 1.0, 0.5, 1.5, p, 5, verdict)


def test_holm_by_hand():
    found = holm([difference(0.01), difference(0.04), difference(0.03), difference(0.005)])
    assert [each.p for each in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [each.verdict for each in found] == ["better", "inconclusive", "inconclusive", "better"]
    alone = holm([difference(math.nan, "one seed: no verdict"), difference(0.04)])
    assert alone[0].verdict == "one seed: no verdict" and alone[1].p == pytest.approx(0.04)


def test_draws_are_the_same_every_time_and_do_not_depend_on_the_order_of_suites():
    one, two = full(5, 1), full(5, 2)
    assert compare("t", one, two, total_score) == compare("t", one, two, total_score)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda v: v[:, :3], "same ones"), (lambda v: v * math.nan, "finite"), (lambda v: v[0], "finite"),
    ],
)  # fmt: skip
def test_arms_that_are_not_alike_are_refused(change, word):
    one = arm(5)
    other = {"suite": {"ok": change(one["suite"]["ok"])}}
    with pytest.raises(UserError, match=word):
        compare("ok", one, other, MEAN)
    with pytest.raises(UserError, match="paired"):
        compare("ok", one, {"other": one["suite"]}, MEAN)
    with pytest.raises(UserError, match="as many"):
        ablation.bootstrap(arm(5), arm(4), MEAN, paired_seeds=True)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 30])
def test_the_power_of_seeds_alone_is_welchs(seeds):
    """By simulation; and with many seeds it comes down to the noncentral t distribution."""
    stats = pytest.importorskip("scipy.stats")
    shift, trials = 3.0, 20_000
    values = torch.randn(2, trials, seeds, generator=torch.Generator().manual_seed(seeds), dtype=torch.float64)
    parts = values.var(2) / seeds
    error = parts.sum(0).sqrt()
    degrees = (error**4 / (parts**2 / (seeds - 1)).sum(0)).floor().clamp(min=1)
    away = values[0].mean(1) - values[1].mean(1) + shift * math.sqrt(2 / seeds)
    found = (away.abs() > error * torch.tensor(stats.t.ppf(0.975, degrees.numpy()))).double().mean()
    assert ablation.power_of(shift, seeds) == pytest.approx(float(found), abs=0.012)
    if seeds == 30:
        freedom = 2 * (seeds - 1)
        exact = stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, shift)
        assert ablation.power_of(shift, seeds) == pytest.approx(exact, abs=2e-3)
    least = ablation.detectable_at(ablation.Spread(0.3, 0.0), seeds) / (0.3 * math.sqrt(2 / seeds))
    assert ablation.power_of(least, seeds) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(("k", "m"), [(2, 2), (3, 3), (4, 3), (2, 4)])
def test_few_seeds_have_welchs_interval(k, m):
    """Against scipy's, at its degrees of freedom rounded down, as tables have it: never narrower."""
    stats = pytest.importorskip("scipy.stats")
    for key in range(5):
        one, two = arm(k, key=2 * key), arm(m, key=2 * key + 1)
        found = compare("ok", one, two, MEAN)
        theirs = stats.ttest_ind(*(each["suite"]["ok"].mean(1).numpy() for each in (one, two)), equal_var=False)
        error, freedom = found.value / theirs.statistic, int(theirs.df)
        half = stats.t.ppf(0.975, freedom) * error
        assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=1e-5)
        assert found.p == pytest.approx(2 * stats.t.sf(abs(theirs.statistic), freedom), abs=1e-5)
        span = theirs.confidence_interval(0.95)
        assert found.low <= span.low + 1e-5 and found.high >= span.high - 1e-5


def test_more_seeds_have_a_bootstrap_that_is_near_welchs_and_never_narrower():
    stats = pytest.importorskip("scipy.stats")
    one, two = arm(12, key=1), arm(12, key=2)
    found = compare("ok", one, two, MEAN)
    error = (
        found.value
        / stats.ttest_ind(*(each["suite"]["ok"].mean(1).numpy() for each in (one, two)), equal_var=False).statistic
    )
    half = stats.t.ppf(0.975, 21) * error
    assert found.low <= found.value - half + 1e-3 and found.high >= found.value + half - 1e-3
    assert found.high - found.low < 2.6 * half


def holms(values, level):
    """By definition: from the least p on, each against the level over what is left; the first that fails ends it."""
    rejected = set()
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if values[index] * (len(values) - rank) >= level:
            break
        rejected.add(index)
    return rejected


def test_holm_rejects_what_the_step_down_rule_does():
    for key in range(200):
        p = (torch.rand(12, generator=torch.Generator().manual_seed(key), dtype=torch.float64) ** 4).tolist()
        found = holm([difference(each) for each in p])
        assert {i for i, each in enumerate(found) if each.verdict == "better"} == holms(p, 0.05)
        assert all(each.p >= before for each, before in zip(found, p, strict=True))


def test_students_quantiles():
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 200):
        assert t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=3e-3 if freedom > 10 else 1e-4)


def test_seeds_of_two_arms_are_drawn_apart_and_together_only_where_asked():
    """An arm against itself: drawn together nothing differs; drawn apart the spread is that of two trainings."""
    one = arm(6, noise=0.0, key=3)
    assert float(bootstrap(one, one, MEAN, 500, paired_seeds=True).abs().max()) == 0
    spread = float(bootstrap(one, one, MEAN, 20_000).std())
    seeds = one["suite"]["ok"].mean(1)
    assert spread == pytest.approx(math.sqrt(2 * float(seeds.var(unbiased=True)) / 6), rel=0.03)


def test_an_interval_is_never_narrower_than_students():
    """Five seeds that agree on prompts: the bootstrap is the narrower one, and the t-interval is what is told."""
    one, two = arm(5, prompts=200, noise=0.0, key=1), arm(5, prompts=200, noise=0.0, key=2)
    values = [each["suite"]["ok"].mean(1) for each in (one, two)]
    error = math.sqrt(sum(float(v.var()) / 5 for v in values))
    parts = [float(v.var()) / 5 for v in values]
    half = t95(int(sum(parts) ** 2 / sum(part**2 / 4 for part in parts))) * error
    found, drawn = compare("ok", one, two, MEAN), bootstrap(one, two, MEAN)
    assert float(drawn[250]) > found.value - half and float(drawn[9749]) < found.value + half
    assert found.low <= found.value - half + 1e-9 and found.high >= found.value + half - 1e-9

"""The shipped experiments and teachers belong together."""

from __future__ import annotations

import pytest
import torch

from causvid import build, experiment, spec, weights

NAMES = sorted(
    str(path.relative_to(spec.experiments_folder()).with_suffix(""))
    for path in spec.experiments_folder().rglob("*.yaml")
)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_spec_says_what_it_is_for_and_fits(name):
    arm = spec.load(name)
    assert arm["about"].endswith(".") and experiment.check([name]) == [name]


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_a_shipped_teacher_fits_its_world_and_is_finite_and_small(kind):
    arm = spec.load("tiny/causvid", [f"teacher={kind}"])
    path = build.shipped_teacher(arm)
    assert path.stat().st_size <= 8_000_000
    build.load_network(arm, build.World(arm), build.teacher_rule(arm), path)
    assert all(torch.isfinite(value).all() for value in weights.read_tensors(path)[0].values())

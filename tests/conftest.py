"""One thread (sums differ in the last bit between thread counts) and the same global seed for every test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same examples in every run: a suite that fails must fail again.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)

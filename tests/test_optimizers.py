"""Muon against the exact polar factor, against torch's own Muon, and by its first update in closed form."""

from __future__ import annotations

import pytest
import torch

from causvid.optimizers import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 5)])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_values(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    core = left.mT @ orthogonalize(matrix).double() @ right.mT
    assert torch.allclose(core, torch.diag(core.diagonal()), atol=1e-4)
    assert core.diagonal().min() > 0.5 and core.diagonal().max() < 1.5
    assert values.max() > 1.5 or 1 in shape  # the matrix itself was not so already


def test_orthogonalize_of_nothing_is_nothing():
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(16, 16), (12, 32), (32, 12)])
def test_muon_follows_torchs_own_within_bf16(shape):
    start, target = torch.randn(shape), torch.randn(shape)
    paths = []
    for make in (
        lambda p: Muon(p, lr=0.02, momentum=0.9),
        lambda p: torch.optim.Muon(p, lr=0.02, momentum=0.9, weight_decay=0.0),
    ):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight])
        for _ in range(10):
            optimizer.zero_grad()
            (weight - target).pow(2).sum().backward()
            optimizer.step()
        paths.append(weight.detach() - start)
    ours, theirs = paths
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_first_update_is_the_orthogonal_factor_of_the_gradient():
    weight = torch.nn.Parameter(torch.zeros(6, 3))
    gradient = torch.randn(6, 3)
    (weight * gradient).sum().backward()
    Muon([weight], lr=0.1, momentum=0.5).step()
    assert torch.allclose(weight.detach(), -0.1 * 2**0.5 * orthogonalize(gradient), atol=1e-6)


def test_parameters_without_gradient_stay():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))

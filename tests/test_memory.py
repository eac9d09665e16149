"""The metric of memorised clips: a clip is nearest to itself, and a foreign one is told."""

from __future__ import annotations

import torch

from causvid.eval.memory import Memory


def test_a_clip_is_its_own_and_noise_costs_its_psnr():
    clips = torch.rand(3, 4, 3, 8, 8) * 2 - 1
    metric = Memory().knowing(clips, ["a", "b", "c"])
    scores = metric(clips, ["a", "b", "c"])
    assert scores["ok"].tolist() == [1, 1, 1] and scores["fidelity"].tolist() == [60, 60, 60]
    scores = metric(clips + 0.02, ["a", "c", "b"])
    assert scores["ok"].tolist() == [1, 0, 0]
    torch.testing.assert_close(scores["fidelity"][0], torch.tensor(40.0), atol=1e-3, rtol=0)  # 10 log10(4 / 0.02^2)

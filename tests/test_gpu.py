"""What a CPU can't show: compiled kernels, the recipe, bf16 and streams on an accelerator; skipped where none is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_masks import RULES, plain_attention
from toy import toy_spec
from wan_files import random_input, random_model

from causvid import experiment, generation, weights
from causvid.attention.kernels import Blockwise, Flex, Grid, Sdpa
from causvid.attention.masks import BlockCausal, Pattern, SinkWindow
from causvid.attention.positions import Absolute
from causvid.streaming.session import Session

DEVICE = torch.accelerator.current_accelerator(check_available=True)
pytestmark = pytest.mark.skipif(DEVICE is None, reason="no accelerator here")
SIZES = [(3, 5, 5), (8, 16, 3)]  # height, width, frames: tokens that are and are not multiples of 128


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error of a against b, in the Frobenius norm."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def assert_alike(one: Path, other: Path) -> None:
    """The same weights but for rounding."""
    here, there = (weights.read_tensors(path)[0] for path in (one, other))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(tensor, there[name], atol=2e-3, rtol=2e-2, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_kernel_agrees_with_plain_attention_forward_and_backward(rule, forced, size):
    """Against softmax attention in fp64: in fp32 to 1e-5, in bf16 to what its 8 bits allow."""
    *area, count = size
    pattern = Pattern(rule, count, forced)
    shape = (2, 2, pattern.slots * area[0] * area[1], 32)
    exact = [torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(shape, dtype=torch.float64, device=DEVICE)
    grid = Grid(*area, 32, 10000.0, torch.float64, DEVICE)
    wanted = plain_attention(*exact, pattern, grid)
    gradients = torch.autograd.grad(wanted, exact, upstream)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        given = [x.detach().to(dtype).requires_grad_() for x in exact]
        for kernel in (Sdpa(), Blockwise(), Flex()):
            out = kernel.plan(pattern, Absolute(), Grid(*area, 32, 10000.0, dtype, DEVICE))(*given)
            found = torch.autograd.grad(out, given, upstream.to(dtype))
            errors = [apart(out, wanted), *map(apart, found, gradients)]
            assert max(errors) < tolerance, (kernel, dtype, errors)


@pytest.mark.parametrize("rule", [BlockCausal(1), SinkWindow(1, None, 2, 1)], ids=str)
def test_a_network_computes_what_it_computes_on_the_cpu(rule):
    model, (x, t, text) = random_model(mask=rule), random_input()
    wanted = model(x, t, text).prediction
    model = model.to(DEVICE)
    got = model(x.to(DEVICE), t.to(DEVICE), text.to(DEVICE)).prediction
    assert apart(got.cpu(), wanted) < 1e-4


@pytest.mark.parametrize("rule", [BlockCausal(1), SinkWindow(1, None, 2, 1)], ids=str)
def test_a_cache_continues_a_clip_as_one_pass_makes_it(rule):
    model, (x, t, text) = random_model(mask=rule).to(DEVICE), random_input()
    x, t, text = x.to(DEVICE), t.to(DEVICE), text.to(DEVICE)
    wanted, cache, made = model(x, t, text).prediction, model.new_cache(), []
    for frame in range(3):
        one = slice(frame, frame + 1)
        out = model(x[:, one], t[:, one], text, cache=cache, commit=True)
        cache = out.cache
        made.append(out.prediction)
    assert apart(torch.cat(made, 1), wanted) < 1e-5


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The whole recipe at toy size, on the accelerator and on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    name = toy_spec(folder)
    return {device: experiment.run(name, [f"runtime.device={device}"], folder / device) for device in ("auto", "cpu")}


def test_the_recipe_trains_what_it_trains_on_the_cpu(both):
    """Every number drawn is the same on every device, so only rounding is between them."""
    assert sorted(both["auto"].executed) == sorted(both["cpu"].executed)
    for stage in ("teacher", "ode_init", "distill"):
        here, there = (weights.read_tensors(run.folders[stage] / "weights.safetensors")[0] for run in both.values())
        for name, tensor in here.items():
            torch.testing.assert_close(
                tensor, there[name], atol=2e-3, rtol=2e-2, msg=lambda text, n=name: f"{n}: {text}"
            )
    assert both["auto"].metrics.keys() == both["cpu"].metrics.keys()


def test_a_run_on_the_accelerator_streams(both, tmp_path):
    engine = generation.engine_of(str(both["auto"].run), tmp_path)
    session = Session(engine, "a red circle moves left")
    frames = torch.cat([session.step().frames for _ in range(5)], 1)
    assert frames.dtype == torch.uint8 and frames.shape[2:] == (3, 32, 32) and frames.float().std() > 1


def test_training_in_bf16_stays_finite_and_keeps_its_weights_in_fp32(tmp_path):
    run = experiment.run(
        toy_spec(tmp_path), ["runtime.device=auto", "precision=bf16", "until=distill"], tmp_path / "runs"
    )
    made = weights.read_tensors(run.run / "weights.safetensors")[0]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in made.values())


def test_the_compiled_kernel_trains_as_block_slices_do(tmp_path):
    """What the CPU refuses: a recipe whose students train with flex attention."""
    made = []
    for kernel in ("blockwise", "flex"):
        changes = ["runtime.device=auto", "until=distill", "model.dim=64", f"causal.kernel={kernel}"]
        run = experiment.run(toy_spec(tmp_path), changes, tmp_path / "runs")
        made.append(run.run / "weights.safetensors")
    assert_alike(*made)

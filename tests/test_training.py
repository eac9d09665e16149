"""Training: the player's update against formulas written out, curves, checkpoints, and exact resume of every stage."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from toy import toy_spec

from causvid import checkpoint, experiment, runs, spec, training
from causvid.errors import UserError
from causvid.runs import Context
from causvid.spec import Spec
from causvid.types import LossOutput
from causvid.validate import Bound

OPTIONS = {"warmup": 0, "decay": "constant", "ema": 0.0, "gradient_clip": 0.0, "activation_checkpointing": False}
QUIET = {"runtime": {"loggers": [Bound("logger", {"name": "jsonl"})], "checkpoint_seconds": 1e9, "monitor": None}}


def adamw(**options):
    return Bound("optimizer", {"name": "adamw", "lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0.0, **options})


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def player(module, updates=10, optimizer=None, **options):
    return training.Player(module, optimizer or adamw(), {**OPTIONS, **options}, updates)


def loss_of(module, step):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return module(x).square().mean()


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_average_follows_its_formula():
    trained = player(linear(), ema=0.5)
    average = trained.module.weight.detach().double().clone()
    for step in range(12):
        trained.step(loss_of(trained.module, step))
        decay = min(0.5, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * trained.module.weight.detach().double()
    torch.testing.assert_close(trained.final()["weight"].double(), average, rtol=0, atol=1e-6)
    assert not torch.equal(trained.final()["weight"], trained.module.weight)


def test_without_an_average_the_weights_themselves_are_kept():
    trained = player(linear())
    trained.step(loss_of(trained.module, 0))
    assert same(trained.final(), dict(trained.module.state_dict()))


class Sgd:
    """Plain gradient steps of length one, so that a step shows the gradient."""

    def __new__(cls, model):
        return [torch.optim.SGD(model.parameters(), lr=1.0)]


SGD = Bound("optimizer", {"name": f"{__name__}:Sgd"})


@pytest.mark.parametrize("clip", [0.0, 0.1, 1e6])
def test_gradients_are_clipped_by_their_norm_and_the_norm_before_is_told(clip):
    module = linear()
    before = [p.detach().clone() for p in module.parameters()]
    (loss_of(module, 0) * 50).backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    told = player(module, optimizer=SGD, gradient_clip=clip).step(loss_of(module, 0) * 50)
    assert told == pytest.approx(norm, rel=1e-6)
    scale = 1.0 if clip == 0.0 else min(1.0, clip / norm)
    for old, new, gradient in zip(before, module.parameters(), gradients, strict=True):
        torch.testing.assert_close(old - new.detach(), gradient * scale, rtol=1e-4, atol=1e-6)


def test_warmup_rises_evenly_and_a_cosine_ends_at_zero():
    trained = player(linear(), updates=12, warmup=3)
    rates = []
    for step in range(6):
        rates.append(trained.optimizers[0].param_groups[0]["lr"])
        trained.step(loss_of(trained.module, step))
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    cosine = player(linear(), updates=12, warmup=2, decay="cosine")
    for step in range(12):
        cosine.step(loss_of(cosine.module, step))
    assert cosine.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_a_player_that_was_saved_goes_on_as_if_nothing_had_happened(decay, tmp_path):
    options = {"ema": 0.9, "warmup": 2, "decay": decay, "gradient_clip": 0.5}
    straight, first = player(linear(), **options), player(linear(), **options)
    for step in range(8):
        straight.step(loss_of(straight.module, step))
    for step in range(3):
        first.step(loss_of(first.module, step))
    checkpoint.save(tmp_path / "c.safetensors", first.state())
    second = player(linear(seed=9), **options)
    second.load_state(checkpoint.load(tmp_path / "c.safetensors"))
    for step in range(3, 8):
        second.step(loss_of(second.module, step))
    assert same(second.final(), straight.final()) and same(second.module.state_dict(), straight.module.state_dict())


def test_what_has_no_blocks_is_all_rest_to_muon():
    """A discriminator learns by AdamW at the rest's rate, so a GAN joins a spec of Muon in one line."""
    rest = {"rest_lr": 0.1, "rest_betas": [0.9, 0.99]}
    mine, plain = player(linear(), optimizer=Bound("optimizer", {"name": "muon", **rest})), player(linear())
    for step in range(3):
        mine.step(loss_of(mine.module, step))
        plain.step(loss_of(plain.module, step))
    assert same(mine.final(), plain.final())
    experiment.plan(spec.load("tiny/causvid", ["loss={name: sum, of: [dmd, gan]}"]))


def context(folder, **runtime):
    return Context(Spec("x", {"runtime": {**QUIET["runtime"], **runtime}}), folder, {}, lambda text: None)


def output(value=1.0, **logs):
    return LossOutput(torch.tensor(value), logs)


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "curves.jsonl").read_text().splitlines()]


def test_curves_drop_what_will_be_written_again_and_half_lines(tmp_path):
    path = tmp_path / "curves.jsonl"
    path.write_text("".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in range(5)) + '{"step": 5, "lo')
    logger = training.JsonLines(tmp_path, start=3)
    logger.log(3, {"loss": 2.0})
    assert steps_of(tmp_path) == [0, 1, 2, 3]  # there before it is closed, should the process be killed
    logger.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops_the_run_with_advice(value, tmp_path):
    with (
        training.session(context(tmp_path), "x", {}, 3) as session,
        pytest.raises(UserError, match=r"at step 1; lower the learning rate"),
    ):
        session.after(0, output())
        session.after(1, output(value))
    assert steps_of(tmp_path) == [0]


def test_checkpoints_come_as_often_as_asked_and_go_at_the_end(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    with training.session(context(tmp_path), "x", {}, 3) as session:
        session.after(0, output())
        assert not path.exists()
    with training.session(context(tmp_path, checkpoint_seconds=0.0), "x", {"p": player(linear())}, 3) as session:
        session.after(0, output(extra=torch.tensor(2.0)), more=3.0)
        assert path.exists()
        session.finish(weights={"w": torch.ones(1)})
    assert path.exists()  # until the stage is done
    assert (tmp_path / "weights.safetensors").exists()
    assert json.loads((tmp_path / "curves.jsonl").read_text()) == {"step": 0, "loss": 1.0, "extra": 2.0, "more": 3.0}


class Elsewhere:
    """A logger of a user's own."""

    def __init__(self, folder):
        self.path = folder / "elsewhere"

    def log(self, step, values):
        self.path.write_text(str(step))

    def close(self):
        pass


def test_curves_are_kept_for_the_report_wherever_else_they_go(tmp_path):
    other = Bound("logger", {"name": f"{__name__}:Elsewhere"})
    with training.session(context(tmp_path, loggers=[other]), "x", {}, 2) as session:
        session.after(0, output())
    assert steps_of(tmp_path) == [0] and (tmp_path / "elsewhere").read_text() == "0"


def test_wandb_logs_without_an_account_or_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wanted = Bound("logger", {"name": "wandb", "project": "p", "mode": "offline"})
    with training.session(context(tmp_path, loggers=[wanted]), "x", {}, 2) as session:
        session.after(0, output())
        session.after(1, output(extra=2.0))
    (written,) = tmp_path.rglob("*.wandb")
    assert written.stat().st_size > 0 and steps_of(tmp_path) == [0, 1]


def digest(folder):
    return json.loads((folder / "pairs" / "digest.json").read_text())["digest"]


class Halt(Exception):
    pass


EXTRA = """
ode_init: {iterations: 5, ema: 0.9, decay: cosine, optimizer: {name: muon}}
distill: {iterations: 4, ema: 0.9, gradient_clip: 0.5, discriminator: {taps: 1}}
loss: {name: sum, of: [dmd, {name: gan, r1: 1.0}], weights: [1, 0.1]}
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    arm = spec.load(toy_spec(folder, EXTRA))
    nodes = experiment.plan(arm, "distill")
    runs.Store(folder / "runs").execute(nodes, arm, lambda text: None)
    return folder, arm, nodes


@pytest.mark.parametrize("every", [1, 2])
def test_stopped_at_every_step_of_every_stage_the_bytes_are_the_same(every, straight, tmp_path, monkeypatch):
    folder, arm, nodes = straight
    reference, store = runs.Store(folder / "runs"), runs.Store(tmp_path)
    after = training.Session.after
    stopped: set[tuple[str, int]] = set()

    def halting(self, step, *arguments, **numbers):
        place = (self._context.folder.parent.name, step)
        if step % every == 0 and place not in stopped:
            stopped.add(place)
            raise Halt  # the update is done, but neither logged nor saved
        after(self, step, *arguments, **numbers)

    monkeypatch.setattr(training.Session, "after", halting)
    for _ in range(40):
        try:
            store.execute(nodes, arm, lambda text: None)
            break
        except Halt:
            continue
    assert len(stopped) >= (13 // every) and all(store.done(node) for node in nodes)
    for node in nodes:
        if node.name == "ode_pairs":
            assert digest(store.folder(node)) == digest(reference.folder(node))
            continue
        wanted = sorted(reference.folder(node).glob("*.safetensors"))
        assert wanted
        for path in wanted:
            assert (store.folder(node) / path.name).read_bytes() == path.read_bytes(), path
        curves = [(s.folder(node) / "curves.jsonl").read_text() for s in (store, reference)]
        assert curves[0] == curves[1] and steps_of(store.folder(node)) == list(range(curves[0].count("\n")))


def test_the_players_of_a_gan_are_all_kept(straight):
    folder, _, nodes = straight
    path = runs.Store(folder / "runs").folder(nodes[-1])
    assert {p.stem for p in path.glob("*.safetensors")} == {"weights", "fake_score", "discriminator"}


def test_activation_checkpointing_changes_no_number(straight, tmp_path):
    folder, _, _ = straight
    extra = "teacher_training: {activation_checkpointing: true}"
    arm = spec.load(toy_spec(tmp_path, extra))
    node = experiment.plan(arm, "teacher")[0]
    runs.Store(tmp_path / "runs").execute([node], arm, lambda text: None)
    plain = next((folder / "runs" / "teacher").glob("*/weights.safetensors"))
    ours = runs.Store(tmp_path / "runs").folder(node) / "weights.safetensors"
    assert checkpoint.weights.read_tensors(ours)[0].keys() == checkpoint.weights.read_tensors(plain)[0].keys()
    for name, value in checkpoint.weights.read_tensors(plain)[0].items():
        torch.testing.assert_close(checkpoint.weights.read_tensors(ours)[0][name], value, rtol=0, atol=1e-6)


# What a stage has written when it is half way; the stages that write only at their end are killed at their start.
HALF_WAY = {
    **dict.fromkeys(("teacher", "ode_init", "distill"), "checkpoint.safetensors"), "ode_pairs": "parts/*.safetensors",
    "sample_teacher": "*.safetensors", "sample_start": "*.safetensors", "sample": "*.safetensors",
}  # fmt: skip


@pytest.mark.slow
def test_kill_nine_in_each_stage_changes_no_byte(tmp_path):
    """Each stage is killed once in its midst, and the same command goes on, training from its checkpoint."""
    path = toy_spec(
        tmp_path, "teacher_training: {iterations: 150}\node_init: {iterations: 150}\ndistill: {iterations: 50}"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"

    def command(root):
        return [sys.executable, "-m", "causvid.cli", "run", path, "--runs", str(root), "--json"]

    whole = subprocess.run(command(tmp_path / "a"), env=environment, capture_output=True, text=True, check=True)
    for name in json.loads(whole.stdout)["executed"]:
        half_way = f"{name}/*/{HALF_WAY.get(name, 'record.json')}"
        for _ in range(10):
            with log.open("a") as said:
                process = subprocess.Popen(command(tmp_path / "b"), env=environment, stdout=said, stderr=said)
                while process.poll() is None and not list((tmp_path / "b").glob(half_way)):
                    time.sleep(0.001)
                process.send_signal(signal.SIGKILL)
                process.wait()
            if not list((tmp_path / "b" / name).glob("*/DONE")):
                break
            shutil.rmtree(tmp_path / "b" / name)  # it was too fast: once more
        else:
            pytest.fail(f"{name} was never killed while it worked")
    last = subprocess.run(command(tmp_path / "b"), env=environment, capture_output=True, text=True, check=True)
    resumed = re.findall(r"resumed at step (\d+) of (\d+)", log.read_text() + last.stderr)
    assert {total for _, total in resumed} == {"150", "50"}
    assert len(resumed) >= 3  # teacher, ODE initialisation, distill
    assert all(0 < int(step) < int(total) for step, total in resumed)
    assert json.loads(last.stdout)["metrics"] == json.loads(whole.stdout)["metrics"]
    for pattern in ("*/*/*.safetensors", "*/*/metrics.json", "*/*/scores.json"):
        for wanted in (tmp_path / "a").glob(pattern):
            ours = tmp_path / "b" / wanted.relative_to(tmp_path / "a")
            assert ours.read_bytes() == wanted.read_bytes(), ours
    (ours,), (wanted,) = ([*(tmp_path / each).glob("ode_pairs/*")] for each in "ba")
    assert digest(ours) == digest(wanted)
    for curves in (tmp_path / "b").glob("*/*/curves.jsonl"):
        steps = steps_of(curves.parent)
        assert steps == list(range(len(steps)))

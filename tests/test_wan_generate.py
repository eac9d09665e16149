"""``causvid generate --spec wan/...`` from an official folder of cut size: every mode of inference, to mp4 files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from wan_files import SMALL, in_folder, official_folder, random_model

from causvid import cli, wan_generation
from causvid.data.clips import png
from causvid.data.video import read_mp4
from causvid.models import wan_files
from causvid.models.wan import links
from causvid.samplers.unipc import UniPC
from causvid.types import DenoiserOutput, Text

CUT = """
world:
  dataset: {frames: 21, height: 16, width: 32}
  codec: {base_dim: 8}
  text_encoder: {dim: 32, layers: 2, heads: 4, ffn_dim: 48, vocabulary_size: 64, length: 12}
  negative_prompt: blurred , bad
model: {dim: 48, ffn_dim: 80, heads: 4, layers: 2, freq_dim: 32}
teacher_sampling: {steps: 3}
runtime: {threads: 1}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights (a base folder and a student's model.pt) and a cut spec of each mode."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("wan")
    official_folder(folder)
    student = dict(random_model(SMALL, seed=7).named_parameters())
    named = {n: p for link in links(SMALL, "causvid") for n, p in link.split(student[link.ours].detach())}
    average = {name: value * 1.01 for name, value in named.items()}
    torch.save({"generator": named, "critic": average}, folder / "model.pt")
    torch.save({"generator": named, "generator_ema": average, "critic": average}, folder / "forced.pt")
    for name in ("causal", "causal_4step", "causal_window", "bidirectional", "teacher_euler", "teacher_unipc"):
        (folder / f"{name}.yaml").write_text(f"about: Cut.\nbase: wan/{name}\n{CUT}")
    (folder / "prompts.txt").write_text("a red fox\n\n  the snow \n")
    return folder


def generate(place, capsys, spec, *arguments, model="model.pt", out="clip.mp4"):
    """(status, path on stdout, stderr)."""
    base = ["generate", "--spec", place / f"{spec}.yaml", "--weights", in_folder(place), "--out", place / out]
    chosen = ["--model", place / model] if model else []
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in [*base, *chosen, "--runs", place / "runs", "--device", "cpu", *arguments]])
    stdout, stderr = capsys.readouterr()
    return ended.value.code or 0, stdout.strip().split("\n")[-1], " ".join(stderr.split())


def video(place, capsys, spec, *arguments, **options):
    code, path, err = generate(place, capsys, spec, *arguments, **options)
    assert code == 0, err
    clip = read_mp4(path)
    assert clip.fps == 16 and torch.isfinite(clip.pixels).all() and clip.pixels.std() > 0.01
    return clip.pixels


MODES = {
    "causal": (["a red fox"], {}, 21),
    "causal_4step": (["a red fox"], {}, 21),
    "causal with an average of the weights": (["a red fox", "--part", "generator_ema"], {"model": "forced.pt"}, 21),
    "causal, long by rollouts": (["a red fox", "--rollouts", "3"], {}, 3 * (21 - 9)),
    "causal_window, one long stream": (["a red fox", "--frames", "106"], {}, 106),
    "bidirectional": (["a red fox"], {}, 21),
    "teacher_euler": (["a red fox"], {"model": None}, 21),
    "teacher_unipc": (["a red fox"], {"model": None}, 21),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_a_video(mode, place, capsys):
    arguments, options, frames = MODES[mode]
    pixels = video(place, capsys, mode.replace(",", "").split()[0], *arguments, **options)
    assert pixels.shape == (frames, 3, 16, 32)


def test_everything_may_happen_in_a_stream_of_wan(place, capsys):
    """Pictures, videos, prompts and policies through the same session as in the tiny world; and it replays."""
    video(place, capsys, "causal", "a red fox", "--frames", "9", out="source.mp4")
    steered = ["--prompts-at", "0:a red fox;10:the snow", "--on-prompt", "recache", "--video", place / "source.mp4",
               "--strength", "0.7", "--cache", "{name: sink_window, window_frames: 3}", "--frames", "33"]  # fmt: skip
    made = video(place, capsys, "causal", *steered, "--record", place / "s.session", "--stream", out="grown.mp4")
    again = video(place, capsys, "causal", "--replay", place / "s.session", "--stream", out="again.mp4")
    assert made.shape == (33, 3, 16, 32) and torch.equal(made, again)
    (place / "p.png").write_bytes(png(np.full((20, 40, 3), 200, np.uint8)))
    pixels = video(place, capsys, "causal", "a red fox", "--image", place / "p.png", "--image-as", "alone", out="i.mp4")
    assert pixels.shape == (21, 3, 16, 32)
    code, _, err = generate(place, capsys, "bidirectional", "a red fox", "--cache", "window")
    assert code == 2 and "needs a causal student" in err


@pytest.mark.slow
def test_seeds_prompts_negative_prompt_and_size_matter_and_nothing_else(place, capsys):
    one = video(place, capsys, "bidirectional", "a red fox")
    assert torch.equal(one, video(place, capsys, "bidirectional", " a  red fox"))  # the prompt is cleaned
    assert not torch.equal(one, video(place, capsys, "bidirectional", "a red fox", "--seed", "1"))
    assert not torch.equal(one, video(place, capsys, "bidirectional", "the snow"))
    wide = video(place, capsys, "bidirectional", "a red fox", "--height", "32", "--width", "16")
    assert wide.shape == (21, 3, 32, 16)
    teacher = [
        video(place, capsys, "teacher_euler", "a red fox", *more, model=None)
        for more in ([], ["--negative", "snow"], ["--set", "teacher_sampling.guidance=1.0"])
    ]
    assert not torch.equal(teacher[0], teacher[1]) and not torch.equal(teacher[0], teacher[2])


def test_the_negative_prompt_acts_where_there_is_guidance(place, capsys):
    """And the spec's own, given by hand, is that of the spec."""
    made = [
        video(place, capsys, "teacher_euler", "a red fox", "--frames", "1", *more, model=None)
        for more in ([], ["--negative", "blurred , bad"], ["--negative", "the snow"])
    ]
    assert torch.equal(made[0], made[1]) and (made[0] - made[2]).abs().max() > 0.02


def test_a_longer_stream_begins_as_the_short_one(place, capsys):
    short = video(place, capsys, "causal", "a red fox", "--frames", "10")
    long = video(place, capsys, "causal", "a red fox")
    assert len(short) == 10 and (short[:9] - long[:9]).abs().mean() < 0.05  # but for what the mp4 loses


def test_prompts_from_a_file_and_several_seeds_fill_a_folder(place, capsys):
    code, _, err = generate(
        place, capsys, "bidirectional", "--prompts", place / "prompts.txt", "--seed", "3", "--seed", "4", out="many"
    )
    assert code == 0, err
    listed = json.loads((place / "many" / "videos.json").read_text())["videos"]
    assert [(v["prompt"], v["seed"]) for v in listed] == [
        ("a red fox", 3), ("a red fox", 4), ("the snow", 3), ("the snow", 4),
    ]  # fmt: skip
    assert all(len(read_mp4(place / "many" / v["file"]).pixels) == v["frames"] == 21 for v in listed)
    alone = video(place, capsys, "bidirectional", "the snow", "--seed", "3")
    assert torch.equal(alone, read_mp4(place / "many" / "0001_seed3.mp4").pixels)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red fox\r\nthe snow\r\n".encode())
    assert wan_generation.read_prompts(tmp_path / "prompts.txt") == ["a red fox", "the snow"]


def test_overlapping_rollouts_hand_over_the_last_block(place):
    """The second rollout starts from the first one's end: one frame encoded anew, and the other latents of a block."""
    request = wan_generation.Request(str(place / "causal.yaml"), in_folder(place), ["a"], place / "x.mp4", rollouts=2,
                                     model=place / "model.pt")  # fmt: skip
    studio = wan_generation.Studio(request)
    texts = studio.world.text_encoder.encode(["a red fox"])
    starts, latents = [], []
    true = studio._sampler().__class__.stream

    def spy(self, model, shape, text, draw, cache=None, start=None):
        starts.append(start)
        made = list(true(self, model, shape, text, draw, cache, start))
        latents.append(torch.cat([*([start] if start is not None else []), *(block.latents for block in made)], 1))
        return iter(made)

    studio._sampler().__class__.stream = spy
    try:
        pixels = torch.cat(list(studio._overlapping(texts, 0, lambda done, note="": None)))
    finally:
        studio._sampler().__class__.stream = true
    codec = studio.world.codec
    whole = codec.decode(latents[0])
    assert starts[0] is None and latents[0].shape == latents[1].shape == (1, 6, 16, 2, 4) and len(pixels) == 24
    assert torch.equal(starts[1][:, 1:], latents[0][:, -2:])
    assert torch.allclose(starts[1][:, :1], codec.encode(whole[:, 12:13]), atol=1e-5)
    assert torch.equal(latents[1][:, :3], starts[1])


WRONG = [
    (["causal"], {}, "give a prompt, or a file"),
    (["causal", " "], {}, "the prompt is empty"),
    (["causal", "a", "--height", "40"], {}, "multiples of 16, got 40x32"),
    (["causal", "a", "--height", "36"], {}, "multiples of 16, got 36x32"),
    (["causal", "a", "--rollouts", "2", "--frames", "99"], {}, "exclude each other"),
    (["bidirectional", "a", "--rollouts", "2"], {}, "needs a causal student"),
    (["causal", "a"], {"model": "forced.pt"}, "holds several models: choose one with --part: generator, gener"),
    (["causal", "a", "--dtype", "fp8"], {}, "no dtype 'fp8'; accepted: bf16"),
    (["causal", "a", "--device", "banana"], {}, "--device: torch knows no 'banana'"),
    (["causal", "a", "--device", "cuda:7"], {}, "--device: there is no 'cuda:7' here"),
    (["causal", "a"], {"out": "runs"}, "--out must be an mp4 file"),
    (["causal", "a"], {"out": "clip.gif"}, "--out must be an mp4 file, and not"),
    (["causal", "a"], {"out": "prompts.txt/clip.mp4"}, "prompts.txt/clip.mp4 can't be written (Not a directory: "),
    (["causal", "a", "--seed", "1", "--seed", "2"], {"out": "prompts.txt"}, "--out must be a folder"),
    (["causal", "a", "--negative", "bad"], {}, "--negative has no effect with spec"),
    (
        ["teacher_euler", "a", "--negative", "bad", "--set", "teacher_sampling.guidance=1.0"],
        {"model": None},
        "teacher_sampling.guidance is 1; leave it out",
    ),
    (["causal", "a", "--seed", "1", "--seed", "2"], {}, "--out must be a folder"),
    (["causal", "--prompts", "nowhere.txt"], {}, "prompts nowhere.txt can't be read"),
    (["causal", "a"], {"model": None}, "give the student's weights with --model"),
    (["teacher_euler", "a", "--set", "model.heads=6"], {"model": None}, "than the spec's: heads 4 (the spec's is 6)"),
    (["causal", "a", "--set", "model.layers=3"], {}, "missing model.blocks.2."),
    (["causal", "a", "--set", "model.lairs=3"], {}, "did you mean 'layers'"),
    (["causal", "a", "--set", "world.codec.base_dim=16"], {}, "does not fit the VAE"),
    (["causal", "a"], {"model": "nowhere.pt"}, "do not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "message"), WRONG, ids=[w[2][:30] for w in WRONG])
def test_what_is_wrong_is_one_error(arguments, options, message, place, capsys):
    (place / "runs").mkdir(exist_ok=True)
    code, _, err = generate(place, capsys, *arguments, **{"out": "bad.mp4", **options})
    assert code == 2 and message in err and not (place / "bad.mp4").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--weights", "x"], "--weights: only with --spec"),
        (["a", "--out", "clip.gif"], "--out must be an mp4 file, and not clip.gif"),
        (["a", "--out", "/dev/null/clip.mp4"], "/dev/null/clip.mp4 can't be written (Not a directory: /dev/null)"),
        (["a", "--spec", "wan/causal"], "--spec needs --weights"),
        (["a", "--spec", "wan/causal", "--run", "tiny/causvid"], "exclude each other"),
        (["a", "--seed", "1", "--seed", "2"], "several seeds: only with --spec"),
        (["a", "--spec", "tiny/causvid", "--weights", "x"], "is not of Wan2.1"),
        (
            ["a", "--spec", "wan/causal", "--weights", "x", "--model", "no", "--device", "cpu"],
            "weights no do not exist",
        ),
    ],
)
def test_options_that_do_not_go_together_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", *arguments])
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_type_of_the_network_may_be_half(place, capsys):
    whole = video(place, capsys, "bidirectional", "a red fox")
    half = video(place, capsys, "bidirectional", "a red fox", "--dtype", "bf16")
    assert 0 < (whole - half).abs().mean() < 0.3


class Curved:
    """A denoiser in closed form, nonlinear in x and t."""

    def __call__(self, x, t, text, **options):
        t = t[:, :, None, None, None]
        return DenoiserOutput(x, t[:, :, 0, 0, 0], torch.sin(3 * x) * (0.5 + t) + x, "velocity")


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("shift", [1.0, 8.0])
def test_unipc_is_that_of_diffusers(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
    )
    scheduler.set_timesteps(steps)
    ours = UniPC(steps, shift)
    ours.times = scheduler.sigmas.double()  # theirs starts closer to 1 than Wan's release does
    text = Text(torch.zeros(2, 1, 1))
    x = noise = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    for step, t in zip(scheduler.timesteps, ours.times[:-1], strict=True):
        velocity = Curved()(x, torch.full((2, 1), float(t), dtype=torch.float64), text).velocity
        x = scheduler.step(velocity, step, x, return_dict=False)[0]
    found = ours(Curved(), noise, text, text).last
    assert (found - x).abs().max() < 1e-4


def test_unipc_is_of_second_order():
    """On a path with a known end: halving the step divides the error by about four, and Euler's by about two."""
    from causvid.samplers.ode import Euler

    text = Text(torch.zeros(1, 1, 1))
    noise = torch.full((1, 1, 1, 1, 1), 0.7, dtype=torch.float64)

    class Path:
        """Data of standard deviation s: x_t is known for all t."""

        def __call__(self, x, t, text, **options):
            t, s = t[:, :, None, None, None], 0.5
            variance = (1 - t) ** 2 * s**2 + t**2
            return DenoiserOutput(x, t[:, :, 0, 0, 0], x * (t - (1 - t) * s**2) / variance, "velocity")

    def error(sampler):
        start = float(sampler.times[0])
        exact = 0.7 * 0.5 / math.sqrt((1 - start) ** 2 * 0.25 + start**2)
        return abs(float(sampler(Path(), noise, text, text).last) - exact)

    assert 3 < error(UniPC(20)) / error(UniPC(40)) < 6
    assert 1.6 < error(Euler(20)) / error(Euler(40)) < 2.4
    assert error(UniPC(20)) < error(Euler(20)) / 5


def test_the_base_folder_is_found_as_it_lies(place):
    assert wan_files.find(in_folder(place)).layout == "official"

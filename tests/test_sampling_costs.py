"""What ``causvid plan`` tells of making and encoding a clip, against PyTorch's counters of FLOPs and memory."""

from __future__ import annotations

import json
import re

import pytest
import torch
from live_memory import Live
from test_costs import call, cut  # noqa: F401  (a fixture)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causvid import build, cost_lines, costs, sampling_costs, spec
from causvid.models.umt5 import Umt5
from causvid.models.wan_vae import VaeState, WanVae
from causvid.randomness import Draw
from causvid.types import Text


def peak(work, network, *held):
    """Bytes at the peak of some work, with what is there before it: a network's weights, and tensors."""
    live = Live(*network.parameters(), *network.buffers(), *held)
    with torch.no_grad(), live:
        work()
    return live.peak


def count(work):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def vae():
    pytest.importorskip("diffusers")
    codec = WanVae(base_dim=16)
    codec.__dict__["network"] = codec.empty().eval()
    return codec


@pytest.mark.parametrize("frames", [1, 3])
def test_flops_of_the_vae_are_those_that_the_counter_counts(vae, frames):
    latents = torch.zeros(1, frames, 16, 4, 6)
    assert count(lambda: vae.decode(latents)) == pytest.approx(vae.decoding(frames, 4, 6).flops, rel=0.02)
    pixels = torch.zeros(1, 1 + 4 * (frames - 1), 3, 32, 48)
    assert count(lambda: vae.encode(pixels)) == pytest.approx(vae.encoding(frames, 4, 6).flops, rel=0.02)


@pytest.mark.slow
def test_memory_of_the_vae_is_what_it_takes(vae):
    """Within 15% beside the weights, on the CPU at a sixth of the width: whole clips, blocks and encoding."""
    height, width, frames = 4, 6, 3
    weights = sum(p.nbytes for p in vae.network.parameters())
    latents = torch.zeros(1, frames, 16, height, width)
    state = VaeState()
    for _ in range(2):
        state = vae.decode_block(latents, state).state
    kept = [each for each in state.features if isinstance(each, torch.Tensor)]
    work, shown = vae.decoding(frames, height, width), 2.0 * 4 * 3 * 64 * height * width * (4 * frames)
    assert sum(each.nbytes for each in kept) == pytest.approx(work.state, rel=0.02)
    whole = peak(lambda: vae.decode(latents), vae.network) - weights
    assert work.state + work.most + shown == pytest.approx(whole, rel=0.15)
    block = peak(lambda: vae.decode_block(latents, state), vae.network, *kept) - weights
    assert 2 * work.state + work.most + shown == pytest.approx(block, rel=0.15)
    pixels, work = torch.zeros(1, 9, 3, 8 * height, 8 * width), vae.encoding(frames, height, width)
    measured = peak(lambda: vae.encode(pixels), vae.network, pixels) - weights
    assert work.state + work.most + pixels.nbytes == pytest.approx(measured, rel=0.15)


def made(arm):
    """The network of a spec that samples, and the cost of a clip less the codec's."""
    world, rule = build.World(arm), build.student_rule(arm)
    (cost,) = [each for each in sampling_costs.of(arm, ["distill"]) if each.stage == "generate"]
    return world, build.network(arm, world, rule).eval(), cost


@pytest.mark.parametrize("mask", ["block_causal", "{name: sliding_window, block_frames: 2, window_frames: 4}"])
def test_flops_of_a_stream_are_those_that_the_counter_counts(cut, mask):  # noqa: F811
    arm = spec.load(cut, [f"causal.mask={mask}", "precision=fp32"])
    world, model, cost = made(arm)
    sampler = build.construct(arm["student.sampler"], times=build.student_times(arm))
    text, draw = Text(torch.zeros(1, 12, 32)), Draw(0, "generate", 0, [0])
    flops = count(lambda: sampler(model, world.latent_shape, text, draw))
    assert flops == cost.flops - world.codec.decoding(*world.latent_shape[:1], *world.latent_shape[2:]).flops


def test_flops_of_the_teacher_and_of_a_bidirectional_student():
    """Passes through the whole clip: 50 steps with guidance, or three."""
    for name, passes in (("wan/teacher_euler", 100), ("wan/teacher_unipc", 100), ("wan/bidirectional", 3)):
        arm = spec.load(name)
        world = build.World(arm)
        net = costs.network(arm, world, build.teacher_rule(arm))
        _, cost = sampling_costs.of(arm, [])
        assert cost.flops == passes * net.forward + world.codec.decoding(21, 60, 104).flops
        assert cost.memory["weights"] == 2 * 1_418_996_800 and "cache" not in cost.memory


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layers", "ffn_dim", "frames"), [(3, 768, 12), (12, 192, 6)])
def test_memory_of_a_stream_and_of_a_pass_is_what_they_take(cut, layers, ffn_dim, frames, dtype):  # noqa: F811
    """Within 15%, at reduced width: the last block before a full cache, committed; and a whole clip in one pass."""
    arm = spec.load(cut, [f"model.layers={layers}", f"model.ffn_dim={ffn_dim}", "precision=fp32",
                          f"world.dataset.shape=[{frames}, 16, 16, 16]"])  # fmt: skip
    world = build.World(arm)
    rule = build.student_rule(arm)
    model = build.network(arm, world, rule).to(dtype).eval()
    net, text = costs.network(arm, world, rule), Text(torch.zeros(1, 12, 32, dtype=dtype))
    weights, each = sum(p.nbytes for p in model.parameters()), torch.zeros((), dtype=dtype).element_size()
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    cached, working = sampling_costs._stream_memory(rule, frames, net, name, each)
    cache, x, t = model.new_cache(), torch.zeros(1, 3, 16, 16, 16, dtype=dtype), torch.zeros(1, 3)
    with torch.no_grad():
        for _ in range(frames // 3 - 1):
            cache = model(x, t, text, cache=cache, commit=True).cache
    kept = [part for _, blocks in cache.blocks for pair in blocks for part in pair]
    assert cached * (frames - 3) / frames == sum(part.nbytes for part in kept)
    block = peak(lambda: model(x, t, text, cache=cache, commit=True), model, *kept)
    # The last block is never committed, so that its own keys and values are counted once, in the cache.
    assert weights + sum(part.nbytes for part in kept) + working == pytest.approx(block, rel=0.15)
    clip = torch.zeros(1, frames, 16, 16, 16, dtype=dtype)
    whole = peak(lambda: model(clip, torch.zeros(1, frames), text), model)
    told = weights + net.tokens * each * (15 * net.dim + 2 * net.ffn_dim)
    assert told == pytest.approx(whole, rel=0.15)


def test_a_guided_clip_of_the_teacher_takes_two_rows():
    """Both halves are one pass (measured above), so what it works on is twice what it is without guidance."""
    guided, plain = (
        sampling_costs.of(spec.load("wan/teacher_euler", ["world.codec=identity", *changes]), [])[-1]
        for changes in ([], ["teacher_sampling.guidance=1.0"])
    )
    assert guided.memory["activations"] == 2 * plain.memory["activations"]


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_a_pass_of_the_teacher_is_what_it_takes(cut, precision, guidance):  # noqa: F811
    """Within 15%, as ode_pairs makes it: fp32 weights, under autocast where the spec says bf16, with its guidance."""
    changes = [f"precision={precision}", f"teacher_sampling.guidance={guidance}"]
    arm = spec.load(cut, [*changes, "world.dataset.shape=[6, 16, 16, 16]"])
    world = build.World(arm)
    model: nn.Module = build.network(arm, world, build.teacher_rule(arm)).eval()
    noise, text = torch.zeros(2, *world.latent_shape), Text(torch.zeros(2, 12, 32))
    sampler = build.teacher_sampler(arm, 2)
    measured = peak(lambda: sampler(model, noise, text, text), model)
    (cost,) = costs.of(arm, ["ode_pairs"], 1)
    assert cost.peak == pytest.approx(measured, rel=0.15), cost.memory


def test_the_cache_of_the_released_sizes():
    """In bf16 all 21 latent frames of a clip; or the window's 21, less the three of the block at work."""
    for name, frames in (("wan/causal", 21), ("wan/causal_window", 18)):
        _, cost = sampling_costs.of(spec.load(name), [])
        assert abs(cost.memory["cache"] / 2**30 - 5.6 * frames / 21) < 0.05
        assert cost.memory["codec"] == 507_609_880 and cost.memory["codec state"] > 3.5e9


ENCODERS = [(256, 2, 4, 1280, 64), (512, 1, 32, 64, 256)]


@pytest.mark.parametrize(("dim", "layers", "heads", "ffn_dim", "length"), ENCODERS)
def test_what_a_prompt_takes_is_counted(dim, layers, heads, ffn_dim, length):
    """Weights exactly, FLOPs to 2%, memory to 15%: by its feed-forward, and by its attention."""
    pytest.importorskip("transformers")
    encoder = Umt5(dim, layers, heads, ffn_dim, 64, length)
    model, work = encoder.empty().to(torch.bfloat16).eval(), encoder.encoding()
    tokens = torch.ones(1, length, dtype=torch.long)
    assert sum(p.numel() for p in model.parameters()) == encoder.parameters
    assert count(lambda: model(tokens)) == pytest.approx(work.flops, rel=0.02)
    weights = 2 * encoder.parameters
    assert weights + work.most == pytest.approx(peak(lambda: model(tokens), model, tokens), rel=0.15)


def test_the_released_text_encoder_is_told_beside_what_comes_after_it(capsys, tmp_path):
    text, _ = sampling_costs.of(spec.load("wan/causal"), [])
    assert text.parameters == 5_680_910_336 and 11.3e9 < text.memory["weights"] < text.peak < 11.5e9
    for name in ("wan/causal", "wan/causal_dmd"):
        status, _, err = call(capsys, name, "runtime.memory=8GB", "--runs", str(tmp_path))
        assert status == 0 and "text one prompt, before any network is loaded: 5.68 G parameters" in err
        assert "text does not fit into 8GB; encode on the CPU first" in err
    status, _, err = call(capsys, "tiny/causvid", "--runs", str(tmp_path))
    assert status == 0 and "one prompt" not in err


SAMPLERS = ["causal", "causal_4step", "causal_window", "bidirectional", "teacher_euler", "teacher_unipc", "teacher_14b"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_plan_of_a_spec_that_only_samples_is_what_it_runs(name, capsys, tmp_path):
    status, out, err = call(capsys, f"wan/{name}", "--json", "--runs", str(tmp_path))
    (row,) = json.loads(out)
    assert status == 0 and row["stage"] == "generate" and row["cost"]["flops"] > 1e14
    assert row["state"] == f"by 'causvid generate --spec wan/{name}'"
    status, out, err = call(capsys, f"wan/{name}", "runtime.memory=4GB", "--runs", str(tmp_path))
    assert status == 0 and out.split()[0] == "generate" and len(out.splitlines()) == 1
    assert "distill" not in err and "generate one clip:" in err and "generate does not fit into 4GB" in err


def test_clips_are_encoded_where_the_data_are_latents(capsys, tmp_path):
    status, _, err = call(capsys, "wan/ode_pairs", "--runs", str(tmp_path))
    assert status == 0 and "encode one clip:" in err and "generate one clip:" not in err
    status, _, err = call(capsys, "tiny/causvid", "--runs", str(tmp_path))
    assert status == 0 and "generate one clip:" in err and "encode one clip:" not in err


@pytest.mark.parametrize(("name", "gigabytes"), [("wan/teacher_14b", 31), ("wan/causal", 20), ("wan/causal", 14)])
def test_what_would_make_a_clip_fit_does_and_is_the_least_of_its_kind(name, gigabytes):
    arm, limit = spec.load(name), gigabytes * 1e9

    def peak(way):
        return next(c for c in sampling_costs.of(spec.load(name, way), []) if c.stage == "generate").peak

    ways = [re.findall(r"\S+=(?:{.*}|\S+)", way) for way in sampling_costs.remedies(arm, "generate", limit)]
    assert ways and peak([]) > limit and all(peak(way) <= limit for way in ways)
    for way in ways:
        if way[0].startswith("world.dataset.height"):
            height, width = (int(part.partition("=")[2]) for part in way)
            assert peak([f"world.dataset.height={height + 16}", f"world.dataset.width={width + 32}"]) > limit


def test_weights_alone_that_do_not_fit_have_no_remedy_and_json_says_so(capsys, tmp_path):
    """28.6 GB in bf16: no clip is small enough."""
    assert sampling_costs.remedies(spec.load("wan/teacher_14b"), "generate", 24e9) == []
    for memory, fits in (("24GB", False), ("48GB", True), ("null", None)):
        arguments = ["wan/teacher_14b", f"runtime.memory={memory}", "--json", "--runs", str(tmp_path)]
        status, out, _ = call(capsys, *arguments)
        (row,) = json.loads(out)
        assert status == 0 and row["cost"]["fits"] is fits and row["cost"]["remedies"] == []
    arm = spec.load("wan/teacher_14b", ["runtime.memory=24GB"])
    told = cost_lines.lines(arm, sampling_costs.of(arm, []))
    assert any(line.endswith("generate   does not fit into 24GB; no option here makes it fit") for line in told)

"""What a masked pass computes, a stream computes: for every causal rule, position policy and kernel that allows it."""

from __future__ import annotations

import itertools

import pytest
import torch

from causvid import registry
from causvid.attention.kernels import Sdpa
from causvid.attention.masks import Bidirectional, BlockCausal, SinkWindow, SlidingWindow
from causvid.attention.positions import Absolute, WindowRelative
from causvid.models.dit import VideoDiT
from causvid.types import Text

# Every registered causal rule must be here, in the forms worth telling apart.
RULES = {
    "block_causal": [BlockCausal(3), BlockCausal(2, 1), BlockCausal(1)],
    "sliding_window": [SlidingWindow(2, None, 4), SlidingWindow(3, 1, 4)],
    "sink_window": [SinkWindow(2, None, 4, 2), SinkWindow(3, 1, 3, 1)],
}
FRAMES = 8  # the last block of size 3 is short
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


def allowed():
    rules = itertools.chain.from_iterable(RULES.values())
    positions = [found.target() for found in registry.components("position").values()]
    kernels = [found.target() for found in registry.components("kernel").values()]
    for rule, position, kernel in itertools.product(rules, positions, kernels):
        try:
            kernel.check(rule, position)
        except ValueError:
            continue
        yield pytest.param(rule, position, kernel, id=f"{rule}-{type(position).__name__}-{type(kernel).__name__}")


combinations = list(allowed())


def make(rule, position=None, kernel=None, dtype=torch.float64, height=2, width=3):
    model = VideoDiT(
        2, 24, 32, 2, 2, 8, patch=(1, 1), freq_dim=16, mask=rule, position=position, kernel=kernel
    ).to(dtype)  # fmt: skip
    torch.nn.init.normal_(model.head.weight, std=0.2)
    x = torch.randn(2, FRAMES, 2, height, width, dtype=dtype)
    t = torch.rand(2, FRAMES, dtype=dtype)
    return model, x, t, Text(torch.randn(2, 4, 8, dtype=dtype))


def stream(model, x, t, text, rule=None):
    """Each block once, committed: predictions ``b f c h w``, and the last cache."""
    cache, parts = model.new_cache(rule), []
    for start, stop in cache.rule.blocks(x.shape[1]):
        out = model(x[:, start:stop], t[:, start:stop], text.frames(start, stop), cache=cache, commit=True)
        cache = out.cache
        parts.append(out.prediction)
    return torch.cat(parts, 1), cache


def test_every_causal_rule_is_tested():
    registered = {name for name, found in registry.components("mask").items() if found.target().causal}
    assert registered == set(RULES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "position", "kernel"), combinations)
@torch.no_grad()
def test_a_masked_pass_equals_the_stream(rule, position, kernel, dtype):
    """Property A, at any times."""
    model, x, t, text = make(rule, position, kernel, dtype)
    streamed, _ = stream(model, x, t, text)
    torch.testing.assert_close(model(x, t, text).prediction, streamed, atol=DTYPES[dtype], rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "position", "kernel"), combinations)
@torch.no_grad()
def test_inference_equals_the_teacher_forcing_pass(rule, position, kernel, dtype):
    """Property B: denoising over a context committed clean is the noisy half of [clean | noisy]."""
    model, x, t, text = make(rule, position, kernel, dtype)
    clean = torch.randn_like(x)
    forced = model(x, t, text, context=clean).prediction
    cache = model.new_cache()
    for start, stop in rule.blocks(FRAMES):
        part = slice(start, stop)
        out = model(x[:, part], t[:, part], text, cache=cache)
        torch.testing.assert_close(forced[:, part], out.prediction, atol=DTYPES[dtype], rtol=0)
        cache = model(clean[:, part], torch.zeros_like(t[:, part]), text, cache=cache, commit=True).cache


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize(("rule", "position", "kernel"), combinations)
@torch.no_grad()
def test_blocks_that_are_denoised_together_are_those_of_the_masked_pass(rule, position, kernel, done):
    """Behind what is committed, each block of a pass sees the earlier ones as they stand, and no later one."""
    model, x, t, text = make(rule, position, kernel)
    start, _ = rule.blocks(FRAMES)[done]
    cache = stream(model, x[:, :start], t[:, :start], text)[1] if done else model.new_cache()
    together = model(x[:, start:], t[:, start:], text, cache=cache).prediction
    torch.testing.assert_close(together, model(x, t, text).prediction[:, start:], atol=1e-10, rtol=0)


SIZES = [(3, 5), (8, 4), (1, 1)]  # tokens of 8 frames: 120, 256 (a multiple of 128), 8


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("rule", "position", "kernel"), combinations)
@torch.no_grad()
def test_the_properties_hold_on_any_grid(rule, position, kernel, height, width):
    """A and B and no influence of the future, where rows and columns are odd, alone, or a multiple of 128 tokens."""
    model, x, t, text = make(rule, position, kernel, height=height, width=width)
    masked = model(x, t, text).prediction
    torch.testing.assert_close(masked, stream(model, x, t, text)[0], atol=1e-10, rtol=0)
    clean = torch.randn_like(x)
    forced, cache = model(x, t, text, context=clean).prediction, model.new_cache()
    for start, stop in rule.blocks(FRAMES):
        part = slice(start, stop)
        out = model(x[:, part], t[:, part], text, cache=cache)
        torch.testing.assert_close(forced[:, part], out.prediction, atol=1e-10, rtol=0)
        cache = model(clean[:, part], torch.zeros_like(t[:, part]), text, cache=cache, commit=True).cache
    last = rule.blocks(FRAMES)[-1][0]
    changed = torch.cat([x[:, :last], torch.randn_like(x[:, last:])], 1)
    assert torch.equal(masked[:, :last], model(changed, t, text).prediction[:, :last])


@pytest.mark.parametrize(("rule", "position", "kernel"), combinations)
@torch.no_grad()
def test_diffusion_forcing_is_neither_unless_the_context_is_clean(rule, position, kernel):
    """Property C: block i agrees with inference only where every block it sees stands at t = 0."""
    model, x, t, text = make(rule, position, kernel)
    clean = torch.randn_like(x)
    noisy_context, forced = model(x, t, text).prediction, model(x, t, text, context=clean).prediction
    second, last = rule.blocks(FRAMES)[1][0], rule.blocks(FRAMES)[-1][0]
    assert not torch.allclose(noisy_context[:, second:], forced[:, second:], atol=1e-3)
    mixed = torch.cat([clean[:, :last], x[:, last:]], 1)
    times = torch.cat([torch.zeros_like(t[:, :last]), t[:, last:]], 1)
    torch.testing.assert_close(model(mixed, times, text).prediction[:, last:], forced[:, last:], atol=1e-10, rtol=0)


@pytest.mark.parametrize(("rule", "position", "kernel"), combinations)
@torch.no_grad()
def test_teacher_forcing_sees_no_later_block_and_no_clean_frame_of_its_own(rule, position, kernel):
    model, x, t, text = make(rule, position, kernel)
    clean, start = torch.randn_like(x), rule.blocks(FRAMES)[-1][0]
    before = model(x, t, text, context=clean).prediction
    other_clean = torch.cat([clean[:, :start], torch.randn_like(clean[:, start:])], 1)
    other = torch.cat([x[:, :start], torch.randn_like(x[:, start:])], 1)
    assert torch.equal(before, model(x, t, text, context=other_clean).prediction)
    assert torch.equal(before[:, :start], model(other, t, text, context=other_clean).prediction[:, :start])


@pytest.mark.parametrize(("rule", "position", "kernel"), combinations)
def test_no_output_depends_on_a_later_block(rule, position, kernel):
    model, x, t, text = make(rule, position, kernel)
    start = rule.blocks(FRAMES)[-1][0]
    changed = torch.cat([x[:, :start], torch.randn_like(x[:, start:])], 1)
    with torch.no_grad():
        assert torch.equal(model(x, t, text).prediction[:, :start], model(changed, t, text).prediction[:, :start])


def test_no_gradient_reaches_a_later_block():
    model, x, t, text = make(BlockCausal(3))
    x.requires_grad_()
    model(x, t, text).prediction[:, :3].sum().backward()
    assert x.grad[:, :3].abs().sum() > 0 and not x.grad[:, 3:].any()


def test_the_bidirectional_mask_has_no_stream():
    model, x, t, text = make(Bidirectional())
    with pytest.raises(ValueError, match="no stream"):
        model.new_cache()
    changed = torch.cat([x[:, :-1], torch.randn_like(x[:, -1:])], 1)
    assert not torch.equal(model(x, t, text).prediction[:, :1], model(changed, t, text).prediction[:, :1])


@torch.no_grad()
def test_a_stream_under_another_rule_equals_the_masked_pass_under_that_rule():
    model, x, t, text = make(BlockCausal(2), WindowRelative())
    rule = SinkWindow(2, None, 4, 2)
    other = make(rule, WindowRelative())[0]
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(stream(model, x, t, text, rule)[0], other(x, t, text).prediction, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rule", [BlockCausal(2, 1), SlidingWindow(2, None, 4)])
@torch.no_grad()
def test_relative_positions_equal_absolute_ones_without_sinks(rule):
    model, x, t, text = make(rule, Absolute())
    other = make(rule, WindowRelative())[0]
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(stream(model, x, t, text)[0], stream(other, x, t, text)[0], atol=1e-10, rtol=0)


@torch.no_grad()
def test_with_sinks_relative_positions_differ():
    rule = SinkWindow(2, None, 2, 2)
    model, x, t, text = make(rule, Absolute())
    other = make(rule, WindowRelative())[0]
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(stream(model, x, t, text)[0], stream(other, x, t, text)[0], atol=1e-6)


@torch.no_grad()
def test_denoising_leaves_the_cache_as_it_was():
    model, x, t, text = make(BlockCausal(2))
    _, cache = stream(model, x[:, :4], t[:, :4], text)
    before = [k.clone() for _, layers in cache.blocks for k, _ in layers]
    out = model(x[:, 4:6], t[:, 4:6], text, cache=cache)
    assert out.cache is cache and cache.frames == (0, 1, 2, 3)
    assert all(torch.equal(a, k) for a, (k, _) in zip(before, (p for _, ls in cache.blocks for p in ls), strict=True))


@pytest.mark.parametrize("rule", [BlockCausal(3), SinkWindow(2, None, 2, 1)])
def test_gradients_through_a_stream_equal_those_of_the_masked_pass(rule):
    model, x, t, text = make(rule)
    model(x, t, text).prediction.pow(2).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    stream(model, x, t, text)[0].pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_text_per_frame_streams_as_it_is_masked():
    model, x, t, _ = make(BlockCausal(3))
    text = Text(torch.randn(2, FRAMES, 4, 8, dtype=x.dtype))
    torch.testing.assert_close(model(x, t, text).prediction, stream(model, x, t, text)[0], atol=1e-10, rtol=0)


@torch.no_grad()
def test_cross_attention_is_kept_per_prompt_and_renewed_by_a_new_one():
    model, x, t, text = make(BlockCausal(3))
    other = Text(torch.randn_like(text.embeddings))
    cache = model.new_cache()
    first = model(x[:, :3], t[:, :3], text, cache=cache).prediction
    assert torch.equal(first, model(x[:, :3], t[:, :3], text, cache=cache).prediction)
    switched = model(x[:, :3], t[:, :3], other, cache=cache).prediction
    assert torch.equal(switched, model(x[:, :3], t[:, :3], other, cache=model.new_cache()).prediction)
    assert not torch.allclose(first, switched)


@torch.no_grad()
def test_a_window_holds_a_constant_number_of_bytes():
    model, x, t, text = make(SinkWindow(2, None, 4, 2))
    cache, sizes = model.new_cache(), []
    for _ in range(30):
        cache = model(x[:, :2], t[:, :2], text, cache=cache, commit=True).cache
        sizes.append(cache.bytes)
    # Sinks, and what the next block's window of 4 leaves to earlier frames: 2.
    assert len(set(sizes[3:])) == 1 and cache.frames == (0, 1, 58, 59)


def test_a_stream_commits_one_block_at_a_time_and_ends_with_a_short_one():
    model, x, t, text = make(BlockCausal(3))
    with pytest.raises(ValueError, match="1 to 3 frames"):
        model(x[:, :4], t[:, :4], text, cache=model.new_cache(), commit=True)
    cache = model(x[:, :2], t[:, :2], text, cache=model.new_cache(), commit=True).cache
    with pytest.raises(ValueError, match="the stream has ended"):
        model(x[:, :3], t[:, :3], text, cache=cache)


class GappedWindow(SlidingWindow):
    """A rule of a user's own: a window, and the first block for ever."""

    def sees(self, query, key):
        return super().sees(query, key) | ((key < self.block_frames) & (key < self._end(query)))


@torch.no_grad()
def test_positions_ask_the_rule_itself_whether_it_leaves_gaps():
    """Not its class: ranks close the gap of any rule, and a kernel that rotates each key once must refuse it."""
    rule = GappedWindow(2, None, 2)
    model, x, t, text = make(rule, WindowRelative())
    torch.testing.assert_close(model(x, t, text).prediction, stream(model, x, t, text)[0], atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="use kernel 'blockwise'"):
        Sdpa().check(rule, WindowRelative())


def test_what_would_be_ignored_is_refused():
    model, x, t, text = make(BlockCausal(2))
    with pytest.raises(ValueError, match="positions are for a masked pass"):
        model(x[:, :2], t[:, :2], text, cache=model.new_cache(), positions=torch.tensor(4))
    with pytest.raises(ValueError, match="needs a causal mask"):
        make(Bidirectional())[0](x, t, text, context=x)

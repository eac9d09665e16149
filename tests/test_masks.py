"""The visibility rules against plain oracles, and everything that is derived from them against the predicate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from causvid.attention import rope
from causvid.attention.kernels import Blockwise, Flex, Grid, Sdpa
from causvid.attention.masks import Bidirectional, BlockCausal, Pattern, SinkWindow, SlidingWindow
from causvid.attention.positions import Absolute, WindowRelative

RULES = [
    Bidirectional(), BlockCausal(1), BlockCausal(3), BlockCausal(3, 1), SlidingWindow(2, None, 4),
    SlidingWindow(3, 2, 7), SinkWindow(2, None, 4, 2), SinkWindow(3, 1, 3, 2),
]  # fmt: skip


def block_of(rule, frame):
    """Block number by counting blocks out one by one."""
    if isinstance(rule, Bidirectional):
        return 0
    block, end = 0, rule.first_block_frames or rule.block_frames
    while frame >= end:
        block, end = block + 1, end + rule.block_frames
    return block


def oracle(rule, query, key):
    """Visibility written out from its description."""
    if isinstance(rule, Bidirectional):
        return True
    if block_of(rule, key) > block_of(rule, query):
        return False
    end = (rule.first_block_frames or rule.block_frames) + block_of(rule, query) * rule.block_frames
    in_window = not isinstance(rule, SlidingWindow) or key >= end - rule.window_frames
    return in_window or (isinstance(rule, SinkWindow) and key < rule.sink_frames)


@pytest.mark.parametrize("rule", RULES)
def test_sees_agrees_with_the_description(rule):
    for query in range(14):
        for key in range(14):
            assert bool(rule.sees(query, key)) == oracle(rule, query, key), (query, key)


@pytest.mark.parametrize("rule", RULES)
def test_blocks_partition_the_frames(rule):
    blocks = rule.blocks(11)
    assert [frame for start, stop in blocks for frame in range(start, stop)] == list(range(11))
    assert all(len({block_of(rule, frame) for frame in range(*block)}) == 1 for block in blocks)
    if rule.causal:
        assert [rule.block_range(i)[0] for i in range(len(blocks))] == [start for start, _ in blocks]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.causal])
def test_a_cache_keeps_what_any_later_block_sees(rule):
    for block in range(5):
        frames = range(rule.block_range(block)[1])
        later = range(rule.block_range(block + 1)[0], rule.block_range(block + 6)[1])
        assert rule.kept(block, frames) == [k for k in frames if any(oracle(rule, q, k) for q in later)]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.causal])
def test_teacher_forcing_shows_earlier_blocks_clean_and_the_own_block_noisy(rule):
    count = 8
    matrix = Pattern(rule, count, teacher_forcing=True).matrix()
    for q in range(count):
        for k in range(count):
            same, sees = block_of(rule, q) == block_of(rule, k), oracle(rule, q, k)
            assert bool(matrix[q, k]) == sees
            assert not matrix[q, count + k]
            assert bool(matrix[count + q, count + k]) == same
            assert bool(matrix[count + q, k]) == (sees and not same)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_form_says_what_the_predicate_says(rule, forced):
    pattern, tokens = Pattern(rule, 7, forced), 3
    matrix, dense = pattern.matrix(), pattern.dense(tokens)
    index = torch.arange(pattern.slots * tokens)
    by_token = pattern.mask_mod(tokens)(torch.tensor(0), torch.tensor(0), index[:, None], index[None])
    assert torch.equal(dense, by_token.expand_as(dense))
    assert [slot for group in pattern.groups for slot in range(*group.queries)] == list(range(pattern.slots))
    for group in pattern.groups:
        for slot in range(*group.queries):
            assert matrix[slot].nonzero().flatten().tolist() == list(group.keys)


@given(st.integers(1, 5), st.integers(0, 6), st.integers(0, 4), st.integers(1, 12))
def test_a_query_always_sees_its_own_block(block, extra, sink, frames):
    rule = SinkWindow(block, None, block + extra, sink) if sink else SlidingWindow(block, None, block + extra)
    for start, stop in rule.blocks(frames):
        assert all(rule.sees(q, k) for q in range(start, stop) for k in range(start, stop))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: BlockCausal(0), "block_frames"), (lambda: BlockCausal(2, 3), "first_block_frames"),
        (lambda: SlidingWindow(3, None, 2), "window_frames"), (lambda: SinkWindow(3, None, 3, 0), "sink_frames"),
    ],
)  # fmt: skip
def test_impossible_rules_are_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def plain_attention(q, k, v, pattern, grid):
    """Softmax attention in the simplest words."""
    rotations = grid.rotations(torch.arange(pattern.slots) % pattern.count)
    q, k = rope.rotate(q, rotations), rope.rotate(k, rotations)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(
        ~pattern.dense(grid.tokens_per_frame, q.device), -torch.inf
    )
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("size", [(2, 3), (8, 16)])  # 6 and 128 tokens per frame
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_kernels_agree_with_plain_attention(rule, forced, size):
    count = 5 if size == (2, 3) else 3
    pattern = Pattern(rule, count, forced)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        grid = Grid(*size, 6, 10000.0, dtype, torch.device("cpu"))
        q, k, v = (torch.randn(2, 2, pattern.slots * grid.tokens_per_frame, 6, dtype=dtype) for _ in range(3))
        wanted = plain_attention(q, k, v, pattern, grid)
        for kernel in (Sdpa(), Blockwise(), Flex()):
            got = kernel.plan(pattern, Absolute(), grid)(q, k, v)
            torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_blockwise_gradients_equal_dense_ones(rule):
    pattern, grid = Pattern(rule, 6), Grid(1, 2, 6, 100.0, torch.float64, torch.device("cpu"))
    qkv = [torch.randn(2, 1, 12, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.randn(2, 1, 12, 6, dtype=torch.float64)
    gradients = []
    for kernel in (Sdpa(), Blockwise()):
        out = (kernel.plan(pattern, Absolute(), grid)(*qkv) * weights).sum()
        gradients.append(torch.autograd.grad(out, qkv))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_kernels_refuse_what_they_cannot_express_by_name():
    for kernel, name in ((Sdpa(), "sdpa"), (Flex(), "flex")):
        with pytest.raises(ValueError, match=f"'{name}'.*WindowRelative.*SinkWindow.*'blockwise'"):
            kernel.check(SinkWindow(), WindowRelative())
        kernel.check(SlidingWindow(), WindowRelative())
    Blockwise().check(SinkWindow(), WindowRelative())


def test_flex_refuses_to_train_on_the_cpu():
    pattern, grid = Pattern(BlockCausal(1), 2), Grid(1, 2, 6, 100.0, torch.float32, torch.device("cpu"))
    q = torch.randn(1, 1, 4, 6, requires_grad=True)
    with pytest.raises(ValueError, match="no backward on the CPU"):
        Flex().plan(pattern, Absolute(), grid)(q, q, q)


def test_rotary_scores_depend_on_differences_alone_at_any_distance():
    q, k = torch.randn(2, 12, dtype=torch.float64)

    def score(a, b):
        rotations = rope.table(torch.tensor([a, b]), 1, 1, 12, 10000.0, torch.float64)
        return (rope.rotate(q[None, None, None], rotations[:1]) * rope.rotate(k[None, None, None], rotations[1:])).sum()

    torch.testing.assert_close(score(5, 2), score(100_005, 100_002), atol=1e-9, rtol=0)
    assert not torch.isclose(score(5, 2), score(5, 3))


def test_rotary_equals_sines_and_cosines():
    x = torch.randn(1, 1, 1, 12, dtype=torch.float64)
    rotations = rope.table(torch.tensor([7]), 1, 1, 12, 100.0, torch.float64)
    assert rope.split_pairs(12) == (2, 2, 2) and rope.split_pairs(128) == (22, 21, 21)
    angles = torch.tensor([7.0, 7.0 / 10, 0, 0, 0, 0], dtype=torch.float64)  # rates 1 and 100^(-1/2) along time
    a, b = x[..., 0::2], x[..., 1::2]
    wanted = torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)
    torch.testing.assert_close(rope.rotate(x, rotations), wanted)
    assert F.mse_loss(x.norm(), rope.rotate(x, rotations).norm()) < 1e-20

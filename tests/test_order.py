"""The order of rows: epochs differ, ranks are disjoint and cover all, and a resume needs the step alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causvid.data.order import Order

VIDEO, IMAGE = (21, 4, 8, 8), (1, 4, 8, 8)


def rows(count, prefix="r"):
    return [f"{prefix}{n}" for n in range(count)]


@settings(deadline=None)  # a busy machine is no failure
@given(count=st.integers(1, 40), batch=st.integers(1, 6), world=st.integers(1, 4), seed=st.integers(0, 5))
def test_every_epoch_reads_every_row_once_whatever_the_ranks(count, batch, world, seed):
    orders = [Order({VIDEO: rows(count)}, batch, seed, rank, world) for rank in range(world)]
    needed = -(-3 * count // (batch * world))
    stream = [key for step in range(needed) for order in orders for key in order.step(step)]
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == sorted(rows(count))
    alone = [key for keys in Order({VIDEO: rows(count)}, 1, seed).steps(0, len(stream)) for key in keys]
    assert stream == alone  # the global order does not depend on ranks or batches


def test_ranks_of_a_step_are_disjoint_and_epochs_differ():
    orders = [Order({VIDEO: rows(24)}, 4, 0, rank, 3) for rank in range(3)]
    epochs = []
    for epoch in range(4):
        steps = [[order.step(2 * epoch + n) for order in orders] for n in range(2)]
        read = [key for step in steps for part in step for key in part]
        assert sorted(read) == sorted(rows(24))
        epochs.append(tuple(read))
    assert len(set(epochs)) == 4
    assert Order({VIDEO: rows(24)}, 4, 1).step(0) != Order({VIDEO: rows(24)}, 4, 0).step(0)


def test_a_resume_at_any_step_gives_the_same_remaining_order():
    order = Order({VIDEO: rows(10), IMAGE: rows(7, "i")}, 3, 5)
    whole = list(order.steps(0, 40))
    for step in (1, 7, 19, 39):
        assert list(Order({IMAGE: rows(7, "i"), VIDEO: rows(10)}, 3, 5).steps(step, 40)) == whole[step:]


def test_images_and_videos_take_turns_in_batches_of_their_own():
    order = Order({VIDEO: rows(12), IMAGE: rows(24, "i")}, 2, 0, batches={IMAGE: 8})
    steps = list(order.steps(0, 9))  # one cycle: 6 of videos, 3 of images
    kinds = [{key[0] for key in keys} for keys in steps]
    assert all(len(kind) == 1 for kind in kinds) and kinds.count({"i"}) == 3
    assert {len(keys) for keys, kind in zip(steps, kinds, strict=True) if kind == {"i"}} == {8}
    assert sorted(key for keys in steps for key in keys) == sorted(rows(12) + rows(24, "i"))


@pytest.mark.parametrize(
    ("buckets", "batch", "rank", "world"),
    [({}, 1, 0, 1), ({VIDEO: []}, 1, 0, 1), ({VIDEO: ["a"]}, 0, 0, 1), ({VIDEO: ["a"]}, 1, 2, 2)],
)
def test_impossible_orders_are_refused(buckets, batch, rank, world):
    with pytest.raises(ValueError, match="at least one row|must be positive"):
        Order(buckets, batch, 0, rank, world)

"""The order in which tasks draw examples, and groups take part in steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.data.order import JointOrder, make_order

SIZES = {"sst": 10, "para": 7, "sts": 3}


def drawn_in(order, epoch):
    """All draws of an epoch, `i64[T, E]`."""
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return np.concatenate([order.at(k) for k in steps], axis=1)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 9))
def test_each_epoch_draws_every_example_equally_often(long, short, batch_size, seed):
    sizes, epochs = {"a": long, "b": short}, 2
    order = make_order(sizes, batch_size, seed)
    size = max(sizes.values())
    assert order.steps_per_epoch == -(-size // batch_size)
    drawn = [drawn_in(order, epoch) for epoch in range(epochs)]
    for t, n in enumerate(sizes.values()):
        counts = [np.bincount(epoch[t], minlength=n) for epoch in drawn]
        assert set(counts[0].tolist()) <= {size // n, -(-size // n)}
        assert all(count.sum() == size for count in counts)
        if n == size:
            assert all((count == 1).all() for count in counts)


def test_order_is_a_pure_function_of_seed_and_step():
    one, again = (make_order(SIZES, 4, seed=0) for _ in range(2))
    for k in (5, 0, 8, 5):
        np.testing.assert_array_equal(one.at(k), again.at(k))
    other = make_order(SIZES, 4, seed=1)
    assert (drawn_in(one, 0) != drawn_in(other, 0)).any()
    assert (drawn_in(one, 0)[0] != drawn_in(one, 1)[0]).any()  # reshuffled in each epoch


def test_the_order_of_a_task_does_not_depend_on_its_group():
    alone = make_order({"sst": 10}, 4, seed=0)
    together = make_order({"para": 10, "sst": 10}, 4, seed=0)
    alone, together = drawn_in(alone, 0), drawn_in(together, 0)
    np.testing.assert_array_equal(alone[0], together[1])
    assert (together[0] != together[1]).any()  # but not as another task is


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.data())
def test_every_group_takes_all_its_steps_and_each_step_as_many_groups(counts, data):
    order = JointOrder((), tuple(counts))
    parts = np.array([order.takes_part(step) for step in range(order.steps)])
    assert parts.sum(0).tolist() == counts
    assert order.taken(0) == [0] * len(counts) and order.taken(order.steps) == counts
    assert parts[:, np.argmax(counts)].all()
    assert np.ptp(parts.sum(1)) <= 1
    stops = tuple(data.draw(st.integers(0, count)) for count in counts)
    ended = JointOrder((), order.counts, stops)
    short = np.array([ended.takes_part(step) for step in range(order.steps)])
    assert short.sum(0).tolist() == list(stops) and not (short & ~parts).any()


@pytest.mark.parametrize("count", [10, 64, 500])
def test_a_groups_steps_are_spread_over_the_run(count):
    order = JointOrder((), (1000, 700, count, 64))
    taken = np.array([order.taken(step)[2] for step in range(1001)])
    assert np.abs(taken - np.arange(1001) * count / 1000).max() < 3

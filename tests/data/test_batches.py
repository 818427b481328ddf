"""Batches: pure functions of (seed, step); nothing lost, nothing twice."""

import dataclasses
import itertools
import time
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.data import batches
from jaxlora.data import order as order_module
from jaxlora.data.batches import (
    Batch,
    PackedBatches,
    VectorBatches,
    choose_batch_shapes,
    prefetch,
)
from jaxlora.data.order import JointOrder, make_order
from jaxlora.data.packing import Shape, fitting
from jaxlora.data.tokenized import Examples

SIZES = {"sst": 10, "para": 7, "sts": 3}
PAIR = {"sst": 1, "para": 2, "sts": 2}


def make_examples(name, count, longest=20):
    """Every token of a task is a different number, so that each can be followed."""
    rng = np.random.default_rng(len(name))
    sizes = rng.integers(3, longest, count * PAIR[name])
    offsets = np.cumsum([0, *sizes])
    tokens = 1 + np.arange(offsets[-1], dtype=np.int32)
    labels = np.arange(count, dtype=np.float32) + 1
    return Examples(np.arange(count).astype(str), tokens, offsets, labels, PAIR[name])


@pytest.fixture(scope="module", params=[False, True], ids=["separate", "mixed"])
def packed(request):
    examples = {name: make_examples(name, count) for name, count in SIZES.items()}
    order = JointOrder((make_order(SIZES, 4, seed=0),), (9,))
    return choose_batch_shapes(examples, order, max_length=32, most=2, mixed=request.param)


def view(rows, task):
    """A task's rows, and the number of its first slot, whether the tasks share rows or not."""
    if rows.tokens.ndim == 3:
        return jax.tree.map(lambda x: x[task], rows), 0
    assert rows.cls_index.shape == (3 * 8,)
    return rows, task * 8


def sentence_of(rows, task, slot):
    mine, first = view(rows, task)
    return mine.tokens.ravel()[mine.segment_ids.ravel() == first + slot + 1]


def test_weights_mark_the_last_partial_batch(packed):
    for number in range(9):
        real = 2 if number % 3 == 2 else 4  # 10 examples: 4 + 4 + 2
        batch = packed[number]
        np.testing.assert_array_equal(batch.weights, [[1] * real + [0] * (4 - real)] * 3)
        assert not batch.labels[:, real:].any()
        assert [len(drawn) for drawn in packed.order.at(number)] == [real] * 3


def test_sets_of_classes_have_a_row_of_labels_for_each_class():
    examples = {name: make_examples(name, count) for name, count in SIZES.items()}
    sets = np.random.default_rng(0).integers(0, 2, (7, 5)).astype(np.float32)
    examples["para"] = dataclasses.replace(examples["para"], labels=sets)
    order = JointOrder((make_order(SIZES, 4, seed=0),), (9,))
    batches = choose_batch_shapes(examples, order, max_length=32, most=2, mixed=True)
    for number in range(9):
        sst, para, sts = order.at(number)
        batch, size = batches[number], len(sst)
        assert batch.labels.shape == (1 + 5 + 1, 4) and batch.weights.shape == (3, 4)
        np.testing.assert_array_equal(batch.labels[0, :size], examples["sst"].labels[sst])
        np.testing.assert_array_equal(batch.labels[1:6, :size], sets[para].T)
        np.testing.assert_array_equal(batch.labels[6, :size], examples["sts"].labels[sts])
        assert not batch.labels[:, size:].any()


def test_packed_tokens_are_the_examples_tokens(packed):
    for number in range(9):
        batch, chosen = packed[number], packed.order.at(number)
        assert batch.inputs.cls_index.size == 3 * 8
        assert batch.inputs.tokens.shape[-2:] in packed.shapes
        total = 0
        for t, examples in enumerate(packed.examples.values()):
            rows, zero = view(batch.inputs, t)
            for b, example in enumerate(chosen[t]):
                assert batch.labels[t, b] == examples.labels[example]
                for k in range(examples.sentences):
                    sentence = examples.sentence(example * examples.sentences + k)
                    slot = b + 4 * k
                    np.testing.assert_array_equal(sentence_of(batch.inputs, t, slot), sentence)
                    assert rows.tokens.ravel()[rows.cls_index[zero + slot]] == sentence[0]
                    total += len(sentence)
        assert (batch.inputs.segment_ids > 0).sum() == total  # and nothing else


def test_vectors_take_the_slots_that_sentences_take(packed):
    vectors = {
        name: e.tokens[e.offsets[:-1], None].astype(np.float32)  # a sentence's first token
        for name, e in packed.examples.items()
    }
    ready = VectorBatches(packed.examples, packed.order, vectors)
    for number in range(9):
        a, b = packed[number], ready[number]
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.weights, b.weights)
        for t, slot in itertools.product(range(3), range(8)):
            expected = sentence_of(a.inputs, t, slot)[:1].tolist() or [0]
            assert b.inputs[t, slot].tolist() == expected


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_run_has_at_most_the_requested_number_of_shapes(packed, most):
    planned = choose_batch_shapes(packed.examples, packed.order, 128, most, packed.mixed)
    assert 1 <= len(planned.shapes) <= most
    assert {planned[k].inputs.tokens.shape[-2:] for k in range(9)} <= set(planned.shapes)


def test_prefetch_from_the_middle_equals_indexing(packed):
    for (step, found), number in itertools.zip_longest(prefetch(packed, 3), range(3, 9)):
        assert isinstance(found, Batch) and step == number
        expected = packed[number]
        for a, b in zip(found.inputs, expected.inputs, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_array_equal(found.weights, expected.weights)


def test_first_sentences_come_before_second_ones():
    single, pair = make_examples("sst", 3), make_examples("sts", 3)
    assert batches.slot_count({"sst": single}, 4) == 4
    assert batches.slot_count({"sst": single, "sts": pair}, 4) == 8
    assert batches.sentence_numbers(pair, np.array([2, 0])).tolist() == [4, 0, 5, 1]
    assert batches.slot_numbers(pair, 2, 4).tolist() == [0, 1, 4, 5]


def test_a_batch_that_fits_no_shape_gets_rows_of_its_own(packed):
    small = (Shape(1, 32),)
    found = PackedBatches(packed.examples, packed.order, small, packed.mixed)[0].inputs
    tokens = packed[0].inputs.tokens
    assert sorted(found.tokens[found.tokens > 0]) == sorted(tokens[tokens > 0])


@pytest.mark.parametrize("block", [1, 4, 8])
def test_each_block_of_a_mixed_row_belongs_to_one_task(block):
    examples = {name: make_examples(name, count) for name, count in SIZES.items()}
    orders = tuple(make_order({name: count}, 4, seed=0) for name, count in SIZES.items())
    order = JointOrder(orders, (9, 4, 2), (9, 3, 2))  # para ends early
    made = choose_batch_shapes(examples, order, max_length=30, most=2, mixed=True, block=block)
    assert all(shape.length % block == 0 for shape in made.shapes)
    seen = set()
    for step in range(9):
        batch = made[step]
        seen |= {batch.inputs.tokens.shape}
        task = (batch.inputs.segment_ids - 1) // 8
        blocks = task.reshape(-1, block)
        for tasks in blocks:
            assert len(set(tasks.tolist()) - {-1}) <= 1
        there = [t for t in range(3) if (task == t).any()]
        parts = order.takes_part(step)
        assert there == [t for t, taken in enumerate(parts) if taken]
        assert batch.weights.any(-1).tolist() == parts
        drawn = order.at(step)
        expected = [
            token
            for (name, e), numbers in zip(examples.items(), drawn, strict=True)
            for n in batches.sentence_numbers(e, numbers)
            for token in e.sentence(n)
        ]
        assert sorted(batch.inputs.tokens[task >= 0]) == sorted(expected)
    assert seen <= set(made.shapes)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 32), min_size=1, max_size=12), min_size=1, max_size=3),
    st.integers(1, 4),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_every_batch_of_a_long_run_fits_though_few_are_sampled(
    sizes, batch_size, mixed, most, looked_at, multiple
):
    examples = {}
    for task, lengths in enumerate(sizes):
        offsets, labels = np.cumsum([0, *lengths]), np.zeros(len(lengths), np.float32)
        tokens = np.ones(offsets[-1], np.int32)
        examples[str(task)] = Examples(labels.astype(str), tokens, offsets, labels, 1)
    order = make_order({name: len(e) for name, e in examples.items()}, batch_size, seed=0)
    steps = 2 * order.steps_per_epoch
    joint = JointOrder((order,), (steps,))
    with mock.patch.object(batches, "MAX_SAMPLED", looked_at):
        planned = choose_batch_shapes(examples, joint, 32, most, mixed, multiple)
        again = choose_batch_shapes(examples, joint, 32, most, mixed, multiple)
    assert planned.shapes == again.shapes
    seen = {planned[k].inputs.tokens.shape[-2:] for k in range(steps)}  # raises if one does not fit
    assert seen <= set(planned.shapes)
    assert all(shape.rows % multiple == 0 for shape in planned.shapes)
    if steps <= looked_at:
        assert len(planned.shapes) <= most
    else:
        assert len(planned.shapes) <= max(2, most) + 1


@pytest.mark.parametrize("most", [1, 3])
def test_the_shapes_of_the_paper_preset_are_chosen_from_few_batches(monkeypatch, most):
    """454,820 steps; the lengths are random, as long as those of SST-5, Quora and STS are."""
    rng, looked_at = np.random.default_rng(0), []
    examples = {}
    for name, count, mean in (("sst", 8544, 25), ("para", 363_846, 16), ("sts", 5749, 15)):
        sizes = np.minimum(rng.gamma(4, mean / 4, count * PAIR[name]).astype(int) + 3, 128)
        offsets, labels = np.concatenate([[0], np.cumsum(sizes)]), np.zeros(count, np.float32)
        examples[name] = Examples(labels, np.zeros(0, np.int32), offsets, labels, PAIR[name])
    order = make_order({name: len(e) for name, e in examples.items()}, 8, seed=0)
    at = order_module.Order.at
    monkeypatch.setattr(
        order_module.Order, "at", lambda self, step: looked_at.append(step) or at(self, step)
    )
    began = time.monotonic()
    joint = JointOrder((order,), (454_820,))
    planned = choose_batch_shapes(examples, joint, 128, most, mixed=most == 3)
    assert time.monotonic() - began < 60
    assert len(looked_at) <= batches.MAX_SAMPLED
    assert max(looked_at) == 454_819 and min(looked_at) == 0
    assert len(planned.shapes) <= max(2, most) + 1
    # Any batch fits, the one of the longest sentences, too.
    longest = [np.sort(e.lengths)[::-1][: 8 * e.sentences] for e in examples.values()]
    fitting(planned.shapes, [np.concatenate(longest)] if most == 3 else longest)


def test_no_shape_of_a_short_run_has_a_row_that_no_batch_needs(packed):
    filled = dict.fromkeys(packed.shapes, 0)
    for number in range(9):
        inputs = packed[number].inputs
        rows = inputs.tokens.any(-1).sum(-1).max()  # of a batch, or of its largest task
        shape = inputs.tokens.shape[-2:]
        filled[shape] = max(filled[shape], rows)
    assert filled == {shape: shape.rows for shape in packed.shapes}

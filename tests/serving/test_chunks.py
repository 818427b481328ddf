"""Chunks: every token of every sentence in one place, in the few shapes that programs are for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.data.tokenized import Examples
from jaxlora.serving import chunks

quick = settings(max_examples=80, deadline=None)
drawn = st.lists(st.integers(2, 40) | st.integers(2, 200), min_size=1, max_size=120)


def examples(lengths):
    """Sentences of different tokens, so that none can be taken for another."""
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    labels = np.zeros(len(lengths), np.float32)
    return Examples(labels.astype(str), tokens, np.cumsum([0, *lengths]), labels, 1)


@quick
@given(drawn, st.integers(1, 5), st.booleans(), st.sampled_from([200, 256]))
def test_each_sentence_is_whole_in_one_chunk_of_a_known_shape(lengths, owners, few, longest):
    check(lengths, owners, few, longest)


@pytest.mark.parametrize("longest", [16, 32, 100])
def test_many_sentences_are_whole_too(longest):
    lengths = np.random.default_rng(0).integers(2, longest + 1, 600).tolist()
    check(lengths, 1, False, longest)
    check(lengths, 40, False, longest)


def check(lengths, owners, few, longest):
    data = examples(lengths)
    owner = np.arange(len(lengths)) % owners
    known = chunks.every_shape(longest, mixed=True)
    seen = []
    for numbers, rows, of_block in chunks.chunks(data, longest, owner, few):
        shape = chunks.Shape(*rows.tokens.shape)
        block = shape.length // of_block.shape[1]
        assert (shape, block) in known
        assert len(rows.cls_index) == chunks.slots(shape) >= len(numbers)
        for slot, number in enumerate(numbers):
            mine = rows.segment_ids == slot + 1
            np.testing.assert_array_equal(rows.tokens[mine], data.sentence(number))
            np.testing.assert_array_equal(rows.positions[mine], np.arange(lengths[number]))
            assert rows.tokens.ravel()[rows.cls_index[slot]] == data.sentence(number)[0]
            assert set(np.repeat(of_block, block, 1)[mine]) == {owner[number]}
        assert (rows.segment_ids <= len(numbers)).all()
        seen += numbers.tolist()
    assert sorted(seen) == list(range(len(lengths)))


@quick
@given(drawn)
def test_few_programs_are_one_for_each_row_length(lengths):
    found = chunks.plan(np.array(lengths), 200, few_programs=True)
    assert all(len(set(one.shapes)) == 1 for one in found)
    assert len({one.shapes[0].length for one in found}) == len(found)


@quick
@given(drawn)
def test_no_plan_costs_more_than_one_chunk_for_each_sentence_or_the_longest_rows_alone(lengths):
    lengths = np.array(lengths)
    cost = sum(chunks._cost(one.shapes) for one in chunks.plan(lengths, 200))
    rows = chunks.packing.place(lengths, 200).rows
    assert cost <= chunks._cost(chunks._cheapest(rows, chunks.row_counts(200, 200), 200))
    if lengths.max() <= 64:
        assert cost <= chunks._cost([chunks.Shape(1, 64)] * len(lengths))


@pytest.mark.parametrize("mean", [12, 20, 40])
def test_many_sentences_have_little_padding(mean):
    lengths = np.clip(np.random.default_rng(0).poisson(mean, 500), 2, 128)
    found = chunks.plan(lengths, 128)
    tokens = sum(shape.tokens for one in found for shape in one.shapes)
    assert tokens <= 1.1 * lengths.sum()


def test_a_few_long_sentences_do_not_make_all_rows_long():
    found = chunks.plan(np.array([20] * 300 + [500]), 512)
    assert {one.shapes[0].length: len(one.numbers) for one in found} == {64: 300, 512: 1}


def test_a_small_set_is_not_worth_a_second_program():
    lengths = np.array([20] * 100 + [90])
    assert len(chunks.plan(lengths, 128)) == 2
    assert len(chunks.plan(lengths, 128, few_programs=True)) == 1
    assert len(chunks.plan(np.tile(lengths, 100), 128, few_programs=True)) == 2


@quick
@given(st.integers(0, 500), st.sampled_from([16, 64, 128, 512]))
def test_rows_are_covered_at_the_least_cost(rows, length):
    """By dynamic programming over all covers."""
    sizes = chunks.row_counts(length, length)
    price = {size: chunks._cost([chunks.Shape(size, length)]) for size in sizes}
    least = [0.0]
    for n in range(1, rows + 1):
        least.append(min(price[size] + least[max(n - size, 0)] for size in sizes))
    shapes = chunks._cheapest(rows, sizes, length)
    assert sum(shape.rows for shape in shapes) >= rows
    assert chunks._cost(shapes) == pytest.approx(least[rows])

"""Packing: every token in exactly one place, in as few shapes as were asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.data import packing
from jaxlora.data.packing import Shape, choose_shapes, fill, fitting, place, place_by_owner

ROW = 16
lengths = st.lists(st.integers(1, ROW), max_size=40)
quick = settings(max_examples=60, deadline=None)


@quick
@given(lengths)
def test_place_never_overlaps_and_never_leaves_the_row(sizes):
    where = place(sizes, ROW)
    taken = np.zeros((where.rows, ROW), int)
    for row, start, size in zip(where.row, where.start, sizes, strict=True):
        assert start + size <= ROW
        taken[row, start : start + size] += 1
    assert taken.max(initial=0) <= 1
    assert taken.sum() == sum(sizes)
    assert -(-sum(sizes) // ROW) <= where.rows <= len(sizes)
    assert set(where.row.tolist()) == set(range(where.rows))  # no empty row


@quick
@given(
    st.lists(st.tuples(st.integers(1, 32), st.integers(0, 5)), min_size=1, max_size=40),
    st.sampled_from([1, 8, 32]),
)
def test_each_block_has_one_owner_and_each_token_its_place(drawn, block):
    sizes, owner = map(np.array, zip(*drawn, strict=True))
    where = place_by_owner(sizes, owner, 32, block)
    taken = np.full((where.rows, 32), -1)
    for row, start, size, mine in zip(where.row, where.start, sizes, owner, strict=True):
        assert start + size <= 32 and (taken[row, start : start + size] == -1).all()
        taken[row, start : start + size] = mine
    for part in taken.reshape(-1, block):
        assert len(set(part.tolist()) - {-1}) <= 1


def test_sentences_of_one_owner_are_placed_as_if_there_were_no_owners():
    sizes = [10, 9, 7, 6, 16, 20, 3]
    where = place_by_owner(sizes, np.zeros(7, int), 32, 8)
    np.testing.assert_array_equal(where.row, place(sizes, 32).row)
    np.testing.assert_array_equal(where.start, place(sizes, 32).start)


def test_what_an_owner_has_is_split_where_two_owners_would_not_share_a_row():
    """Four sentences of each of 64 owners take 72 tokens: more than half a row of 128."""
    where = place_by_owner([18] * 256, np.arange(256) % 64, 128, 8)
    assert where.rows <= 1.25 * (64 * 72 / 128)


def test_an_owner_with_many_sentences_fills_whole_rows():
    """Three sentences of 20 tokens fit a row of 64, and only one fits half a row."""
    assert place_by_owner([20] * 60, np.arange(60) % 2, 64, 8).rows == 20


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [([], 0), ([16], 1), ([8, 8], 1), ([9, 8], 2), ([10, 9, 7, 6], 2), ([6, 7, 9, 10], 2)],
)
def test_place_uses_the_fewest_rows_of_small_cases(sizes, rows):
    assert place(sizes, ROW).rows == rows


def test_a_sentence_longer_than_a_row_raises():
    with pytest.raises(ValueError, match="17 tokens does not fit rows of 16"):
        place([3, 17], ROW)


@quick
@given(lengths, st.integers(0, 3))
def test_fill_puts_every_token_once(sizes, spare):
    ends = np.cumsum([0, *sizes])
    tokens = np.arange(1, ends[-1] + 1)  # all different, none 0
    sentences = [tokens[a:b] for a, b in itertools.pairwise(ends)]
    shape = Shape(place(sizes, ROW).rows + spare, ROW)
    slots = [2 * n for n in range(len(sizes))]  # gaps: odd slots have no sentence
    rows = fill(sentences, slots, 2 * len(sizes) + 1, shape)
    assert rows.tokens.shape == rows.positions.shape == rows.segment_ids.shape == shape
    assert sorted(rows.tokens[rows.tokens > 0].tolist()) == tokens.tolist()
    np.testing.assert_array_equal(rows.segment_ids > 0, rows.tokens > 0)
    for sentence, slot in zip(sentences, slots, strict=True):
        mine = rows.segment_ids.ravel() == slot + 1
        np.testing.assert_array_equal(rows.tokens.ravel()[mine], sentence)
        np.testing.assert_array_equal(rows.positions.ravel()[mine], np.arange(len(sentence)))
        assert rows.tokens.ravel()[rows.cls_index[slot]] == sentence[0]
    assert not rows.cls_index[1::2].any()


def test_fill_refuses_too_few_rows():
    with pytest.raises(ValueError, match="2 rows needed, 1 given"):
        fill([np.ones(9, int)] * 2, [0, 1], 2, Shape(1, ROW))


batches = st.lists(st.lists(st.integers(1, 128), min_size=1, max_size=12), min_size=1, max_size=25)


@quick
@given(batches, st.integers(1, 3))
def test_chosen_shapes_hold_every_batch(batches, most):
    columns = (64, 128)
    needs = np.array([[place(b, c).rows if max(b) <= c else 0 for c in columns] for b in batches])
    shapes = choose_shapes(needs, columns, most)
    assert 1 <= len(shapes) <= most
    assert shapes == sorted(shapes, key=lambda s: s.tokens)
    for batch in batches:
        sizes = np.array(batch)
        shape = fitting(shapes, [sizes])
        assert shape in shapes and place(sizes, shape.length).rows <= shape.rows
        for cheaper in (s for s in shapes if s.tokens < shape.tokens):
            assert sizes.max() > cheaper.length or place(sizes, cheaper.length).rows > cheaper.rows


def test_a_second_program_must_pay_for_itself():
    needs = np.array([[1]] * 100 + [[4]])
    few, many = needs, np.repeat(needs, 20, axis=0)
    assert choose_shapes(few, (64,), 2) == [Shape(4, 64)]  # saves 100·3·64 < 30,000 tokens
    assert choose_shapes(many, (64,), 2) == [Shape(1, 64), Shape(4, 64)]


def test_a_shape_must_hold_every_task():
    shapes = [Shape(1, 64), Shape(2, 64), Shape(1, 128)]
    short, long = np.array([10]), np.array([60, 60])
    assert fitting(shapes, [short]) == Shape(1, 64)
    assert fitting(shapes, [short, long]) == Shape(2, 64)
    assert fitting(shapes, [short, np.array([100])]) == Shape(1, 128)


@pytest.mark.parametrize(
    ("most", "expected"), [(128, (64, 96, 128)), (64, (64,)), (32, (32,)), (65, (64, 65))]
)
def test_row_lengths_end_with_the_longest(most, expected):
    assert packing.row_lengths(most) == expected

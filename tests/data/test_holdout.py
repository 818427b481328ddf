"""A dev set that is held out of the training rows."""

import hashlib
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data.holdout import hold_out
from jaxlora.data.raw_examples import UNLABELLED, TextExample
from jaxlora.tasks.task import Task

TASK = Task("t", "classification", classes=("a", "b", "c"))
ROWS = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([0.0, 1.0, 2.0, math.nan])), max_size=60
)


def make(cells):
    return [TextExample(str(n), f"text {text}", "", label) for n, (text, label) in enumerate(cells)]


@given(cells=ROWS, share=st.floats(0.01, 0.99))
def test_each_row_is_on_one_side_and_equal_texts_are_together(cells, share):
    rows = make(cells)
    train, dev = hold_out(rows, share, TASK)
    assert sorted(int(row.id) for row in train + dev) == list(range(len(rows)))
    assert [row.id for row in dev] == sorted((row.id for row in dev), key=int)
    labelled = {row.sentence1 for row in train if not math.isnan(row.label)}
    assert not labelled & {row.sentence1 for row in dev}
    assert not any(math.isnan(row.label) for row in dev)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_each_class_gives_its_share(share):
    cells = [(n, float(n % 10 > 6) + (n % 10 == 9)) for n in range(1000)]
    _, dev = hold_out(make(cells), share, TASK)
    assert Counter(row.label for row in dev) == {
        label: round(share * count) for label, count in Counter(c for _, c in cells).items()
    }


def test_the_order_of_the_rows_does_not_matter_and_few_change_sides_when_more_come():
    rows = make([(n, float(n % 3)) for n in range(600)])
    held = {row.id for row in hold_out(rows[:500], 0.2, TASK)[1]}
    mixed = rows[:500]
    random.Random(0).shuffle(mixed)
    assert {row.id for row in hold_out(mixed, 0.2, TASK)[1]} == held
    later = {row.id for row in hold_out(rows, 0.2, TASK)[1]}
    assert len(held - later) < 20  # of 100; a random split would lose 80


def test_a_class_with_one_text_stays_with_the_training_rows():
    rows = make([(0, 0.0), (1, 0.0), (2, 1.0), (3, UNLABELLED)])
    train, dev = hold_out(rows, 0.5, TASK)
    assert [row.label for row in dev] == [0.0]
    assert len(train) == 3


def test_scores_are_one_class():
    rows = [TextExample(str(n), str(n), "", n / 7) for n in range(50)]
    assert len(hold_out(rows, 0.2, Task("t", "regression"))[1]) == 10


def test_the_texts_with_the_smallest_checksums_are_held_out():
    """By no order of a set, which differs between processes."""
    rows = make([(n, 0.0) for n in range(50)])
    checksums = {hashlib.sha256(f"{row.sentence1}\0".encode()).hexdigest(): row.id for row in rows}
    expected = {checksums[checksum] for checksum in sorted(checksums)[:10]}
    assert {row.id for row in hold_out(rows, 0.2, TASK)[1]} == expected


@given(
    sets=st.lists(st.sets(st.integers(0, 3)).map(lambda s: tuple(sorted(s))), max_size=60),
    share=st.floats(0.01, 0.99),
)
def test_sets_are_stratified_by_their_rarest_class(sets, share):
    task = Task("t", "multilabel", classes=("a", "b", "c", "d"))
    rows = make(enumerate(sets))
    train, dev = hold_out(rows, share, task)
    counts = Counter(number for one in sets for number in one)
    rarest = [min(one, key=lambda n: (counts[n], n), default=None) for one in sets]
    held = Counter(rarest[int(row.id)] for row in dev)
    for stratum, size in Counter(rarest).items():
        assert held[stratum] == min(max(1, round(share * size)), size - 1)
    assert len(train) + len(dev) == len(rows)

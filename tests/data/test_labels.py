"""What labels say about their task."""

import dataclasses
import math
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.data.labels import WrongLabelError, count_sets, find_labels
from jaxlora.data.raw_examples import join_marks, parse_label, to_array
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError


@pytest.mark.parametrize(
    ("labels", "kind", "classes"),
    [
        (["yes", "no", "no"], "binary", ("no", "yes")),
        (["True", "False", "true"], "binary", ("False", "True")),
        (["spam", "ham"], "binary", ("ham", "spam")),
        (["1", "0", "1.0"], "binary", ("0", "1")),
        (["1.0", "0.0"], "binary", ("0", "1")),
        (["c", "a", "b"], "classification", ("a", "b", "c")),
        (["10", "2", "1"], "classification", ("1", "2", "10")),
        (["3.0", "2.0", "1.0"], "classification", ("1", "2", "3")),
        (["n/a", "yes", "maybe", "no"], "classification", ("maybe", "no", "yes")),
    ],
)
def test_kinds_and_classes_are_found(labels, kind, classes):
    found = find_labels(labels * 3)
    assert (found.kind, found.classes, found.range) == (kind, classes, None)


@pytest.mark.parametrize(
    "labels", [["1.5", "2"], [str(n) for n in range(21)], ["-3", "0", "1e-1"], ["7", "5", "9", "5"]]
)
def test_scores_are_found_with_their_range(labels):
    found = find_labels(labels)
    numbers = list(map(float, labels))
    assert (found.kind, found.range, found.classes) == (
        "regression",
        (min(numbers), max(numbers)),
        (),
    )


def test_every_label_is_counted_once_and_parsed_as_its_class():
    rng = random.Random(0)
    for names in (["yes", "YES", "no", ""], ["0", "1", "1.0"], ["a", "b", "c d"]):
        labels = rng.choices(names, k=200)
        found = find_labels(labels)
        assert sum(found.counts.values()) + found.missing == 200
        task = Task("t", found.kind, classes=found.classes)
        parsed = [parse_label(label, task, "x:1") for label in labels if label]
        for n, count in enumerate(found.counts.values()):
            assert parsed.count(n) == count


def test_the_order_of_rows_does_not_matter():
    labels = ["yes", "Yes", "no", "yes", "NO", "no"]
    random.Random(1).shuffle(labels)
    assert find_labels(labels).classes == find_labels(sorted(labels)).classes == ("no", "yes")


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (["a"] * 3, None, "every row has the label 'a'"),
        (["1.5"] * 3, None, "every row has the label 1.5"),
        (["", "NaN"], None, "no row has a label"),
        (["a", "b", "c"] * 9, "binary", r"two labels, not 3: 'a' \(9\)"),
        (["1", "x"], "regression", "label 'x' is not a number"),
        ([f"text {n}" for n in range(50)], None, "50 different labels in 50 rows"),
    ],
)
def test_labels_that_fit_no_task(labels, kind, message):
    with pytest.raises(ValueError, match=message):
        find_labels(labels, kind)


def test_words_for_yes_and_no():
    task = Task("t", "binary", classes=("no", "yes"))
    for word, label in {"True": 1, "FALSE": 0, "y": 1, "0": 0, "1.0": 1}.items():
        assert parse_label(word, task, "x:1") == label
    others = Task("t", "binary", classes=("yes", "no"))  # the other way round: which is meant?
    with pytest.raises(UserError, match="label 'true' is not one of yes, no"):
        parse_label("true", others, "x:1")
    with pytest.raises(UserError, match="label 'true'"):
        parse_label("true", Task("t", "binary", classes=("ham", "spam")), "x:1")


NAMES = ("bug", "billing", "login", "42")
SETS = st.lists(st.sets(st.sampled_from(NAMES)), min_size=1, max_size=30)
TAGS = Task("tags", "multilabel", classes=NAMES)


@given(sets=SETS, mark=st.sampled_from(["|", ", ", ";", " "]))
def test_sets_are_read_as_they_were_written(sets, mark):
    task = dataclasses.replace(TAGS, label_delimiter=mark)
    cells = [mark.join(one) for one in sets]
    parsed = [parse_label(cell, task, "x:1") for cell in cells]
    array = to_array(parsed, task)
    assert array.shape == (len(sets), 4)
    for row, one in zip(array, sets, strict=True):
        assert {name for name, there in zip(NAMES, row, strict=True) if there} == one
    if any(len(one) > 1 for one in sets):
        found = find_labels(cells, None, mark)
        counts = {name: sum(name in one for one in sets) for name in NAMES}
        assert (found.kind, found.empty) == ("multilabel", sets.count(set()))
        assert found.counts == {name: count for name, count in counts.items() if count}


@given(sets=SETS)
def test_columns_of_marks_are_the_same_sets(sets):
    words = (("0", "1"), ("no", "Yes"), ("False", "true"), ("0.0", "1.0"))
    for n, one in enumerate(sets):
        no, yes = words[n % len(words)]
        cells = [yes if name in one else no for name in NAMES]
        label = parse_label(join_marks(cells, NAMES, "|", "x:1"), TAGS, "x:1")
        assert {NAMES[number] for number in label} == one
    joined = ["|".join(one) for one in sets]
    found = count_sets(Counter(joined), "|", NAMES)
    assert found.classes == NAMES  # also of columns that are 0 in every row
    assert found.counts == {name: sum(name in one for one in sets) for name in NAMES}
    assert math.isnan(parse_label(join_marks(["", ""], NAMES[:2], "|", "x:1"), TAGS, "x:1"))


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["a|b", "b", "b|c", ""], "multilabel"),
        (["a", "b", "a|b"] * 3, "multilabel"),
        (["yes|no", "up|down"] * 9, "binary"),  # nothing recurs: two names with a bar
        (["a|b|c", "a|d|e"] * 9, "binary"),  # one of five recurs
        (["a,b", "b", "b,c", "c"] * 9, "classification"),  # a comma is not a usual delimiter
        (["a|", "a", "b"] * 9, "classification"),
    ],
)
def test_sets_are_found_only_where_there_is_no_doubt(cells, kind):
    assert find_labels(cells).kind == kind


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("bug|wrong", "'wrong' in 'bug|wrong' is not one of bug, billing"),
        ("bug;login", "check the delimiter of labels, '|'"),
        ("bug|login|bug", "a label is named twice in 'bug|login|bug'"),
        ("bug|", "'' in 'bug|' is not one of"),
    ],
)
def test_cells_that_are_no_sets(cell, message):
    with pytest.raises(UserError, match=f"x.csv:7: .*{re.escape(message)}"):
        parse_label(cell, TAGS, "x.csv:7")


def test_columns_of_marks_with_other_values():
    with pytest.raises(UserError, match=r"x:3: column 'billing' has '2'; .*each is 0 or 1"):
        join_marks(["1", "2"], NAMES[:2], "|", "x:3")
    with pytest.raises(UserError, match="column 'bug' has ''"):
        join_marks(["", "1"], NAMES[:2], "|", "x:3")


@pytest.mark.parametrize(
    ("cells", "mark", "message"),
    [
        (["a", "b", "a"], ";", "';' never occurs; name the `label_delimiter`"),
        (["", "nan"], "|", "no row has a label"),
        (["a||b", "a"], "|", r"'a\|\|b' has nothing on one side"),
    ],
)
def test_columns_that_are_no_sets(cells, mark, message):
    with pytest.raises(ValueError, match=message):
        find_labels(cells, "multilabel", mark)


def test_ordinal_classes_without_an_order_are_named_by_the_user():
    assert find_labels(["2", "10", "1"] * 2, "ordinal").classes == ("1", "2", "10")
    with pytest.raises(ValueError, match="name them, the lowest first"):
        find_labels(["low", "high"], "ordinal")


def test_a_few_other_labels_among_scores_are_mistakes():
    scores = [f"{n % 7 / 3:.2f}" for n in range(98)]
    with pytest.raises(WrongLabelError, match=r"n\.b.* is not a number.*another `kind`") as caught:
        find_labels([*scores, "n.b.", "n.b."])
    assert caught.value.label == "n.b."
    assert find_labels([*scores, *["alpha", "beta"] * 20]).kind == "classification"
    stars = find_labels([*(str(n % 5) for n in range(98)), "?"])
    assert (stars.kind, stars.odd) == ("classification", ("?",))
    assert find_labels(["a", "b", "1"]).odd == ()

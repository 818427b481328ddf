"""What labels say about their task."""

import random

import pytest

from jaxlora.data.labels import find_labels
from jaxlora.data.raw_examples import parse_label
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

"""The demo data: the same everywhere, nothing leaks, labels follow the rules."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from jaxlora.data import demo
from jaxlora.data.grammars import question_frames, questions, reviews, scenes
from jaxlora.data.grammars.words import words
from jaxlora.data.raw_examples import sentences
from jaxlora.tasks.task import paper_tasks

TASKS = {task.name: task for task in paper_tasks()}
NAMES = tuple(TASKS)


def texts(name, split):
    return [s for row in demo.read(name)[split] for s in sentences(row, TASKS[name]).values()]


def tokens(name, split):
    """Every run of one to three words, lower case."""
    found = set()
    for text in texts(name, split):
        parts = re.findall(r"[a-z]+", text.lower())
        for n in (1, 2, 3):
            found.update(" ".join(parts[i : i + n]) for i in range(len(parts) - n + 1))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_splits_have_their_sizes_unique_ids_and_labels_in_range(name):
    task, splits = TASKS[name], demo.read(name)
    assert {s: len(rows) for s, rows in splits.items()} == {"train": 2000, "dev": 400, "test": 400}
    for rows in splits.values():
        assert len({row.id for row in rows}) == len(rows)
        labels = np.array([row.label for row in rows])
        assert labels.min() >= task.low
        assert labels.max() <= task.high
        assert not task.classes or np.all(labels == labels.round())
        assert all(bool(row.sentence2) == task.pair for row in rows)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["dev", "test"])
def test_no_sentence_of_dev_or_test_is_in_train(name, split):
    assert not set(texts(name, "train")) & set(texts(name, split))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_no_duplicates_within_a_split(name, split):
    pairs = [(row.sentence1, row.sentence2) for row in demo.read(name)[split]]
    assert len(set(pairs)) == len(pairs)


def vocabularies(module):
    for value in vars(module).values():
        for candidate in value.values() if isinstance(value, dict) else [value]:
            if isinstance(candidate, type(words(""))):
                yield candidate


@pytest.mark.parametrize(
    ("name", "module"), [("sst", reviews), ("para", question_frames), ("sts", scenes)]
)
def test_held_out_words_are_used_outside_training_only(name, module):
    # A verb is written "progressive=participle".
    held = {
        form.lower()
        for vocabulary in vocabularies(module)
        for entry in vocabulary.held
        for word in entry
        for form in word.split("=")
    }
    assert len(held) >= 12
    assert not held & tokens(name, "train")
    missing = held - tokens(name, "dev") - tokens(name, "test")
    assert not missing


def test_labels_are_balanced():
    sst = Counter(row.label for row in demo.read("sst")["train"])
    assert min(sst.values()) > 0.16 * 2000
    para = np.mean([row.label for row in demo.read("para")["train"]])
    assert 0.44 < para < 0.51
    sts = np.histogram([r.label for r in demo.read("sts")["train"]], bins=5, range=(0, 5))[0]
    assert sts.min() > 0.08 * 2000


def test_word_overlap_does_not_identify_paraphrases():
    """Positives and negatives share about as many words."""

    def overlap(row):
        a, b = (set(re.findall(r"\w+", s.lower())) for s in (row.sentence1, row.sentence2))
        return len(a & b) / len(a | b)

    rows = demo.read("para")["train"]
    means = [np.mean([overlap(r) for r in rows if r.label == label]) for label in (0, 1)]
    assert means[0] > means[1] - 0.05


DIGEST = """
import hashlib, json
from jaxlora.data import demo
rows = [demo.read(name) for name in ("sst", "para", "sts")]
print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())
"""


def test_the_same_rows_in_every_process():
    here = hashlib.sha256(json.dumps([demo.read(n) for n in NAMES]).encode()).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    command = [sys.executable, "-c", DIGEST]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_a_caller_cannot_change_the_rows():
    demo.read("sst")["train"].clear()
    assert len(demo.read("sst")["train"]) == 2000


@pytest.mark.parametrize(
    ("phrase", "grade", "result"),
    [
        ("is {}", 2, 2),
        ("is very {}", 1, 2),
        ("is almost {}", -2, -1),
        ("is not {}", 1, -1),
        ("is not {}", -2, 0),
        ("is not at all {}", -1, 2),
        ("is anything but {}", 2, -2),
        ("should have been {}", 2, -1),
        ("manages to avoid being {}", -2, 1),
        ("is only mildly {}", 1, 0),
    ],
)
def test_phrases_change_the_grade_by_rule(phrase, grade, result):
    (change,) = [c for p, grades, c in reviews.PHRASES if p == phrase and grade in grades]
    assert change(grade) == result


def test_the_main_clause_decides_the_review():
    """A plain clause after "but" gives the label, whatever stands before it."""
    grades = {word: g for g, v in reviews.ADJECTIVES.items() for (word,) in v.seen + v.held}
    checked = 0
    for row in demo.read("sst")["train"]:
        plain = re.search(r", but [a-z ]+ (?:is|turns out to be) ([a-z]+)\.$", row.sentence1)
        if plain and plain[1] in grades and " not " not in plain[0] and "never" not in plain[0]:
            if re.search(r"(absolutely|very|really|almost|mildly|exactly)", plain[0]):
                continue
            assert row.label == grades[plain[1]] + 2, row
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("frame", question_frames.FRAMES, ids=lambda f: f.ways[0])
def test_every_way_of_a_frame_names_every_slot(frame):
    for way in frame.ways:
        assert set(re.findall(r"{(\w)}", way)) == set(frame.slots)


def test_a_negative_question_differs_in_its_filling():
    rng = random.Random(0)
    for frame in question_frames.FRAMES:
        filling = questions._fill(frame, rng, train=False)
        assert questions._changed(frame, filling, rng, train=False) != filling


def test_scene_scores_are_weighted_by_slot():
    man, woman = (scenes.Concept("adult", names) for names in scenes.WHO["adult"].seen)
    dog = scenes.Concept("animal", scenes.WHO["animal"].seen[0])
    rest = {
        slot: scenes._draw(scenes.VOCABULARY[slot], random.Random(0), True)
        for slot in ("does", "where", "when")
    }
    scene = {"who": man, "whom": dog, **rest}
    assert sum(scenes.WEIGHTS.values()) == 5
    assert scenes.score(scene, scene) == 5
    assert scenes.score(scene, {**scene, "who": woman}) == 5 - 1.25 / 2
    assert scenes.score(scene, {**scene, "who": dog, "whom": man}) == 5 - 2 * 1.25


def test_sentences_begin_with_a_capital_and_have_the_right_articles():
    for text in texts("sts", "train") + texts("sst", "train") + texts("para", "train"):
        assert text[0].isupper()
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text

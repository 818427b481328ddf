"""Every kind of task, of one text and of pairs, from a table in each format to a bank and back."""

import csv
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import WORDS

import jaxlora
from jaxlora.cli.main import main
from jaxlora.serving import bank

pytestmark = pytest.mark.slow
oracle = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")
ROWS, FORMATS = 5000, ("csv", "jsonl", "parquet")
MARKS = ("film", "dog", "cat")  # what labels depend on
# Kind → label of the words of a row.
KINDS = {
    "binary": lambda words: "yes" if "film" in words else "no",
    "classification": lambda words: max(MARKS, key=words.count),
    "multilabel": lambda words: [name for name in MARKS if name in words],
    "ordinal": lambda words: min(3, sum(map(words.count, MARKS))),
    "regression": lambda words: sum(map(words.count, MARKS)) / 4,
    "similarity": lambda words: min(5.0, sum(map(words.count, MARKS)) / 2),
}
SHAPES = {"one": [], "separate": ['pair = "separate"'], "joint": ['pair = "joint"']}
CASES = [
    (kind, shape) for kind in KINDS for shape in SHAPES if (kind, shape) != ("similarity", "one")
]
SCORES = {
    "accuracy": oracle.accuracy_score,
    "balanced accuracy": oracle.balanced_accuracy_score,
    "macro F1": lambda y, x: oracle.f1_score(y, x, average="macro", zero_division=0),
    "micro F1": lambda y, x: oracle.f1_score(y, x, average="micro", zero_division=0),
    "F1 of yes": lambda y, x: oracle.f1_score(y, x, zero_division=0),
    "mean absolute error": oracle.mean_absolute_error,
    "root mean squared error": oracle.root_mean_squared_error,
    # A constant has no correlation: here it is 0, in scipy undefined.
    "Pearson r": lambda y, x: stats.pearsonr(y, x).statistic if np.ptp(x) else 0,
    "Spearman ρ": lambda y, x: stats.spearmanr(y, x).statistic if np.ptp(x) else 0,
}
CLASSES = {
    "binary": ["no", "yes"], "classification": sorted(MARKS), "ordinal": list("0123"),
    "multilabel": sorted(MARKS),
}  # fmt: skip


def make_rows(kind, shape, count, seed):
    rng = random.Random(f"{kind} {shape} {seed}")
    rows = []
    for n in range(count):
        texts = [rng.choices(WORDS, k=rng.randint(2, 7)) for _ in range(1 + (shape != "one"))]
        names = ("text",) if shape == "one" else ("first", "second")
        row = {name: " ".join(words) for name, words in zip(names, texts, strict=True)}
        rows.append(
            {"key": f"{n:05}", **row, "label": KINDS[kind]([word for one in texts for word in one])}
        )
    return rows


def write(path, rows):
    """Write a table; lists are delimited in CSV."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            for row in rows:
                label = row["label"]
                label = "|".join(label) if isinstance(label, list) else label
                table.writerow(row | {"label": label})


def read(path):
    """Return answers of any format as they are in JSON lines."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
        return [
            row | {"probabilities": row["probabilities"] and dict(row["probabilities"])}
            for row in rows
        ]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(*words):
    assert main(list(map(str, words))) == 0


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """Tables of all cases, and two runs on them of which the second learns more.

    Heads alone are trained: the step of seventeen adapters takes minutes to compile.
    """
    folder, tables = tmp_path_factory.mktemp("kinds"), []
    for number, (kind, shape) in enumerate(CASES):
        name, suffix = f"{kind}-{shape}", FORMATS[number % len(FORMATS)]
        write(folder / f"{name}.{suffix}", make_rows(kind, shape, 90, 0))
        text = '"text"' if shape == "one" else '["first", "second"]'
        tables += [
            f"[{name}]", f"text = {text}", 'label = "label"', 'id = "key"', f'kind = "{kind}"',
            f'train = "{name}.{suffix}"', *SHAPES[shape],
            "" if kind in CLASSES else "range = [0, 5]",
        ]  # fmt: skip
    (folder / "all.toml").write_text("\n".join(tables))
    for out, rate in (("less", 1e-5), ("more", 0.02)):
        run("train", folder / "all.toml", "--variant=baseline1", "--base", tiny_base,
            "--max-steps=40", "--batch-size=16", "--max-length=32",
            f"--head-learning-rate={rate}", "--out", folder / out)  # fmt: skip
    run("bank", "add", folder / "bank", "--run", folder / "less")
    return folder


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_thousands_of_answers_are_the_same_in_every_format(made, kind, shape, capsys):
    name, rows = f"{kind}-{shape}", make_rows(kind, shape, ROWS, 1)
    for number, suffix in enumerate(FORMATS):
        source = made / f"asked-{name}.{FORMATS[number - 1]}"
        write(source, rows)
        run("predict", "--bank", made / "more", "--task", name, "--input", source,
            "--output", made / f"answers-{name}.{suffix}")  # fmt: skip
    found = {suffix: read(made / f"answers-{name}.{suffix}") for suffix in FORMATS}
    assert found["jsonl"] == found["parquet"] and len(found["csv"]) == ROWS
    for plain, full, row in zip(found["csv"], found["jsonl"], rows, strict=True):
        assert plain["id"] == full["id"] == row["key"] and not full["reason"]
        if kind == "multilabel":
            assert plain["label"] == full["label"] == "|".join(full["labels"])
        elif kind in CLASSES:
            assert plain["label"] == full["label"] and full["labels"] is None
            assert float(plain["probability"]) == pytest.approx(full["probability"], abs=1e-4)
        else:
            assert float(plain["prediction"]) == pytest.approx(full["prediction"], abs=1e-4)
    texts = [tuple(list(row.values())[1:-1]) for row in rows[:50]]
    asked = jaxlora.load(made / "more")([(name, *one) for one in texts])
    for answer, full in zip(asked, found["jsonl"], strict=False):
        if answer.probabilities is None:
            assert answer.value == pytest.approx(full["prediction"], abs=1e-5)
        else:
            assert answer.probabilities == pytest.approx(full["probabilities"], abs=1e-5)
    check_evaluation(made, name, kind, rows, found["jsonl"], capsys)


def check_evaluation(made, name, kind, rows, answers, capsys):
    """Compare what `evaluate` says of the rows with the answers, by scikit-learn and scipy."""
    capsys.readouterr()
    source = made / f"asked-{name}.jsonl"
    run("evaluate", made / "more", "--task", name, "--input", source, "--json")
    said = json.loads(capsys.readouterr().out)
    if kind == "multilabel":
        sets = [[row["label"] for row in rows], [one["labels"] for one in answers]]
        y, x = (np.array([[n in one for n in CLASSES[kind]] for one in part]) for part in sets)
    elif kind in CLASSES:
        numbers = CLASSES[kind].index
        y, x = ([numbers(str(one["label"])) for one in part] for part in (rows, answers))
    else:
        y, x = [row["label"] for row in rows], [one["prediction"] for one in answers]
    assert said["rows"] == ROWS and said["scores"]
    for title, interval in said["scores"].items():
        assert interval["value"] == pytest.approx(SCORES[title](y, x), abs=1e-4), title
        assert interval["low"] <= interval["value"] <= interval["high"]
    if kind == "multilabel":
        assert all(isinstance(one["label"], list) for one in said["mistakes"])


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_a_bank_takes_the_better_model_and_goes_back(made, kind, shape, capsys):
    name = f"{kind}-{shape}"
    asked = [(name, *list(row.values())[1:-1]) for row in make_rows(kind, shape, 20, 2)]
    scores = {
        out: next(iter(bank.load(made / out).models[name].facts.dev.values()))
        for out in ("less", "more")
    }
    greater = jaxlora.load(made / "more").tasks[name].greater_is_better
    gain = (scores["more"] - scores["less"]) * (1 if greater else -1)
    before = jaxlora.load(made / "bank")(asked)
    update = ("bank", "update", made / "bank", "--task", name, "--run")
    capsys.readouterr()
    run(*update, made / "more", "--if-better")
    assert ("not better" in capsys.readouterr().out) == (gain <= 0)
    run(*update, made / "more")
    after = jaxlora.load(made / "bank")(asked)
    assert after == jaxlora.load(made / "more")(asked)
    # Heads alone are trained, and the cosine of two vectors has none.
    assert (after == before) == (name == "similarity-separate")
    run(*update, made / "less", "--if-better")
    assert ("not better" in capsys.readouterr().out) == (gain >= 0)
    for _ in range(3):  # each of them is one version back, and the last one forward again
        if jaxlora.load(made / "bank")(asked) == before:
            break
        run("bank", "rollback", made / "bank", name)
    assert jaxlora.load(made / "bank")(asked) == before
    run("bank", "verify", made / "bank")

"""Any input gives a correct result or the documented error (generators: `tests.fuzz`)."""

import csv
import dataclasses
import io
import json
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.data import cs224n, delimited, tables
from jaxlora.data.batches import choose_batch_shapes
from jaxlora.data.order import JointOrder, make_order
from jaxlora.data.task_files import TaskSpec
from jaxlora.data.tokenized import Examples, tokenize, truncating
from jaxlora.lora import LoraConfig
from jaxlora.tasks.sharing import parse_groups
from jaxlora.tasks.task import NAMES, PARA, SST, Task
from jaxlora.training import sharding
from jaxlora.utils.errors import UserError
from jaxlora.utils.schema import build
from tests.fuzz import hostile
from tests.fuzz.__main__ import cli, fuzz
from tests.fuzz.samples import TASKS, tokenizer
from tests.fuzz.targets import Target, all_targets

ROOT = Path(__file__).parents[1]

quick = settings(max_examples=60, deadline=None)
# Texts that a table can hold: UTF-8, no NUL, not blank; `read` strips them.
sentences = hostile.written.map(lambda text: text.replace("\0", "").strip()).filter(bool)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return all_targets(tmp_path_factory.mktemp("samples"))


def test_the_page_counts_the_targets(targets):
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert f"inputs for {len(targets)} targets" in page


def test_every_target_gives_a_right_result_or_refuses(targets, tmp_path):
    tallies = {}
    for name, target in targets.items():
        (tmp_path / name).mkdir()
        tallies[name] = fuzz(target, 20, 0, tmp_path / name)
    assert [tally.failure for tally in tallies.values() if tally.failure] == []
    # Of some all twenty inputs may be damaged; of many only if what they are made from is broken.
    assert sum(tally.accepted > 0 for tally in tallies.values()) > 0.8 * len(tallies)


def test_the_command_fails_where_a_target_does(monkeypatch, capsys):
    def check(value, scratch):
        assert value != "mesh"

    words = Target("words", st.sampled_from(("mesh", "groups")), check)
    monkeypatch.setattr("tests.fuzz.__main__.all_targets", lambda folder: {"words": words})
    assert cli(["--inputs=10"]) == 1
    assert "words, seed 0: AssertionError" in capsys.readouterr().out
    assert cli(["--only=other"]) == 2


@pytest.mark.slow
def test_thousands_of_inputs_find_no_failure(capsys):
    assert cli(["--inputs=5000", "--seed=1"]) == 0
    assert "5," in capsys.readouterr().out


def test_a_failure_is_shrunk_and_can_be_repeated(tmp_path):
    def check(value, scratch):
        if "\0" in value:
            raise KeyError("a bug")
        raise UserError("refused")

    target = Target("buggy", hostile.texts, check)
    one, again = (fuzz(target, 500, 3, tmp_path) for _ in range(2))
    assert one.failure == again.failure
    assert one.failure.startswith("buggy, seed 3: KeyError: 'a bug' (check)")
    assert one.failure.endswith(r"input: '\x00'")
    assert one.refused > 0 and one.accepted == 0


# --- tables


@quick
@given(
    st.lists(st.tuples(sentences, sentences, st.integers(0, 1)), min_size=1, max_size=4),
    st.sampled_from(delimited.DELIMITERS + "#~ "),
    st.sampled_from(("\n", "\r\n")),
    st.sampled_from(("", "\ufeff")),
)
def test_what_csv_writes_is_read_back(tmp_path_factory, rows, delimiter, end, mark):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "one", "two", "same"), *((str(n), *r) for n, r in enumerate(rows))])
    path = tmp_path_factory.getbasetemp() / "round-trip"
    path.write_bytes((mark + text.getvalue()).encode())
    columns = tables.Columns(("one", "two"), "same", "id")
    found = tables.read(PARA, path, columns, delimiter, "standard")
    assert [(r.sentence1, r.sentence2, int(r.label)) for r in found] == rows
    assert [r.id for r in found] == [str(n) for n in range(len(rows))]


UNICODE = {
    "combining marks": "e\u0301tude a\u0323\u0302",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c",
    "emoji": "\U0001f937\U0001f3fd\u200d\u2640\ufe0f !",
    "a mark inside": "a\ufeffb",
    "other line ends": "a\u2028b\u0085c\x0bd",
    "a quote inside": 'a 5" pipe and 6" more',
    "one quote inside": 'what is 5" ?',
    "controls": "a\x07\x1bb",
}


@pytest.mark.parametrize("sentence", UNICODE.values(), ids=UNICODE)
def test_a_sentence_is_kept_as_it_is(tmp_path, sentence):
    path = tmp_path / "x.csv"
    path.write_bytes(f"id\tsentence\tsentiment\r\na\t{sentence}\t3\r\n".encode())
    (row,) = cs224n.read(SST, path)
    assert row.sentence1 == sentence
    tokens, offsets, *_ = tokenize(truncating(tokenizer(), 16), [sentence])
    assert (tokens[0], tokens[-1], offsets.tolist()) == (2, 3, [0, len(tokens)])


def test_a_line_of_ten_megabytes_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"id\tsentence\tsentiment\na\t" + b"dog " * 2_500_000 + b"\t3\n")
    with pytest.raises(UserError, match=r"x\.csv:2: field larger than field limit"):
        cs224n.read(SST, path)
    path.write_bytes(b"id" * 5_000_000)
    with pytest.raises(UserError, match=r"x\.csv:1: field larger than field limit"):
        cs224n.read(SST, path)


def test_a_sentence_of_ten_megabytes_is_cut():
    tokens, _, truncated, *_ = tokenize(
        truncating(tokenizer(), 8), ["x" * 10_000_000 + " dog" * 10]
    )
    assert (tokens.tolist(), truncated) == ([2, 1, 5, 5, 5, 5, 5, 3], 1)


@pytest.mark.parametrize("text", ["\ud800", "a dog \udcff runs"])
def test_half_a_surrogate_pair_is_no_text(text):
    with pytest.raises(UserError, match="is not Unicode text"):
        tokenize(truncating(tokenizer(), 8), ["fine", text])


# --- what users write on the command line


@quick
@given(st.permutations(NAMES), st.lists(st.sampled_from(("|", ",", " | ", " , ")), min_size=2))
def test_any_partition_is_read_as_written(names, separators):
    text, expected = names[0], [[names[0]]]
    for name, separator in zip(names[1:], separators, strict=False):
        text += separator + name
        expected += [[]] if "|" in separator else []
        expected[-1].append(name)
    assert parse_groups(text) == tuple(map(tuple, expected))


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 64), st.booleans())
def test_any_mesh_that_fits_is_read_as_written(data, fsdp, count, swapped):
    parts = [f"data={data}", f" fsdp={fsdp}"]
    text = ",".join(reversed(parts) if swapped else parts)
    if data * fsdp > count:
        with pytest.raises(UserError, match="devices"):
            sharding.sizes(text, count)
    else:
        assert sharding.sizes(text, count) == {"data": data, "fsdp": fsdp}


# --- JSON and back

names = st.text(string.ascii_letters, min_size=1, max_size=5)
floats = st.floats(-1e9, 1e9)
above_0 = st.floats(0, 1e9, exclude_min=True)
ranks = st.lists(st.tuples(names, st.integers(1, 9)), max_size=3).map(tuple)
alphas = st.lists(st.tuples(names, above_0), max_size=3).map(tuple)
configs = st.builds(
    LoraConfig, st.integers(1, 64), above_0, st.lists(names).map(tuple), st.booleans(), ranks,
    alphas, st.floats(0, 0.9),
)  # fmt: skip
descriptions = st.builds(
    TaskSpec,
    st.sampled_from((*TASKS, Task("topic", "classification", classes=("a", "b")))),
    st.one_of(
        st.none(),
        st.builds(tables.Table, st.builds(tables.Columns, st.tuples(names), names), names, names),
    ),
    floats,
    st.lists(st.tuples(names, st.one_of(st.integers(), floats))).map(tuple),
)


@quick
@given(st.one_of(configs, descriptions))
def test_a_dataclass_comes_back_from_its_json(value):
    plain = json.loads(json.dumps(dataclasses.asdict(value)))
    again = build(type(value), plain)
    assert again == value
    assert repr(again) == repr(value)  # 1 is not 1.0


@quick
@given(st.data())
def test_other_json_is_no_dataclass_or_a_sound_one(data):
    plain = json.loads(json.dumps(dataclasses.asdict(TaskSpec(PARA))))
    changed = data.draw(hostile.changed(plain))
    try:
        found = build(TaskSpec, changed)
    except ValueError:
        assert json.dumps(changed) != json.dumps(plain)  # False is 0 for Python alone
    else:
        assert build(TaskSpec, json.loads(json.dumps(dataclasses.asdict(found)))) == found


# --- packing, from examples to batches


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 32), min_size=1, max_size=9), min_size=1, max_size=3),
    st.integers(1, 4),
    st.booleans(),
    st.integers(1, 3),
)
def test_every_token_of_a_batch_stands_in_it_once(sizes, batch_size, mixed, most):
    examples, first = {}, 1
    for task, lengths in enumerate(sizes):
        offsets = np.cumsum([0, *lengths])
        tokens = np.arange(first, first + offsets[-1], dtype=np.int32)
        labels = np.zeros(len(lengths), np.float32)
        examples[str(task)] = Examples(labels.astype(str), tokens, offsets, labels, 1)
        first += int(offsets[-1])
    order = make_order({name: len(e) for name, e in examples.items()}, batch_size, seed=0)
    joint = JointOrder((order,), (order.steps_per_epoch,))
    batches = choose_batch_shapes(examples, joint, 32, most, mixed)
    for step in range(order.steps_per_epoch):
        rows = batches[step].inputs
        drawn = [
            token
            for e, numbers in zip(examples.values(), order.at(step), strict=True)
            for n in numbers
            for token in e.sentence(n)
        ]
        assert sorted(rows.tokens[rows.tokens > 0].tolist()) == sorted(drawn)
        assert rows.tokens.shape[-1] <= 32
        assert ((rows.segment_ids > 0) == (rows.tokens > 0)).all()

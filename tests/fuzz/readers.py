"""Targets that read text: tables, requests, sentences, archives, the token cache."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from jaxlora.data import cs224n, delimited, official, tables, text_lines, tokenized
from jaxlora.data.quoting import QUOTINGS, Quoting
from jaxlora.data.raw_examples import TextExample, is_missing, parse_label, sentences
from jaxlora.formats import huggingface
from jaxlora.serving import predict_table
from jaxlora.serving.answers import Answer
from jaxlora.serving.predictor import Predictor
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import UserError
from tests.fuzz import hostile, samples

_quotings = st.sampled_from((None, *QUOTINGS))
TOPIC = Task("topic", "classification", classes=("sport", "science", "2"))
PRICE = Task("price", "regression", pair=True, low=-10, high=90.5)
TSV = {
    "sst": b'\tid\tsentence\tsentiment\n0\ta\tA good dog .\t3\n1\tb\t"A ""bad"" dog"\t0.0\n',
    "para": b"\tid\tsentence1\tsentence2\tis_duplicate\n0\ta\tOne ?\tTwo \xc3\x97 ?\t1.0\n",
    "sts": b'\tid\tsentence1\tsentence2\tsimilarity\r\n0\ta\t"One\r\ntwo"\tTwo\t4.6\r\n',
}
TAGS = Task("tags", "multilabel", classes=("sport", "1", "2"), label_delimiter="+")
MARKS = Task("marks", "multilabel", classes=("second", "label"))
CSV = b'key,first,second,label\nx,"A, dog",A cat,1\ny,"A ""dog""",A cat,2\nz,A dog,cat,\n'
SETS = b"key,first,second,label\nx,A dog,0,1+sport\ny,A cat,1,0\nz,A film,1,1\n"
REQUESTS = b"id\ttask\tsentence\tsentence2\n1\tsst\tA dog .\t\n2\tsts\tA dog .\tA cat .\n"
JSON_LINES = (
    b'{"key": "x", "first": "A dog", "second": "A cat", "label": 2}\n'
    b'{"key": "y", "first": "A \\u00d7", "second": "b", "label": 1}\n'
)
COLUMNS = {
    TOPIC: tables.Columns(("first",), "label"),
    PRICE: tables.Columns(("first", "second"), "label", "key"),
    TAGS: tables.Columns(("first",), "label", "key"),
    MARKS: tables.Columns(("first",), ("second", "label")),
}


def targets(folder: Path) -> dict[str, tuple[st.SearchStrategy[Any], Callable[..., None]]]:
    """Inputs and checks by name."""
    base = huggingface.load(str(samples.base(folder / "reader-base")))
    echo = Echo(base, samples.trained(Path(base.name)))
    one_of = st.one_of
    tsv = {n: one_of(hostile.damaged(t), hostile.tables(t, "\t")) for n, t in TSV.items()}
    question = st.tuples(st.just("sst"), hostile.texts)
    return {
        "cs224n file": (
            one_of(*(st.tuples(st.just(t), tsv[t.name], st.booleans()) for t in samples.TASKS)),
            read_tsv,
        ),
        "table": (
            st.tuples(
                st.sampled_from(list(COLUMNS)),
                one_of(hostile.damaged(CSV, SETS), hostile.tables(CSV, ",")),
                st.sampled_from((None, ",", *delimited.DELIMITERS)),
                _quotings,
                st.sampled_from((True, False, None)),
            ),
            read_table,
        ),
        "requests": (
            st.tuples(
                one_of(hostile.damaged(REQUESTS), hostile.tables(REQUESTS, "\t")),
                st.sampled_from((None, "sst", "sts", "")),
                st.sampled_from((".csv", ".jsonl", ".tsv.gz", ".parquet")),
                _quotings,
                st.booleans(),
            ),
            lambda value, scratch: answer(echo, value, scratch),
        ),
        "json lines": (
            st.tuples(
                st.sampled_from(list(COLUMNS)),
                one_of(hostile.damaged(JSON_LINES, gzip.compress(JSON_LINES, 1)), _json_lines()),
                st.sampled_from((".jsonl", ".jsonl.gz")),
            ),
            read_typed,
        ),
        "parquet": (
            st.tuples(
                st.sampled_from(list(COLUMNS)), hostile.damaged(_parquet()), st.just(".parquet")
            ),
            read_typed,
        ),
        "saved dataset": _saved(folder / "saved"),
        "quotes": (st.lists(hostile.quoted, min_size=1, max_size=4), read_quotes),
        "label": (
            st.tuples(
                st.lists(hostile.labels, min_size=2, max_size=4, unique=True), hostile.labels
            ),
            read_label,
        ),
        "set of labels": (
            st.tuples(
                st.lists(hostile.labels, min_size=2, max_size=4, unique=True),
                st.sampled_from(("|", ", ", "+", " ")),
                st.lists(hostile.labels, max_size=4),
            ),
            read_set,
        ),
        "odd file": (hostile.damaged(*hostile.FOREIGN), read_odd),
        "request": (
            one_of(question, st.lists(hostile.texts, max_size=4).map(tuple), hostile.values),
            lambda value, scratch: ask(echo, value),
        ),
        "sentences": (
            st.tuples(st.lists(hostile.texts, max_size=4), st.integers(3, 12)),
            tokenize,
        ),
        "tree": (st.one_of(hostile.texts, st.text("()01234 \\ab-LRB", max_size=40)), parse_tree),
        "archive": (one_of(_archives(), hostile.damaged(_zip(["trees/dev.txt", "x/y"]))), unpack),
        "token cache": _cache(folder / "cache"),
    }


def _check_rows(
    task: Task, rows: Sequence[TextExample], labels: bool | None, first: int = 2
) -> None:
    assert rows
    for row in rows:
        assert all(text == text.strip() for text in sentences(row, task).values())
        assert "".join(row[:3]).encode() is not None and row.line >= first
        assert not row.labelled or labels is not False
        if isinstance(row.label, tuple):
            assert task.form == "classes" and list(row.label) == sorted(set(row.label))
            assert set(row.label) <= set(range(len(task.classes)))
        elif row.labelled:
            assert task.form != "classes" and task.low <= row.label <= task.high
            assert not task.classes or row.label == int(row.label)


def read_tsv(value: tuple[Task, bytes, bool], scratch: Path) -> None:
    """`cs224n.read`."""
    task, content, labelled = value
    (scratch / "file.csv").write_bytes(content)
    _check_rows(task, cs224n.read(task, scratch / "file.csv", labelled=labelled), labelled)


def read_table(
    value: tuple[Task, bytes, str | None, Quoting | None, bool | None], scratch: Path
) -> None:
    """`tables.read`."""
    task, content, delimiter, quoting, labelled = value
    (scratch / "table").write_bytes(content)
    rows = tables.read(
        task, scratch / "table", COLUMNS[task], delimiter, quoting, labelled=labelled
    )
    _check_rows(task, rows, labelled)


def read_typed(value: tuple[Task, bytes, str], scratch: Path) -> None:
    """`tables.read` of formats with types."""
    task, content, suffix = value
    path = scratch / f"table{suffix}"
    path.write_bytes(content)
    _check_rows(task, tables.read(task, path, COLUMNS[task]), None, first=1)


def _json_lines() -> st.SearchStrategy[bytes]:
    names = st.sampled_from(("key", "first", "second", "label", "other"))
    record = st.dictionaries(names, st.one_of(hostile.labels, hostile.values), max_size=5)
    return st.lists(record, max_size=4).map(
        lambda rows: "".join(json.dumps(row, default=str) + "\n" for row in rows).encode()
    )


def _parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([json.loads(x) for x in JSON_LINES.splitlines()]), file)
    return file.getvalue()


def _saved(folder: Path) -> tuple[st.SearchStrategy[Any], Callable[..., None]]:
    """Folders of `datasets` with a damaged file in them."""
    folder.mkdir()
    about = {
        "info": {"features": {"label": {"names": ["sport", "science"], "_type": "ClassLabel"}}}
    }
    table = pa.table({"first": ["A dog", "A cat"], "label": [0, -1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    with pa.ipc.new_stream(str(folder / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}

    def check(value: tuple[str, bytes], scratch: Path) -> None:
        for name, content in {**sound, value[0]: value[1]}.items():
            (scratch / name).write_bytes(content)
        _check_rows(TOPIC, tables.read(TOPIC, scratch, COLUMNS[TOPIC]), None, first=1)

    parts = (st.tuples(st.just(name), hostile.damaged(content)) for name, content in sound.items())
    return st.one_of(*parts), check


def read_quotes(texts: list[str], scratch: Path) -> None:
    """Fields of tabs: each line is a row, and its text as written or, if all are so, unquoted."""
    path = scratch / "x.tsv"
    path.write_text("first\tlabel\n" + "".join(f"{text}\tsport\n" for text in texts))
    found = [row.sentence1 for row in tables.read(TOPIC, path, COLUMNS[TOPIC])]
    sound = all(re.fullmatch(r'"([^"]|"")*"|[^"].*|', text) for text in texts)
    plain = [
        text[1:-1].replace('""', '"') if sound and text.startswith('"') else text for text in texts
    ]
    assert found == [text.strip() for text in plain]


def read_label(value: tuple[list[str], str], scratch: Path) -> None:
    """`rows.parse_label`: a class's own name is that class, another word never is one."""
    names, written = value
    try:
        task = Task("x", "classification", classes=tuple(name.strip() for name in names))
    except ValueError as error:  # a name that is there twice when stripped
        raise UserError(str(error)) from None
    label = parse_label(written, task, "x:1")
    assert isinstance(label, float)
    name = written.strip()
    if name in task.classes:
        assert label == task.classes.index(name)
    elif not math.isnan(label):
        assert float(name) == float(label) or float(task.classes[int(label)]) == float(name)


def read_set(value: tuple[list[str], str, list[str]], scratch: Path) -> None:
    """`rows.parse_label` of a set: the names that were joined, each once, or no label at all."""
    names, mark, chosen = value
    try:
        task = Task(
            "x", "multilabel", classes=tuple(n.strip() for n in names), label_delimiter=mark
        )
    except ValueError as error:  # a name that is there twice when stripped, or has the mark
        raise UserError(str(error)) from None
    label = parse_label(mark.join(chosen), task, "x:1")
    if isinstance(label, tuple):
        found = {task.classes[n] for n in label}
        assert found == {name for one in chosen for name in map(str.strip, one.split(mark))} - {""}
    else:
        assert is_missing(mark.join(chosen).strip(), task.classes)


def read_odd(content: bytes, scratch: Path) -> None:
    """`text_lines.stream` of files of other kinds, whole and compressed: the same lines."""
    (scratch / "odd").write_bytes(content)
    (scratch / "odd.gz").write_bytes(gzip.compress(content, 1))
    lines = [_lines(scratch / name) for name in ("odd", "odd.gz")]
    plain, packed = lines
    if isinstance(plain, UserError) or isinstance(packed, UserError):
        assert str(packed).replace("odd.gz", "odd") == str(plain)
        raise UserError(str(plain))
    assert plain == packed
    assert "".join(plain) == content.decode("utf-8-sig")


def _lines(path: Path) -> list[str] | UserError:
    try:
        return list(text_lines.stream(path, path))
    except UserError as error:
        return error


class Echo(Predictor):
    """Answers without computing anything."""

    def __call__(
        self, requests: Sequence[tuple[str, ...]], truncated: Callable[[int], Any] = bool
    ) -> list[Answer]:
        """One answer for each request."""
        return [Answer(request[0], 1.0, None, None) for request in requests]


def answer(
    echo: Echo, value: tuple[bytes, str | None, str, Quoting | None, bool], scratch: Path
) -> None:
    """`predict_file.predict_file`."""
    content, task, suffix, quoting, strict = value
    source, target = scratch / "requests", scratch / f"answers{suffix}"
    source.write_bytes(content)
    target.unlink(missing_ok=True)
    try:
        count = predict_table.predict_file(
            echo, source, target, task, quoting=quoting, strict=strict
        )
    except ValueError:
        assert not target.exists()
        raise
    finally:
        assert not list(scratch.glob(".*"))
    assert _COUNT[suffix](target.read_bytes()) == count


def _count_rows(content: bytes, delimiter: str = ",") -> int:
    text = io.StringIO(content.decode(), newline="")
    return len(list(csv.reader(text, delimiter=delimiter))) - 1


_COUNT: dict[str, Callable[[bytes], int]] = {
    ".csv": _count_rows,
    ".tsv.gz": lambda content: _count_rows(gzip.decompress(content), "\t"),
    ".jsonl": lambda content: content.count(b"\n"),
    ".parquet": lambda content: pq.read_table(io.BytesIO(content)).num_rows,
}


def ask(echo: Echo, request: Any) -> None:
    """`Predictor.check`, and the tokenizer behind it."""
    task, texts = echo.check(request)
    assert len(texts) == task.sentences
    tokenized.tokenize(tokenized.truncating(echo.base.tokenizer, 8), texts)


def tokenize(value: tuple[list[str], int], scratch: Path) -> None:
    """`examples.tokenize`."""
    texts, most = value
    tokenizer = samples.tokenizer()
    tokens, offsets, truncated, *_ = tokenized.tokenize(
        tokenized.truncating(tokenizer, most), texts
    )
    assert offsets[0] == 0 and offsets[-1] == len(tokens) and len(offsets) == len(texts) + 1
    whole = [tokenizer.encode(text).ids for text in texts]
    for text, start, stop in zip(whole, offsets, offsets[1:], strict=False):
        cut = text if len(text) <= most else [*text[: most - 1], text[-1]]
        np.testing.assert_array_equal(tokens[start:stop], cut)
    assert truncated == sum(len(ids) > most for ids in whole)


def parse_tree(text: str, scratch: Path) -> None:
    """`official.parse_tree`."""
    label, sentence = official.parse_tree(text)
    assert label == text[1:2] and "\\" not in sentence


def _zip(names: Sequence[str], kind: int = 0) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in dict.fromkeys(names):
            member = zipfile.ZipInfo(name or "x")
            member.external_attr = kind << 16
            archive.writestr(member, "../../outside" if kind else name)
    return file.getvalue()


def _archives() -> st.SearchStrategy[bytes]:
    part = st.sampled_from(("a", "..", ".", "", "/", "\\", "C:", "~", "trees", "a.txt"))
    names = st.lists(st.lists(part, min_size=1, max_size=4).map("/".join), min_size=1, max_size=3)
    return st.builds(_zip, names, st.sampled_from((0, 0o100644, 0o120777, 0o040777)))


def unpack(content: bytes, scratch: Path) -> None:
    """`official.unzip`: nothing outside of its folder."""
    place = scratch / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    archive = place / "x.zip"
    archive.write_bytes(content)
    try:
        assert official.unzip(archive) == place / "x.zip.files"
    finally:
        assert {path.name for path in place.iterdir()} <= {"x.zip", "x.zip.files"}
        assert [path.name for path in scratch.iterdir()] == ["place"]
        assert not any(path.is_symlink() for path in place.rglob("*"))


def _cache(folder: Path) -> tuple[st.SearchStrategy[bytes], Callable[..., None]]:
    """`examples.load_examples`: a damaged cache file never changes the data."""
    folder.mkdir()
    (folder / "table.csv").write_bytes(CSV)
    path = str(folder / "table.csv")
    table = tables.Table(COLUMNS[PRICE], train=path, dev=path)
    tokenizer = samples.tokenizer()

    def load(cache: Path) -> dict[str, tokenized.Examples]:
        return tokenized.load_examples(PRICE, "files", table, tokenizer, "key", 8, cache)

    sound = load(folder)
    (cached,) = (folder / "tokens").iterdir()

    def check(content: bytes, scratch: Path) -> None:
        (scratch / "tokens").mkdir(exist_ok=True)
        (scratch / "tokens" / cached.name).write_bytes(content)
        for split, found in load(scratch).items():
            for a, b in zip(vars(found).values(), vars(sound[split]).values(), strict=True):
                np.testing.assert_array_equal(a, b)

    return hostile.damaged(cached.read_bytes()), check

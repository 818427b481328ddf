"""Targets that parse what a user writes: groups, meshes, tasks; and packing, which serves all."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from jaxlora.data import packing
from jaxlora.data.tables import Columns
from jaxlora.data.task_files import TaskSpec, read_tasks
from jaxlora.tasks.sharing import parse_groups
from jaxlora.tasks.task import NAMES
from jaxlora.training import sharding
from jaxlora.utils.errors import UserError
from tests.fuzz import hostile

TOML = b"""[topic]
kind = "classification"
classes = ["sport", "science"]
text = "headline"
label = "what"
train = "train.csv"
dev = "train.csv"
epochs = 3
[price]
kind = "similarity"
range = [-10, 90.5]
text = ["first", "second"]
label = "euro"
id = "key"
delimiter = ";"
train = "train.csv"
dev = "train.csv"
test = "train.csv"
title = "Price"
loss = "cosine"
metric = "spearman"
weight = 0.5
learning_rate = 1e-3
patience = 0
"""
FLAGS = (
    "topic.kind=classification", "topic.classes=sport,science", "topic.text=headline",
    "topic.label=what", "topic.train=train.csv", "topic.dev=train.csv", "topic.epochs=3",
    "topic.range=0,5", "topic.delimiter=;", "topic.weight=1e3",
)  # fmt: skip


def targets(folder: Path) -> dict[str, tuple[st.SearchStrategy[Any], Callable[..., None]]]:
    """Inputs and checks by name."""
    (folder / "train.csv").write_text("headline,what\na dog,sport\n")
    inside = TOML.replace(b'"train.csv"', f'"{folder / "train.csv"}"'.encode())
    flags = [flag.replace("train.csv", str(folder / "train.csv")) for flag in FLAGS]
    word = st.one_of(st.sampled_from((*NAMES, "sst ", "", "x")), hostile.texts)
    group = st.lists(word, max_size=4).map(",".join)
    axis = st.one_of(st.sampled_from(("data=4", "fsdp=2", "data=1", "auto")), hostile.texts)
    return {
        "groups": (
            st.one_of(st.lists(group, max_size=4).map("|".join), _partitions()), groups
        ),
        "mesh": (
            st.tuples(st.lists(axis, max_size=3).map(",".join), st.integers(1, 16)), make_mesh
        ),
        "task file": (hostile.damaged(inside, inside[: inside.index(b"[price]")]), task_file),
        "task flags": (
            st.lists(
                st.one_of(
                    st.sampled_from(flags),
                    st.builds("topic.{}={}".format, st.sampled_from(_KEYS), hostile.texts),
                    hostile.texts,
                ),
                max_size=4,
            ).map(lambda some: [*flags[:6], *some]),
            task_flags,
        ),
        "packing": (
            st.tuples(st.lists(st.integers(-1, 20), max_size=30), st.integers(1, 16)), pack
        ),
    }  # fmt: skip


_KEYS = [flag.partition("=")[0].removeprefix("topic.") for flag in FLAGS] + ["id", "title", "x"]


def _partitions() -> st.SearchStrategy[str]:
    return st.builds(
        lambda names, cuts: "".join(
            name + ("|" if cut else ",") for name, cut in zip(names, cuts, strict=True)
        ).rstrip("|,"),
        st.permutations(NAMES),
        st.lists(st.booleans(), min_size=3, max_size=3),
    )


def groups(text: str, scratch: Path) -> None:
    """`variants.parse_groups`: taken if and only if it is a partition without an empty group."""
    parts = [[n.strip() for n in part.split(",") if n.strip()] for part in text.split("|")]
    partition = Counter(itertools.chain(*parts)) == Counter(NAMES) and all(parts)
    try:
        assert parse_groups(text) == tuple(map(tuple, parts)) and partition
    except UserError:
        assert not partition
        raise


def make_mesh(value: tuple[str, int], scratch: Path) -> None:
    """`mesh.sizes`: taken if and only if it is written so and the devices are there."""
    text, count = value
    try:
        found = sharding.sizes(text, count)
    except UserError:
        assert text != "auto"
        raise
    assert list(found) == list(sharding.AXES) and 1 <= found["data"] * found["fsdp"] <= count
    assert text == "auto" or re.fullmatch(r"\s*(data|fsdp)=\d+\s*(,\s*(data|fsdp)=\d+\s*)?", text)


def _check_tasks(found: Sequence[TaskSpec]) -> None:
    for one in found:
        assert hostile.is_safe(one.task.name)
        assert 0 < float(one.weight) < float("inf") and one.task.high > one.task.low
        assert one.table is not None and isinstance(one.table.columns, Columns)
        assert isinstance(one.table.columns.id, str | None)
        assert all(path.is_absolute() and path.exists() for path in one.table.files.values())
        assert repr(one).encode()


def task_file(content: bytes, scratch: Path) -> None:
    """`descriptions.read_tasks` of a TOML file."""
    (scratch / "tasks.toml").write_bytes(content)
    _check_tasks(read_tasks([str(scratch / "tasks.toml")]))


def task_flags(flags: list[str], scratch: Path) -> None:
    """`descriptions.read_tasks` of values."""
    _check_tasks(read_tasks(flags))


def pack(value: tuple[list[int], int], scratch: Path) -> None:
    """`packing.place` and `fill`: every token once, no row over its length."""
    lengths, size = value
    fits = all(1 <= n <= size for n in lengths)
    try:
        where = packing.place(lengths, size)
    except ValueError:
        assert not fits
        raise UserError("as documented") from None
    assert fits
    tokens = [np.arange(n) + 100 * k + 1 for k, n in enumerate(lengths)]
    rows = packing.fill(tokens, range(len(lengths)), len(lengths), packing.Shape(where.rows, size))
    assert rows.tokens.shape == (where.rows, size)
    assert sorted(rows.tokens[rows.tokens > 0].tolist()) == sorted(
        number for sentence in tokens for number in sentence.tolist()
    )
    for k, sentence in enumerate(tokens):
        np.testing.assert_array_equal(rows.tokens[rows.segment_ids == k + 1], sentence)

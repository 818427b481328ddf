"""Reader of the tab-separated files of the Stanford CS224N default project."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxlora.data import tables
from jaxlora.data.raw_examples import TextExample
from jaxlora.data.sheet import Sheet
from jaxlora.data.table_formats import open_sheets
from jaxlora.data.tables import Columns
from jaxlora.tasks.task import Task
from jaxlora.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Layout:
    """File name stem and columns of a task."""

    stem: str
    columns: Columns


LAYOUTS = {
    "sst": Layout("ids-sst", Columns(("sentence",), "sentiment", "id")),
    "para": Layout("quora", Columns(("sentence1", "sentence2"), "is_duplicate", "id")),
    "sts": Layout("sts", Columns(("sentence1", "sentence2"), "similarity", "id")),
}
SUFFIXES = {"train": "train", "dev": "dev", "test": "test-student"}


def files(task: Task, folder: Path | None) -> dict[str, Path]:
    """Return the paths of a task's files by split: `train`, `dev` and the unlabelled `test`.

    Raises:
      UserError: if no folder is given, or the folder or a file is missing.
    """
    if folder is None:
        raise ConfigError(
            "data_dir",
            "missing; the source 'cs224n' reads its files from a folder. Name it, or use "
            "the source 'demo', which needs no files.",
        )
    if not folder.is_dir():
        raise ConfigError("data_dir", f"{folder} is not a folder; check the path.")
    stem = LAYOUTS[task.name].stem
    paths = {split: folder / f"{stem}-{suffix}.csv" for split, suffix in SUFFIXES.items()}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise ConfigError(
            "data_dir",
            f"{folder} has no {', '.join(missing)} (needed for {task.title}); put the file there, "
            "or name the folder that has it.",
        )
    return paths


def sheets(task: Task, folder: Path | None) -> dict[str, Sheet]:
    """Open a task's files by split; quotes have the same meaning in all of them.

    Raises:
      UserError: see `files`; also if a file cannot be read.
    """
    return open_sheets(files(task, folder), "\t")


def read_splits(task: Task, folder: Path | None) -> dict[str, list[TextExample]]:
    """Read all splits of a task.

    Raises:
      UserError: if a file is invalid; the message states the line and a fix.
    """
    columns = LAYOUTS[task.name].columns
    return {
        split: tables.read_sheet(task, sheet, columns, labelled=split != "test")
        for split, sheet in sheets(task, folder).items()
    }


def read(task: Task, path: Path, *, labelled: bool = True) -> list[TextExample]:
    """Read one file.

    Args:
      task: determines the columns and the range of the labels.
      path: the file.
      labelled: whether to read labels; otherwise every label is NaN.

    Raises:
      UserError: if the file is invalid; the message states the line and a fix.
    """
    return tables.read(task, path, LAYOUTS[task.name].columns, "\t", labelled=labelled)

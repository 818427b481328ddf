"""The folder of a run: who may write there, and the files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlora.formats.fingerprint import INPUTS, note_partial
from jaxlora.serving.finished_run import CONFIG, read_config
from jaxlora.training.config import Settings, flag
from jaxlora.utils import distributed, files
from jaxlora.utils.errors import UserError

METRICS, STATES = "metrics.jsonl", "states"


def write_json(path: Path, value: Any) -> None:
    """Write JSON into the run's folder; of many processes the first does."""
    if distributed.is_primary():
        files.write_json(path, value)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
      UserError: if the file is missing or broken.
    """
    if not path.exists():
        raise UserError(f"{path}: missing; is {path.parent} the folder of a run?")
    return files.read_json(path)


def check(out: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Refuse an `out` that a run with these settings may not write to; touches nothing.

    Raises:
      UserError: if `out` is a file, holds something else, holds a run and `resume` is off, or
        holds a run with other settings.
    """
    if not out.exists():
        if out.is_symlink():
            raise UserError(f"--out {out}: is a link to {os.readlink(out)}, which is not there")
        parent = next(p for p in out.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"--out {out}: {parent} is no folder that can be written to")
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if not (out / CONFIG).exists():
        ours = (files.LOCK, files.TEMPORARY)  # a first write that was killed leaves them
        if not all(path.name.startswith(ours) for path in out.iterdir()):
            raise UserError(f"--out {out}: is not empty and holds no run; name another folder")
        return
    read_config(out)
    if not resume:
        raise UserError(
            f"--out {out}: holds another run; go on with --resume, or name another --out"
        )
    old = read_config(out)["settings"]
    with contextlib.suppress(UserError):  # what cannot be understood is compared as it stands
        old = Settings.from_json(old).to_json()  # has the fields that earlier versions had not
    for name in settings:
        had, has = _compared(name, old.get(name)), _compared(name, settings[name])
        if had != has:
            place, had, has = _difference(flag(name), had, has)
            raise UserError(
                f"--out {out}: its run has {place} {had!r}, not {has!r}; "
                "give the same flags to --resume, or name another --out"
            )


def _difference(place: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """Find the first part in which two settings differ: where it is, and both values.

    >>> _difference("--tasks", [{"table": {"id": "a"}}], [{"table": {"id": "b"}}])
    ('--tasks 1 table id', 'a', 'b')
    """
    parts: list[tuple[Any, Any, Any]] = []
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [(name, old.get(name), new.get(name)) for name in new | old]
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        parts = [(number, *pair) for number, pair in enumerate(zip(old, new, strict=True), 1)]
    for name, a, b in parts:
        if a != b:
            return _difference(f"{place} {name}", a, b)
    return place, old, new


def _compared(name: str, value: Any) -> Any:
    """Return of a setting what a resumed run must share.

    Not what tasks are called, which changes no number, nor where something is: `check_same_inputs`
    compares what that holds.
    """
    if name in ("data_dir", "base"):
        return None
    if name != "tasks" or not isinstance(value, list):
        return value
    return [_untitled(task) if isinstance(task, dict) else task for task in value]


def _untitled(spec: dict[str, Any]) -> dict[str, Any]:
    task, table = spec.get("task"), spec.get("table")
    if isinstance(task, dict):
        spec = spec | {"task": {k: v for k, v in task.items() if k != "title"}}
    if not isinstance(table, dict):
        return spec
    files = ("train", "dev", "test")
    told = {k: v for k, v in table.items() if k not in files and v is not None}
    return spec | {"table": told}  # what is None was not asked for, or not yet known


def check_same_inputs(out: Path, inputs: Mapping[str, Any]) -> None:
    """A resumed run must see the base and the data it began with.

    Raises:
      UserError: naming what changed.
    """
    if (out / CONFIG).exists():
        old = read_config(out)["inputs"]
        unknown = {INPUTS["config"], INPUTS["tokenizer"]} - old.keys()  # in a run of format 1
        for name, value in inputs.items():
            if name not in unknown and old.get(name) != value:
                raise UserError(
                    f"--resume: {name} changed since {out} was begun; use another --out"
                )
        if unknown & inputs.keys():
            note_partial(f"--resume: {out}")


def write_table(path: Path, columns: Mapping[str, Iterable[str]]) -> None:
    """Write a CSV with a header into the run's folder; of many processes the first does."""
    text = io.StringIO()
    writer = files.csv_writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    if distributed.is_primary():
        files.write_text(path, text.getvalue())


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """While this lasts, no other run may use the folder.

    Raises:
      UserError: if one does.
    """
    if not distributed.is_primary():
        yield
        return
    files.make(out)
    with files.locked(out, f"--out {out}: another run is writing to it; name another"):
        yield


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events, one record at a time.

    Args:
      out: the run's folder.
      keep: group → step up to which earlier records are kept. A resumed run drops what came after
        its checkpoint, and writes the events anew, so nothing stands there twice.
    """

    def __init__(self, out: Path, keep: Mapping[str, int]) -> None:
        from tensorboardX import SummaryWriter

        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if not distributed.is_primary():  # so that the first one alone writes
            self._scratch = tempfile.TemporaryDirectory()
            out = Path(self._scratch.name)
        self.records = [r for r in read_records(out) if r["step"] <= keep.get(r["group"], 0)]
        files.write_text(out / METRICS, "".join(json.dumps(r) + "\n" for r in self.records))
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
        self._file = (out / METRICS).open("a", encoding="utf-8")
        files.make(out / "tensorboard")
        self._board = SummaryWriter(str(out / "tensorboard"))
        files.settle(out / "tensorboard")
        for record in self.records:
            self._show(record)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record: `kind`, `group`, `step`, and numbers or dicts of numbers."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if record["kind"] == "eval":  # a checkpoint follows, which counts on the records
            os.fsync(self._file.fileno())
        self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        prefix = f"{record['group']}/{record['kind']}"
        for name, value in flatten(record):
            self._board.add_scalar(f"{prefix}/{name}", value, record["step"])

    def close(self) -> None:
        """Flush and close both."""
        writer = self._board.file_writer.event_writer
        self._file.close()
        try:
            self._board.close()
        finally:
            writer.close = lambda: None  # a full disk would be told again, at the process's end
            if self._scratch:
                self._scratch.cleanup()


def flatten(record: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """The numbers of a record, dotted: `{"loss": {"sst": 1}}` → `loss.sst`."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{k}", v) for k, v in flatten(value))
        elif isinstance(value, int | float) and name != "step":
            yield name, value


def read_records(out: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, up to one that is none, as a killed run's last may be."""
    if not (out / METRICS).exists():
        return []
    records: list[dict[str, Any]] = []
    for line in (out / METRICS).read_bytes().splitlines():
        try:
            record = files.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_record(record):
            break
        records.append(record)
    return records


def _is_record(value: Any) -> bool:
    kinds = {"kind": str, "group": str, "step": int}
    return isinstance(value, dict) and all(type(value.get(k)) is t for k, t in kinds.items())

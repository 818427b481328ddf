"""The log of a run: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxlora.utils import distributed, files
from jaxlora.utils.extras import explained

METRICS = "metrics.jsonl"


class MetricsLog:
    """Writes records to `metrics.jsonl` and as TensorBoard events.

    Args:
      out: the run's folder.
      keep: group → step up to which earlier records are kept. A resumed run drops records from
        after its checkpoint and rewrites the events, so that none appears twice.
    """

    def __init__(self, out: Path, keep: Mapping[str, int]) -> None:
        with explained():
            from tensorboardX import SummaryWriter

        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if not distributed.is_primary():  # only the primary process writes to the run's folder
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
        if record["kind"] == "eval":  # the checkpoint that follows relies on the records
            os.fsync(self._file.fileno())
        self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        prefix = f"{record['group']}/{record['kind']}"
        for name, value in flatten(record):
            self._board.add_scalar(f"{prefix}/{name}", value, record["step"])

    def close(self) -> None:
        """Flush and close both files."""
        writer = self._board.file_writer.event_writer
        with contextlib.ExitStack() as stack:
            if self._scratch:
                stack.callback(self._scratch.cleanup)
            # Else it reports a full disk again when the process exits.
            stack.callback(setattr, writer, "close", lambda: None)
            stack.callback(self._board.close)
            self._file.close()


def flatten(record: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Yield the numbers of a record by dotted name: `{"loss": {"sst": 1}}` → `loss.sst`."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{k}", v) for k, v in flatten(value))
        elif isinstance(value, int | float) and name != "step":
            yield name, value


def read_records(out: Path) -> list[dict[str, Any]]:
    """Read the records of `metrics.jsonl`, up to the first that is incomplete or invalid."""
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

"""Predict a table of requests in batches, so that memory does not grow with the file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlora.data import hub, table_formats, tables
from jaxlora.data.delimited import Reading
from jaxlora.data.quoting import Quoting, Tally
from jaxlora.data.raw_examples import is_blank
from jaxlora.data.sheet import Sheet, Write
from jaxlora.data.tables import Columns
from jaxlora.data.tokenized import Blank, list_blank
from jaxlora.serving.answers import Answer, to_record
from jaxlora.serving.predictor import Predictor
from jaxlora.utils import files
from jaxlora.utils.errors import ConfigError, UserError

PART = 4096  # requests per batch
FIRST, SECOND = ("sentence1", "sentence", "text"), "sentence2"
# Columns of the answers. Delimited text omits those for lists and for all probabilities.
COLUMNS = {
    "id": str, "task": str, "prediction": float, "label": str, "labels": list,
    "probability": float, "probabilities": dict, "reason": str,
}  # fmt: skip


class Request(NamedTuple):
    """A row of a table of requests.

    Attributes:
      line: line number in the file, from 1.
      id: id of the row.
      asked: the request for the predictor: the task and its texts.
      reason: why it cannot be answered; empty if it can.
    """

    line: int
    id: str
    asked: tuple[str, ...]
    reason: str


def choose_texts(
    known: Columns | None, header: Sequence[str], text: str | None = None
) -> tuple[str, ...]:
    """Return the requested text columns, or by default those of the training tables.

    If the table lacks those: `sentence1` (or `sentence`, or `text`), and `sentence2` if it exists.

    Args:
      known: the columns of the training tables; None: unknown.
      header: the columns of the table.
      text: the requested column, or two separated by a comma.
    """
    if text:
        return tuple(text.split(","))
    usual = [name for name in FIRST if name in header][:1]
    if known and (not usual or set(known.text) <= set(header)):
        return known.text
    second = [SECOND] if SECOND in header else []
    return (*(usual or FIRST[:1]), *second)


def predict_file(
    predictor: Predictor,
    source: Path,
    target: Path,
    task: str | None,
    progress: Callable[[int], None] = lambda _: None,
    *,
    text: str | None = None,
    quoting: Quoting | None = None,
    strict: bool = False,
    note: Callable[[str], Any] = lambda _: None,
) -> int:
    """Answer the requests of a table, in its order, after a first pass has validated all rows.

    Args:
      predictor: answers the requests.
      source: a table of any format in `table_formats`, or a pipe with delimited text. The column
        `task` is required if `task` is None and there are several tasks. The column `id` is
        optional; by default ids are in the id column of the training table, or row numbers.
      target: the file for the answers, replaced atomically. Its suffix sets the format; its columns
        are `COLUMNS`, see `answers.to_record`. Rows with a blank text have a reason instead of a
        prediction.
      task: the task of all requests; None: from the column `task`, or the only task there is.
      progress: called with the number of answered rows.
      text: the text column, or two separated by a comma; None: see `choose_texts`.
      quoting: meaning of double quotes in delimited text; None: as in the training tables of the
        tasks, if these were read alike, see `tables.open_like`.
      strict: refuse blank texts.
      note: called with remarks for the user on how the table was read and on truncated texts.

    Returns:
      The number of rows.

    Raises:
      UserError: naming the line of an invalid request; `target` is then unchanged.
    """
    if task is not None:
        predictor.task(task)
    source, target = Path(hub.find(str(files.local(source)))), files.local(target)
    _check_target(source, target)
    with _rereadable(source) as file:
        sheet = tables.open_like(source, _reading_of(predictor, task), quoting, file)
        asked = Requests(predictor, sheet, task, text)
        count = asked.survey(strict, note)
        with table_formats.writing(target, COLUMNS) as write:
            done = asked.answer(write, progress, note)
            if done != count:
                raise UserError(f"{source}: {count:,} rows, then {done:,}: it changed meanwhile")
    return done


def _reading_of(predictor: Predictor, task: str | None) -> Reading | None:
    """Return how the training tables of the task, or of all tasks, were read; None: variously."""
    models = predictor.trained.models
    found = [one.facts.reading for name, one in models.items() if task in (None, name)]
    return found[0] if found and all(one == found[0] for one in found) else None


def _check_target(source: Path, target: Path) -> None:
    """Refuse a target that cannot be written, before any work is done."""
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError("output", "is the `input`; name another file", target)
    if target.is_dir():
        raise ConfigError("output", "is a folder; name a file", target)
    if target.exists() and not target.is_file():
        raise ConfigError("output", "is a device or a pipe; name a file", target)
    if not target.absolute().parent.is_dir():
        raise ConfigError("output", f"there is no folder {target.parent}; make it first", target)
    table_formats.check_written(target)


@contextlib.contextmanager
def _rereadable(source: Path) -> Iterator[Path]:
    """Yield the file itself, or a temporary copy of a pipe's content."""
    if source.is_file() or source.is_dir() or not source.exists():
        yield source
        return
    with tempfile.NamedTemporaryFile() as kept:
        try:
            with source.open("rb") as pipe:
                shutil.copyfileobj(pipe, kept)
        except OSError as error:
            raise UserError(
                f"{source}: cannot be read ({error.strerror}); check the path"
            ) from None
        kept.flush()
        yield Path(kept.name)


@dataclasses.dataclass(frozen=True)
class Requests:
    """The requests of a table, which can be read several times.

    Attributes:
      predictor: answers the requests.
      sheet: the table.
      task: the task of all requests; None: from the column `task`, or the only task there is.
      text: the text columns; None: see `choose_texts`.
    """

    predictor: Predictor
    sheet: Sheet
    task: str | None
    text: str | None = None

    def survey(self, strict: bool, note: Callable[[str], Any]) -> int:
        """Read and check the whole table, and pass remarks on it to `note`.

        Returns:
          The number of rows.

        Raises:
          UserError: naming the line of an invalid request, or if `strict`, of blank texts.
        """
        tally, blank, count = Tally(), list[Blank](), 0
        for request in self.read(tally):
            count += 1
            if request.reason:
                blank.append(Blank(len(blank), request.line, request.id))
        if blank and strict:
            raise UserError(
                f"{self.sheet.path}: {list_blank(blank)}; fill them in, or go without "
                "`strict=True`, which leaves their answers empty"
            )
        if blank:
            note(f"{list_blank(blank)} not answered")
        for told in self.sheet.describe(tally):
            note(told)
        return count

    def answer(
        self, write: Write, progress: Callable[[int], None], note: Callable[[str], Any]
    ) -> int:
        """Answer all requests in batches; return the number of rows."""
        done, requests, truncated = 0, self.read(Tally()), list[int]()
        while part := list(itertools.islice(requests, PART)):
            sound = [n for n, request in enumerate(part) if not request.reason]
            found = self.predictor([part[n].asked for n in sound], truncated.append)
            answers = dict(zip(sound, found, strict=True))
            write([self._record(request, answers.get(n)) for n, request in enumerate(part)])
            done += len(part)
            progress(done)
        if any(truncated):
            note(self.predictor.describe_truncated(sum(truncated)))
        return done

    def read(self, tally: Tally) -> Iterator[Request]:
        """Yield the requests; `tally` counts the rows, including the header.

        Raises:
          UserError: naming the line of an invalid request.
        """
        _, header = next(self.sheet.rows(), (0, []))
        task = self.task or self._only_task(header)
        needed = self._texts_of(task, header) if task else ("task", *self._usual(header))
        optional = ("id", "task", SECOND)
        columns = list(dict.fromkeys(needed))
        try:
            header, rows = tables.select(
                self.sheet, columns, "A table of requests", optional, tally
            )
        except tables.MissingColumnsError as error:
            what = "the task with `task`" if "task" in error.names else "other texts with `text`"
            raise UserError(f"{error} Name {what}.") from None
        texts: dict[str, tuple[str, ...]] = {}
        for number, (line, fields) in enumerate(rows):
            row = dict(zip(header, fields, strict=True))
            named = row.get("task", "")
            if self.task and named not in ("", self.task):
                raise UserError(
                    f"{self.sheet.where(line)}: is for {named!r}; leave out `task={self.task}`"
                )
            own = task or named
            try:
                if own not in texts:
                    texts[own] = self._texts_of(own, header)
                row.setdefault("id", row.get(self._id_of(own), str(number)))
                yield self._request(line, row, own, texts[own])
            except UserError as error:
                raise UserError(f"{self.sheet.where(line)}: {error}") from None

    def _only_task(self, header: Sequence[str]) -> str | None:
        """Return the predictor's only task if the table has no column `task`; else None."""
        names = list(self.predictor.tasks)
        return names[0] if len(names) == 1 and "task" not in header else None

    def _usual(self, header: Sequence[str]) -> tuple[str, ...]:
        """Return the text columns that a table for several tasks needs.

        None are required if the table has the training columns of some task: the columns of each
        row then depend on its task.
        """
        own = (model.facts.columns for model in self.predictor.trained.models.values())
        if not self.text and any(known and set(known.text) <= set(header) for known in own):
            return ()
        return choose_texts(None, header, self.text)

    def _texts_of(self, task: str, header: Sequence[str]) -> tuple[str, ...]:
        return choose_texts(self.predictor.trained.find(task).facts.columns, header, self.text)

    def _id_of(self, task: str) -> str:
        """Return the id column of a task's training tables, else `id`."""
        known = self.predictor.trained.find(task).facts.columns
        return (known and known.id) or "id"

    def _request(
        self, line: int, row: dict[str, str], task: str, columns: tuple[str, ...]
    ) -> Request:
        """Return a row's request; a single-text task ignores a blank `sentence2`."""
        if missing := [name for name in columns if name not in row]:
            raise UserError(f"{task} needs the column {', '.join(missing)}")
        pair, texts = self.predictor.task(task).pair, {name: row[name] for name in columns}
        if not pair and columns[1:] == (SECOND,) and is_blank(row[SECOND]):
            del texts[SECOND]
        blank = [name for name, text in texts.items() if is_blank(text)]
        asked = (task, *texts.values())
        if blank and len(texts) == self.predictor.task(task).texts:
            return Request(line, row["id"], asked, f"{' and '.join(blank)} blank")
        self.predictor.check(asked)
        return Request(line, row["id"], asked, "")

    def _record(self, request: Request, answer: Answer | None) -> dict[str, Any]:
        """Return the answer to a request as column → value, for `COLUMNS`."""
        task = request.asked[0]
        found = {"task": task}
        if answer is not None:
            found = to_record(self.predictor.task(task), answer)
        return dict.fromkeys(COLUMNS) | found | {"id": request.id, "reason": request.reason}

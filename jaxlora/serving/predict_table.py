"""Predict a table of requests, a part at a time, so that memory does not grow with the file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxlora.data import tables
from jaxlora.data.quoting import Quoting, Tally
from jaxlora.data.raw_examples import is_blank
from jaxlora.data.tokenized import Blank, list_blank
from jaxlora.serving.answers import Answer, cells
from jaxlora.serving.predictor import Predictor
from jaxlora.utils import files
from jaxlora.utils.errors import ConfigError, UserError

PART = 4096  # requests at a time
FIRST, SECOND = ("sentence1", "sentence", "text"), "sentence2"


class Request(NamedTuple):
    """A row of a table of requests.

    Attributes:
      line: where it stands, from 1.
      id: its name.
      asked: what the predictor is asked: the task and the texts.
      reason: why there is no answer; empty: there is one.
    """

    line: int
    id: str
    asked: tuple[str, ...]
    reason: str


Write = Callable[[Request, Answer | None], Any]


def predict_file(
    predictor: Predictor,
    source: Path,
    target: Path,
    task: str | None,
    progress: Callable[[int], None] = lambda _: None,
    *,
    quoting: Quoting | None = None,
    strict: bool = False,
    note: Callable[[str], Any] = lambda _: None,
) -> int:
    """Answer the requests of a table in order, when all of it has been read and found in order.

    Args:
      predictor: who answers.
      source: a table with a header: `sentence` (or `sentence1`, or `text`), `sentence2` where a
        pair's second stands, `task` if none is given, and perhaps `id`. A pipe will do.
      target: a CSV `id,task,prediction,label,probability,reason` (`label` and its probability are
        empty for scores; those of a set are separated by the task's `label_delimiter`), or, if it
        ends with `.jsonl`, a line of JSON for each with all
        probabilities. A row with a blank text has no prediction, but a reason. It is written under
        another name and renamed when complete.
      task: the task of all requests; None: the column says it.
      progress: is told how many are done.
      quoting: what double quotes mean; None: detected, see `tables.open_sheets`.
      strict: refuse blank texts.
      note: is told what must be known of how the table was read.

    Returns:
      How many rows there were.

    Raises:
      UserError: naming the line; then `target` is left as it was.
    """
    if task is not None:
        predictor.task(task)
    source, target = files.local(source), files.local(target)
    _check_target(source, target)
    with _rereadable(source) as file:
        sheet = tables.open_sheets(
            {"": (source, lambda: tables.stream(file, source))}, None, quoting
        )
        asked = Requests(predictor, sheet[""], task)
        count = asked.survey(strict, note)
        with files.replacing(target.resolve(), "w") as out:
            write = _json_writer(out) if target.suffix == ".jsonl" else _csv_writer(out, predictor)
            done = asked.answer(write, progress)
            if done != count:
                raise UserError(f"{source}: {count:,} rows, then {done:,}: it changed meanwhile")
    return done


def _check_target(source: Path, target: Path) -> None:
    """Refuse before anything is answered what could not be written at the end."""
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError("output", "is the `input`; name another file", target)
    if target.is_dir():
        raise ConfigError("output", "is a folder; name a file", target)
    if target.exists() and not target.is_file():
        raise ConfigError("output", "is a device or a pipe; name a file", target)
    if not target.absolute().parent.is_dir():
        raise ConfigError("output", f"there is no folder {target.parent}; make it first", target)


@contextlib.contextmanager
def _rereadable(source: Path) -> Iterator[Path]:
    """Give the file itself, or what comes out of a pipe in a temporary one."""
    if source.is_file() or not source.exists():
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
    """The requests of a table; each reading begins at its first line.

    Attributes:
      predictor: who answers.
      sheet: the table.
      task: the task of all requests; None: the column says it.
    """

    predictor: Predictor
    sheet: tables.Sheet
    task: str | None

    def survey(self, strict: bool, note: Callable[[str], Any]) -> int:
        """Read the whole table, and say what must be known of it.

        Returns:
          How many rows there are.

        Raises:
          UserError: naming the line of a request that cannot be answered; if `strict`, of blank
            ones.
        """
        tally, blank = Tally(), list[Blank]()
        for request in self.read(tally):
            if request.reason:
                blank.append(Blank(len(blank), request.line, request.id))
        if blank and strict:
            raise UserError(
                f"{self.sheet.path}: {list_blank(blank)}; fill them in, or go without "
                "`strict=True`, which leaves their answers empty"
            )
        if blank:
            note(f"{list_blank(blank)} not answered")
        for told in tables.describe(self.sheet.dialect, tally):
            note(told)
        return tally.rows - 1

    def answer(self, write: Write, progress: Callable[[int], None]) -> int:
        """Answer them part by part; returns how many rows there were."""
        done, requests = 0, self.read(Tally())
        while part := list(itertools.islice(requests, PART)):
            sound = [n for n, request in enumerate(part) if not request.reason]
            found = self.predictor([part[n].asked for n in sound])
            answers = dict(zip(sound, found, strict=True))
            for n, request in enumerate(part):
                write(request, answers.get(n))
            done += len(part)
            progress(done)
        return done

    def read(self, tally: Tally) -> Iterator[Request]:
        """Yield the requests; `tally` counts the rows, the header among them.

        Raises:
          UserError: naming the line of one that cannot be answered.
        """
        path, dialect = self.sheet.path, self.sheet.dialect
        lines = self.sheet.rows(tally)
        _, header = next(lines, (0, []))
        first = next((name for name in FIRST if name in header), FIRST[1])
        needed = [first] if self.task else [first, "task"]
        optional = ("id", "task", SECOND)
        tables.find_columns(
            header, needed, path, dialect.delimiter, "A table of requests", optional
        )
        for number, (line, fields) in enumerate(lines):
            where = f"{path}:{line}"
            tables.check_width(fields, header, where, dialect)
            row = {"id": str(number), **dict(zip(header, fields, strict=True))}
            named = row.get("task", "")
            if self.task and named not in ("", self.task):
                raise UserError(f"{where}: is for {named!r}; leave out `task={self.task}`")
            try:
                yield self._request(line, row, self.task or named, first)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None

    def _request(self, line: int, row: dict[str, str], task: str, first: str) -> Request:
        """A row's request; a second text that is blank is none where the task takes one text."""
        texts = {first: row[first]}
        if SECOND in row and (self.predictor.task(task).pair or not is_blank(row[SECOND])):
            texts[SECOND] = row[SECOND]
        blank = [name for name, text in texts.items() if is_blank(text)]
        asked = (task, *texts.values())
        if blank and len(texts) == self.predictor.task(task).texts:
            return Request(line, row["id"], asked, f"{' and '.join(blank)} blank")
        self.predictor.check(asked)
        return Request(line, row["id"], asked, "")


def _csv_writer(file: IO[str], predictor: Predictor) -> Write:
    writer = files.csv_writer(file)
    writer.writerow(("id", "task", "prediction", "label", "probability", "reason"))

    def write(request: Request, answer: Answer | None) -> None:
        shown = ("", "", "") if answer is None else cells(predictor.task(answer.task), answer)
        writer.writerow((request.id, request.asked[0], *shown, request.reason))

    return write


_NOTHING = dict.fromkeys(("value", "label", "probabilities"))


def _json_writer(file: IO[str]) -> Write:
    def write(request: Request, answer: Answer | None) -> None:
        found = _NOTHING if answer is None else answer._asdict()
        record = {"id": request.id, "task": request.asked[0], **found}
        file.write(json.dumps(record | {"reason": request.reason}, ensure_ascii=False) + "\n")

    return write

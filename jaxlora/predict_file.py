"""Predict a table of requests, a part at a time, so that memory does not grow with the file."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from jaxlora import folders
from jaxlora.data import tables
from jaxlora.errors import UserError
from jaxlora.predict import Answer, Predictor

PART = 4096  # requests at a time
FIRST, SECOND = ("sentence1", "sentence", "text"), "sentence2"

Request = tuple[str, tuple[str, ...]]  # its id, and what the predictor is asked


def predict_file(
    predictor: Predictor,
    source: Path,
    target: Path,
    task: str | None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Answer the requests of a table in order.

    Args:
      predictor: who answers.
      source: a table with a header: `sentence` (or `sentence1`, or `text`), `sentence2` where a
        pair's second stands, `task` if none is given, and perhaps `id`.
      target: a CSV `id,task,prediction,label,probability` (`label` and its probability are empty
        for scores), or, if it ends with `.jsonl`, a line of JSON for each with all probabilities.
        It is written under another name and renamed when complete.
      task: the task of all requests; None: the column says it.
      progress: is told how many are done.

    Returns:
      How many there were.

    Raises:
      UserError: naming the line; then `target` is left as it was.
    """
    if task is not None:
        predictor.task(task)
    source, target = folders.local(source), folders.local(target)
    _check_target(source, target)
    done = 0
    with folders.replacing(target.resolve(), "w") as file:
        write = _json_writer(file) if target.suffix == ".jsonl" else _csv_writer(file)
        requests = _requests(predictor, source, task)
        while part := list(itertools.islice(requests, PART)):
            answers = predictor([request for _, request in part])
            for (name, _), answer in zip(part, answers, strict=True):
                write(name, answer)
            done += len(part)
            progress(done)
    return done


def _check_target(source: Path, target: Path) -> None:
    """Refuse before anything is answered what could not be written at the end."""
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f"--output {target}: is the --input; name another file")
    if target.is_dir():
        raise UserError(f"--output {target}: is a folder; name a file")
    if target.exists() and not target.is_file():
        raise UserError(f"--output {target}: is a device or a pipe; name a file")
    if not target.absolute().parent.is_dir():
        raise UserError(f"--output {target}: there is no folder {target.parent}; make it first")


def _requests(predictor: Predictor, source: Path, task: str | None) -> Iterator[Request]:
    with _open(source) as file:
        try:
            first_line = next((line for line in file if line.strip("\r\n")), "")
            delimiter = tables.sniff(first_line, source)
        except UnicodeDecodeError:
            raise UserError(f"{source}: is not UTF-8 text; save it as UTF-8") from None
        file.seek(0)
        lines = tables.read_lines(file, source, delimiter)
        _, header = next(lines, (0, []))
        first = next((name for name in FIRST if name in header), FIRST[1])
        needed = [first] if task else [first, "task"]
        optional = ("id", "task", SECOND)
        tables.find_columns(header, needed, source, delimiter, "A table of requests", optional)
        at = {name: header.index(name) for name in header}
        for number, (line, fields) in enumerate(lines):
            where = f"{source}:{line}"
            tables.check_width(fields, header, where, delimiter)
            texts = [fields[at[first]]]
            if SECOND in at and fields[at[SECOND]]:
                texts.append(fields[at[SECOND]])
            named = fields[at["task"]] if "task" in at else ""
            if task and named not in ("", task):
                raise UserError(f"{where}: is for {named!r}; leave out --task={task}")
            request = (task or named, *texts)
            try:
                predictor.check(request)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            yield fields[at["id"]] if "id" in at else str(number), request


def _open(source: Path) -> TextIO:
    try:
        return source.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); check the path") from None


def _csv_writer(file: IO[str]) -> Callable[[str, Answer], Any]:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("id", "task", "prediction", "label", "probability"))

    def write(name: str, answer: Answer) -> None:
        if answer.probabilities is None or answer.label is None:
            writer.writerow((name, answer.task, f"{answer.value:.4f}", "", ""))
            return
        probability = f"{answer.probabilities[answer.label]:.4f}"
        writer.writerow((name, answer.task, f"{answer.value:.0f}", answer.label, probability))

    return write


def _json_writer(file: IO[str]) -> Callable[[str, Answer], Any]:
    def write(name: str, answer: Answer) -> None:
        file.write(json.dumps({"id": name, **answer._asdict()}, ensure_ascii=False) + "\n")

    return write

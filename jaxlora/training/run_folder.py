"""The folder of a run: checks before writing to it, and atomic writes of its files."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.data.tokenized import SPLITS
from jaxlora.formats.fingerprint import INPUTS, note_partial
from jaxlora.serving.finished_run import CONFIG, RESULT, read_config
from jaxlora.training import setting_names
from jaxlora.training.inputs import DEV_SET
from jaxlora.utils import distributed, files
from jaxlora.utils.errors import ConfigError, UserError

STATES = "states"
# Settings for the length of a run, and the one that follows from it for your own tables.
LENGTHS, PACE = ("epochs", "max_steps"), "eval_every"


def write_json(path: Path, value: Any) -> None:
    """Write JSON into the run's folder, in the primary process only."""
    if distributed.is_primary():
        files.write_json(path, value)


def read_json(path: Path) -> Any:
    """Read JSON from the run's folder.

    Raises:
      UserError: if the file is missing or not valid JSON.
    """
    if not path.exists():
        raise UserError(f"{path}: missing; is {path.parent} the folder of a run?")
    return files.read_json(path)


def check(out: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Check that a run with these settings may write to `out`, without changing anything.

    Raises:
      UserError: if `out` is a file, holds something else, holds a run and `resume` is off, or
        holds a run with other settings.
    """
    if not out.exists():
        if out.is_symlink():
            raise ConfigError("out", f"is a link to {os.readlink(out)}, which is not there", out)
        parent = next(p for p in out.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ConfigError("out", f"{parent} is no folder that can be written to", out)
        return
    if not out.is_dir():
        raise ConfigError("out", "is a file; name a folder", out)
    if not (out / CONFIG).exists():
        ours = (files.LOCK, files.TEMPORARY)  # left by a run that was killed at its first write
        if not all(path.name.startswith(ours) for path in out.iterdir()):
            raise ConfigError("out", "is not empty and holds no run; name another folder", out)
        return
    old = read_config(out)["settings"]
    if not resume:
        raise ConfigError(
            "out", "holds another run; go on with `resume=True`, or name another folder", out
        )
    _check_settings(out, old, settings)


def _check_settings(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings.

    Raises:
      ConfigError: if settings differ; the error has a line for each of them.
    """
    old = setting_names.complete(old)
    had, has = ({name: _compared(name, one.get(name)) for name in new} for one in (old, new))
    changed = [name for name in new if had[name] != has[name]]
    if not changed:
        return
    remedy = "resume it with the same settings, or name another folder"
    if _only_longer(had, has) and (out / RESULT).exists():
        remedy = f"it is finished; train on in another folder with `start_from={out}`"
    lines = _list_differences(had, has) or [f"  {name}" for name in changed]
    raise ConfigError("out", "\n".join([f"its run has other settings; {remedy}:", *lines]), out)


def _find_differences(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> Mapping[str, Sequence[Any]]:
    """Return the settings in which two runs differ, with both values."""
    return setting_names.find_differences([setting_names.name_settings(one) for one in (old, new)])


def _only_longer(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether the new settings differ only in a longer training of some or all tasks."""
    both = [(name.rpartition(".")[2], *pair) for name, pair in _find_differences(old, new).items()]
    lengths = [(had, has) for name, had, has in both if name in LENGTHS]
    longer = all(had is not None and (has is None or has > had) for had, has in lengths)
    return bool(lengths) and longer and {name for name, *_ in both} <= {*LENGTHS, PACE}


def _list_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting in which two runs differ."""
    return [
        f"  {f'`{name}`' if name.isidentifier() else name}: {_shown(had)} there, {_shown(has)} here"
        for name, (had, has) in _find_differences(old, new).items()
    ]


def _shown(value: Any) -> str:
    return setting_names.show(value) or "nothing"


def _compared(name: str, value: Any) -> Any:
    """Return the part of a setting that must be equal in a resumed run.

    Titles of tasks may change, since they affect no number, and so may paths:
    `check_same_inputs` compares the content of the files.
    """
    if name in ("data_dir", "base"):
        return None
    if name == "start_from":
        return None if value is None else "a bank"
    if name != "tasks" or not isinstance(value, list):
        return value
    return [_untitled(task) if isinstance(task, dict) else task for task in value]


def _untitled(spec: dict[str, Any]) -> dict[str, Any]:
    task, table = spec.get("task"), spec.get("table")
    if isinstance(task, dict):
        spec = spec | {"task": {k: v for k, v in task.items() if k != "title"}}
    if not isinstance(table, dict):
        return spec
    given = {k: v for k, v in table.items() if k not in SPLITS and v is not None}
    return spec | {"table": given}  # None: not given, or unknown to the version that wrote it


def check_same_inputs(out: Path, inputs: Mapping[str, Any]) -> None:
    """Check that a resumed run reads the base and the data that it began with.

    Raises:
      UserError: if an input changed; the error names it.
    """
    if (out / CONFIG).exists():
        old = read_config(out)["inputs"]
        unknown = {INPUTS["config"], INPUTS["tokenizer"]} - old.keys()  # in a run of format 1
        # Earlier versions had no checksums of the dev sets alone.
        later = {name for name in inputs if name.startswith(DEV_SET)} - old.keys()
        later.add(INPUTS["pairs"])  # its effect is in the checksum of the data of joint pairs
        for name, value in inputs.items():
            if name not in unknown | later and old.get(name) != value:
                raise ConfigError(
                    "resume", f"{name} changed since {out} was begun; use another `out`"
                )
        if unknown & inputs.keys():
            note_partial(f"resumed run {out}")


def write_table(path: Path, columns: Mapping[str, Iterable[str]]) -> None:
    """Write a CSV file with a header into the run's folder, in the primary process only."""
    text = io.StringIO()
    writer = files.csv_writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    if distributed.is_primary():
        files.write_text(path, text.getvalue())


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Lock the folder against other runs in this context.

    Raises:
      UserError: if another run is writing to it.
    """
    if not distributed.is_primary():
        yield
        return
    files.make(out)
    with files.locked(out, f"`out` {out}: another run is writing to it; name another"):
        yield

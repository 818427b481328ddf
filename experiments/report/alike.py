"""Check that runs are comparable: find settings that differ unintentionally."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from experiments.report.collect import Collection, Run
from experiments.studies import STUDIES

_OF_A_SEED = {"seed", "data_dir"}  # the data itself is compared by the dev examples
_OF_ALL = ("base", "source", "epochs", "max_steps", "batch_size", "max_length", "dtype")
_OF_ADAPTERS = ("rank", "alpha", "target_modules")


def differing(collection: Collection) -> list[str]:
    """Return a line for each setting that differs between seeds of a study, or between studies."""
    lines = [
        f"not alike: seeds of {study} differ in {name}: {values}"
        for study, runs in collection.studies.items()
        for name in sorted(runs[0].settings.keys() - _OF_A_SEED)
        if (values := _values(name, runs, lambda run: run.seed))
    ]
    for name in (*_OF_ALL, *_OF_ADAPTERS):
        compared = [run for run in collection.runs if _is_compared(run, name)]
        if values := _values(name, compared, lambda run: run.study):
            lines.append(f"not alike: studies differ in {name}: {values}")
    return lines


def _is_compared(run: Run, name: str) -> bool:
    """Return whether a run should agree with others in a setting that its study does not vary."""
    study = STUDIES.get(run.study)
    means_something = name not in _OF_ADAPTERS or run.settings["adapt"] == "lora"
    return means_something and study is not None and name not in study.settings


def _values(name: str, runs: Iterable[Run], key: Callable[[Run], Any]) -> str:
    """List the values of a setting and their runs; empty if all values recorded are equal."""
    found: dict[Hashable, dict[Any, None]] = {}
    for run in runs:
        if name in run.settings:
            found.setdefault(_plain(run.settings[name]), {})[key(run)] = None
    if len(found) < 2:
        return ""
    return "; ".join(
        f"{textwrap.shorten(str(value), 60, placeholder=' …')} ({', '.join(map(str, who))})"
        for value, who in found.items()
    )


def _plain(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return tuple((name, _plain(item)) for name, item in value.items())
    return value

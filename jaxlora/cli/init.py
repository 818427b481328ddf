"""`jaxlora init`: inspect tables of data, and write a task file to review and train from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jaxlora.cli.flags import call
from jaxlora.cli.terminal import say
from jaxlora.data import hub
from jaxlora.data.draft import draft, remarks
from jaxlora.data.survey import group_files, survey
from jaxlora.data.task_files import name_of
from jaxlora.formats import huggingface
from jaxlora.formats import tokenizer as tokenizers
from jaxlora.training.config import ModelConfig
from jaxlora.utils import files
from jaxlora.utils.errors import ConfigError, UserError

Tables = Annotated[tuple[Path, ...], tyro.conf.Positional]


def init(
    tables: Tables,
    /,
    *,
    text: str | None = None,
    label: str | None = None,
    output: Path | None = None,
    base: str = huggingface.MINILM,
    max_length: int = ModelConfig().max_length,
) -> None:
    """Inspect tables of data, and write a commented task file for `jaxlora train`.

    It detects kinds, classes with their counts, lengths, duplicates and imbalanced classes.

    Args:
      tables: a table for each task, or its files, such as topic-train.csv and topic-dev.csv.
      text: the text column, or the two columns of a pair, separated by a comma; default: guessed.
      label: the label column, or several columns of 0 and 1, separated by commas; default: guessed.
      output: the file to write; default: the name of the first table with .toml, beside it or, for
        a Hub dataset, in the working directory.
      base: model whose tokenizer counts the tokens.
      max_length: length in tokens at which sentences will be cut.
    """
    if not tables:
        raise UserError("name a table of data, as in `jaxlora init tickets.csv`")
    local = [files.local(path) for path in tables]
    grouped = group_files(local)
    target = files.local(output) if output else _default_output(local[0], next(iter(grouped)))
    named = _by_task_name(grouped)
    if target.exists():
        raise ConfigError("output", "is there already; remove it, or name another file", target)
    config = huggingface.config_of(base)
    tokenizer = tokenizers.load(huggingface.find(base), config.vocab_size)
    tokenizer.no_truncation()
    found = {name: survey(each, tokenizer, text, label) for name, each in named.items()}
    with files.replacing(target, "w") as file:
        file.write(draft(found, target.parent, max_length))
    for name, one in found.items():
        kinds = ", ".join(one.labels.classes[:12]) or "scores from {:g} to {:g}".format(
            *one.labels.range or ()
        )
        label = one.label if isinstance(one.label, str) else ", ".join(one.label)
        say(f"{name}: {one.labels.kind} of {' and '.join(one.text)} by {label}: {kinds}")
        for remark in remarks(one, max_length):
            say(f"  {remark}")
    say(f"{target}: read it, then run: jaxlora train {shlex.quote(str(target))}")


def _default_output(first: Path, stem: str) -> Path:
    """Return the task file beside a table; in the working directory for a Hub dataset."""
    if str(first).startswith(hub.PREFIX):
        return Path(f"{name_of(Path(stem))}.toml")
    return first.with_name(f"{stem}.toml")


def _by_task_name(grouped: Mapping[str, dict[str, Path]]) -> dict[str, dict[str, Path]]:
    """Return the files of each task by the name of the task, see `name_of`.

    Raises:
      UserError: if two tasks have the same name.
    """
    named: dict[str, dict[str, Path]] = {}
    for stem, each in grouped.items():
        name = name_of(Path(stem))
        if name in named:
            raise UserError(
                f"{each['train']}: its task is named {name}, as that of {named[name]['train']} is; "
                "rename one of the files, or draft each alone and rename a task in its TOML file"
            )
        named[name] = each
    return named


def main(words: Sequence[str]) -> None:
    """Run `init`."""
    call(init, "jaxlora init", words)

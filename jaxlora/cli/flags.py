"""Flags of the commands for fields and arguments of the library."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import tyro

from jaxlora.utils import process
from jaxlora.utils.errors import ConfigError, UserError, list_some

# Setting → name of its flag, where the two differ.
_NAMES = {"dropout": "lora_dropout"}
_BYTES = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) ?([KMGT])(i?)B", re.ASCII | re.IGNORECASE)
_ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def flag(name: str) -> str:
    """Return the flag of `jaxlora train` for a setting.

    >>> flag("max_steps"), flag("dropout")
    ('--max-steps', '--lora-dropout')
    """
    return "--" + _NAMES.get(name, name).replace("_", "-")


def bytes_of(name: str, text: str) -> int:
    """Parse a number of bytes with a unit, from kB to TiB.

    Raises:
      ConfigError: if the text is not such a number, or it is 0.

    >>> bytes_of("memory", "512MB"), bytes_of("memory", "1.5GiB")
    (512000000, 1610612736)
    """
    found = _BYTES.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(name, "give a number above 0 with a unit, such as 512MB or 2GiB", text)
    return int(
        float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1)
    )


def choose_task(task: str | None, tasks: Collection[str]) -> str:
    """Return the given task, or the only one if none is given.

    Raises:
      UserError: if none is given and there is not exactly one.

    >>> choose_task(None, ["sts"])
    'sts'
    """
    if task is None and len(tasks) != 1:
        raise UserError(f"`task` is missing; there are {list_some(tasks)}")
    return task or next(iter(tasks))


def flags_of(command: Callable[..., Any]) -> dict[str, str]:
    """Return argument → flag of a command: a function, or a dataclass of flags.

    An argument whose flag has another name is there under both names. Arguments that are
    dataclasses of flags give theirs; positional ones have no dashes.

    >>> def show(run: str, /, max_steps: int = 1): ...
    >>> flags_of(show)
    {'max_steps': '--max-steps'}
    """
    named = inspect.signature(command).parameters
    found: dict[str, str] = {}
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        bare = getattr(hint, "__origin__", hint)  # of a type with marks
        if isinstance(bare, type) and dataclasses.is_dataclass(bare):
            found |= flags_of(bare)
        elif name in named and named[name].kind is not inspect.Parameter.POSITIONAL_ONLY:
            shown = _flag_of(name, getattr(hint, "__metadata__", ()))
            found |= {name: shown, shown.lstrip("-").replace("-", "_"): shown}
    return found


def _flag_of(name: str, marks: Sequence[Any]) -> str:
    """Return the flag of an argument; its type may be marked as positional, or with a name."""
    if tyro.conf.Positional in marks:
        return name
    other = next((mark.name for mark in marks if getattr(mark, "name", None)), name)
    return "--" + str(other).replace("_", "-")


def with_flags(message: str, known: Mapping[str, str]) -> str:
    """Replace the names of arguments in a message of the library by a command's flags.

    Names that are no flag of the command stay: fields of files, and arguments of other functions.

    >>> with_flags("`rank` 600: too much; see `resume=True`", {"rank": "--rank"})
    '--rank 600: too much; see `resume=True`'
    """

    def replace(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in known:
            return found[0]
        return known[name] if value in (None, "True") else f"{known[name]}={value.strip(chr(39))}"

    return _ARGUMENT.sub(replace, message)


def naming_flags(command: Callable[..., Any]) -> Callable[[str], str]:
    """Return a function that rewrites messages with the flags of a command."""
    return functools.partial(with_flags, known=flags_of(command))


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose errors and notes name its flags."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with process.rewritten(naming_flags(command)):
            command(*args, **kwargs)

    return run


def call(command: Callable[..., None], prog: str, words: Sequence[str]) -> None:
    """Parse the words of a command line and call a command; its messages name its flags."""
    tyro.cli(_explained(command), prog=prog, args=words)


def call_one(
    commands: Mapping[str, Callable[..., None]], prog: str, about: str, words: Sequence[str]
) -> None:
    """Call the command that the first word names, see `call`."""
    tyro.extras.subcommand_cli_from_dict(
        {name: _explained(command) for name, command in commands.items()},
        prog=prog, description=about, args=words, config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip


def exit_code(
    main: Callable[[Any], object], kind: Callable[..., Any], words: Sequence[str] | None
) -> int:
    """Run a script, and return its exit code, see `process.exit_code`.

    Args:
      main: takes what `kind` returns.
      kind: a dataclass of flags, or a function, which is called with them.
      words: the arguments; None takes those of the process.
    """
    return process.exit_code(lambda: main(tyro.cli(kind, args=words)), naming_flags(kind))

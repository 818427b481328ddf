"""Flags of the commands for fields and arguments of the library."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from jaxlora.utils import process
from jaxlora.utils.errors import ConfigError, UserError, list_some

# Argument → name of its flag, where the two differ.
_NAMES = {"dropout": "lora_dropout"}
# Arguments that are positional on the command line.
_POSITIONAL = ("tasks",)
_BYTES = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) ?([KMGT])(i?)B", re.ASCII | re.IGNORECASE)
_ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def flag(name: str) -> str:
    """Return the flag for a field or an argument.

    >>> flag("max_steps"), flag("dropout")
    ('--max-steps', '--lora-dropout')
    """
    if name in _POSITIONAL:
        return name
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


def with_flags(message: str) -> str:
    """Replace the names of arguments in a message of the library by flags.

    >>> with_flags("`max_length` 600: 512 at most; go on with `resume=True` or `base='minilm'`")
    '--max-length 600: 512 at most; go on with --resume or --base=minilm'
    """
    return _ARGUMENT.sub(_as_flag, message)


def _as_flag(found: re.Match[str]) -> str:
    name, value = found.groups()
    return flag(name) if value in (None, "True") else f"{flag(name)}={value.strip(chr(39))}"


def exit_code(main: Callable[[], object]) -> int:
    """Run a command and return its exit code, see `process.exit_code`; messages name flags."""
    return process.exit_code(main, with_flags)

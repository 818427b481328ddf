"""Fields and arguments of the library as flags of the commands."""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxlora.utils import process

# Flags that are not called as the argument is.
_NAMES = {"dropout": "lora_dropout"}
# Arguments that are no flags: they stand alone on the command line.
_POSITIONAL = ("tasks",)
_ARGUMENT = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")


def flag(name: str) -> str:
    """Return the flag of a field or an argument.

    >>> flag("max_steps"), flag("dropout")
    ('--max-steps', '--lora-dropout')
    """
    if name in _POSITIONAL:
        return name
    return "--" + _NAMES.get(name, name).replace("_", "-")


def with_flags(message: str) -> str:
    """Write the arguments that a message of the library names as flags.

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

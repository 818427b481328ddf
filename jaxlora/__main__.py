"""The command `jaxlora`, also available as `python -m jaxlora`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jaxlora
from jaxlora.utils.extras import MissingExtraError, explained


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; this is the console script's entry point.

    The commands are imported here, so that a missing package is reported in one line.

    Args:
      args: the command-line arguments; None takes those of the process.

    Returns:
      The exit code: 2 for bad input or a missing package, 130 when interrupted.
    """
    words = sys.argv[1:] if args is None else list(args)
    if words == ["--version"]:
        print(f"jaxlora {jaxlora.__version__}")
        return 0
    try:
        with explained():
            from jaxlora.cli.main import main as command

            return command(words)
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # during these imports; later ones are the command's
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

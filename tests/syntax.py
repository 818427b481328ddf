"""Python's own parser, for tests that read source code."""

import ast
import gc


def parse(source):
    """Parse source code while no garbage is collected.

    A finalizer that prints a traceback, such as that of a failed asyncio task, parses as well, and
    CPython before 3.11.9 raises a SystemError then (its issue 106905).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if enabled:
            gc.enable()

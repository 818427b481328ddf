"""Python's own parser, for tests that read source code."""

import ast
import gc


def parse(source):
    """Parse source code while no garbage is collected.

    A finalizer that prints a traceback, such as that of a failed asyncio task, parses as well, and
    CPython 3.11.7 raises a SystemError then: "AST constructor recursion depth mismatch".
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if enabled:
            gc.enable()

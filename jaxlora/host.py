"""The process on its host."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from jaxlora.errors import UserError

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def reuse_memory() -> bool:
    """Let freed memory stay with this process; call it before JAX computes anything.

    XLA allocates a program's temporary memory anew each time it runs it. glibc takes so large a
    piece from the kernel and gives it back, so on CPU every train step faults hundreds of megabytes
    in again, page by page: a quarter to a third of its time. The price is that the process keeps
    its peak memory until it ends.

    Returns:
      Whether the C library could be told (it is glibc).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    options = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}  # -1: never trim
    taken = [mallopt(name, value) for name, value in options.items()]
    return taken == [1, 1, 1]


def keep_programs(folder: Path) -> None:
    """Keep compiled programs in a folder, for the next run."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def exit_code(main: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Run a command; what the user can mend is told in a line, anything else is raised.

    Args:
      main: the command.
      interrupted: what to say after Ctrl-C.

    Returns:
      0, 2 for bad input or a file system that refuses, 130 after Ctrl-C.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; is there room, and may it be written?", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0

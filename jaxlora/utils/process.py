"""The operating system process: its memory, signals and exit code."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlora.utils import files
from jaxlora.utils.errors import Note, Stopped, UserError

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

# Variable of a library's cache → the general XDG variable, and the default folder.
_CACHES = {
    "HF_HOME": ("XDG_CACHE_HOME", "~/.cache/huggingface"),
    "MPLCONFIGDIR": ("XDG_CONFIG_HOME", "~/.config/matplotlib"),
}


def reuse_memory() -> bool:
    """Keep freed memory in this process. Call it before JAX computes anything.

    XLA allocates a program's temporary memory at each execution. glibc maps such large blocks from
    the kernel and unmaps them afterwards, so on CPU every train step faults in hundreds of
    megabytes page by page: a quarter to a third of its time. The price is that the process keeps
    its peak memory until it ends. To keep the peak to that of one step, asynchronous dispatch is
    switched off (on CPU two steps would use the same cores anyway).

    Returns:
      Whether the C library accepted the settings, that is, whether it is glibc.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    options = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}  # -1: never trim
    return [mallopt(name, value) for name, value in options.items()] == [1, 1, 1]


def keep_programs(folder: Path) -> None:
    """Cache compiled programs in a folder, unless it cannot be written to.

    The folder is private to the user, since its files are executed. A cache that the user has
    chosen, with `JAX_COMPILATION_CACHE_DIR` for example, stays.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        files.make(folder.parent)
        folder.mkdir(0o700, exist_ok=True)
        files.writable(folder)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Record Ctrl-C and SIGTERM in this context instead of ending the process.

    A second signal ends it immediately. Outside of the main thread, where Python handles no
    signals, this does nothing.

    Yields:
      A function that returns the number of the signal received, or 0.
    """
    received: list[int] = []

    def remember(number: int, frame: object) -> None:
        if received:
            raise Stopped(number)
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def rewritten(shown: Callable[[str], str]) -> Iterator[None]:
    """Rewrite the messages of errors and notes in this context, for instance with flags.

    A `Note` is printed as one line on stderr, without its position in the code.
    """
    with warnings.catch_warnings():
        usual = warnings.formatwarning

        def line(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> str:
            if issubclass(category, Note):
                return f"note: {shown(str(message))}\n"
            return usual(message, category, *args, **kwargs)

        warnings.formatwarning = line
        try:
            yield
        except (UserError, Stopped) as error:
            error.args = (shown(str(error)),)
            raise
        finally:
            warnings.formatwarning = usual


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Raise `Stopped` in the main thread on SIGTERM in this context.

    Without it, JAX catches SIGTERM in runs of several processes and the process never ends.
    """

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def verdict(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message for an error that ended a command, see `exit_code`."""
    match error:
        case UserError():
            return 2, f"error: {error}"
        case BrokenPipeError():  # as when `head` has read enough
            return 128 + signal.SIGPIPE, "the reader of the output has exited"
        case OSError():
            return 2, f"error: {error}; is there room on the disk, and permission to write?"
        case Stopped():
            return 128 + error.signal, str(error)
        case KeyboardInterrupt():
            return 130, "interrupted"
    return 1, f"error: {type(error).__name__}: {error}"


@contextlib.contextmanager
def _umask() -> Iterator[None]:
    """Make no file world-writable, including those of JAX and other libraries.

    Only commands do this, since the umask is shared by all threads of the process.
    """
    before = os.umask(0o077)  # the umask can be read only by setting it
    os.umask(before | 0o002)
    try:
        yield
    finally:
        os.umask(before)


def _replace_home() -> None:
    """Give other libraries another folder for their caches if the home folder is not writable.

    Otherwise one of them creates a folder named ~, and another a new cache for each process.
    """
    for name, (base, default) in _CACHES.items():
        if not (name in os.environ or base in os.environ or _can_create(default)):
            os.environ[name] = str(files.own_temporary() / Path(default).name)


def _can_create(folder: str) -> bool:
    """Return whether a folder exists or could be created."""
    try:
        path = files.local(folder)
        return path.is_dir() or bool(files.writable(next(p for p in path.parents if p.exists())))
    except (OSError, UserError):
        return False


def exit_code(main: Callable[[], object], shown: Callable[[str], str] = str) -> int:
    """Run a command, print errors that the user can fix as one line, and raise all others.

    Args:
      main: the command.
      shown: rewrites messages for this command, for instance with its flags.

    Returns:
      0 for success, 2 for bad input or a file system error, 130 after Ctrl-C, 143 after SIGTERM,
      141 if the reader of the output has exited.
    """
    # Orbax's threads log the traceback of errors that are raised and reported here.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with _umask(), rewritten(shown):
            _replace_home()
            main()
    except (UserError, OSError, Stopped, KeyboardInterrupt) as error:
        code, line = verdict(error)
        print(line, file=sys.stderr)
        return code
    return 0

"""The process on its host: its memory, its signals, its exit code."""

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

# Variable of a library's own cache → that of all caches, and where it is without either.
_CACHES = {
    "HF_HOME": ("XDG_CACHE_HOME", "~/.cache/huggingface"),
    "MPLCONFIGDIR": ("XDG_CONFIG_HOME", "~/.config/matplotlib"),
}


def reuse_memory() -> bool:
    """Let freed memory stay with this process; call it before JAX computes anything.

    XLA allocates a program's temporary memory anew each time it runs it. glibc takes so large a
    piece from the kernel and gives it back, so on CPU every train step faults hundreds of megabytes
    in again, page by page: a quarter to a third of its time. The price is that the process keeps
    its peak memory until it ends; so that this is one step's, the next waits for it (on CPU both
    would use the same cores).

    Returns:
      Whether the C library could be told (it is glibc).
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    options = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}  # -1: never trim
    taken = [mallopt(name, value) for name, value in options.items()]
    return taken == [1, 1, 1]


def keep_programs(folder: Path) -> None:
    """Keep compiled programs in a folder, for the next run; in none if it cannot be written to.

    It is the user's alone: whoever may write there decides what is run.
    """
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
    """While this lasts, Ctrl-C and SIGTERM are remembered instead of ending the process.

    The second one ends it at once. Threads other than the main one cannot be told of signals; there
    this does nothing.

    Yields:
      A function that gives the signal's number, or 0 if there was none.
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
def _notes_as_lines(shown: Callable[[str], str]) -> Iterator[None]:
    """While this lasts, a `Note` is a line on stderr, without the place in the code."""
    with warnings.catch_warnings():
        usual = warnings.formatwarning

        def line(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
            if issubclass(category, Note):
                return f"note: {shown(str(message))}\n"
            return usual(message, category, *place, **more)

        warnings.formatwarning = line
        try:
            yield
        finally:
            warnings.formatwarning = usual


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """While this lasts, SIGTERM raises `Stopped` in the main thread, as Ctrl-C raises an error.

    JAX catches SIGTERM in a process of many, and then nothing ends it.
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
    """Return the exit code and the line for what has ended a command, see `exit_code`."""
    match error:
        case UserError():
            return 2, f"error: {error}"
        case OSError():
            return 2, f"error: {error}; is there room, and may it be written?"
        case Stopped():
            return 128 + error.signal, str(error)
        case KeyboardInterrupt():
            return 130, "interrupted"
    return 1, f"error: {type(error).__name__}: {error}"


@contextlib.contextmanager
def _umask() -> Iterator[None]:
    """Take the right to write from everybody, also to what JAX and other libraries make.

    Commands alone do this: the umask is the whole process's, all its threads'.
    """
    before = os.umask(0o077)  # it can be read only by setting it
    os.umask(before | 0o002)
    try:
        yield
    finally:
        os.umask(before)


def _replace_home() -> None:
    """Give other libraries a place for their caches where the home folder cannot have them.

    Else the one makes a folder that is called ~, and the other a new cache each time.
    """
    for name, (base, default) in _CACHES.items():
        if not (name in os.environ or base in os.environ or _possible(default)):
            os.environ[name] = str(files.own_temporary() / Path(default).name)


def _possible(folder: str) -> bool:
    """Whether a folder is there, or could be made."""
    try:
        path = files.local(folder)
        return path.is_dir() or bool(files.writable(next(p for p in path.parents if p.exists())))
    except (OSError, UserError):
        return False


def exit_code(main: Callable[[], object], shown: Callable[[str], str] = str) -> int:
    """Run a command; print what the user can correct as one line, raise anything else.

    Args:
      main: the command.
      shown: rewrites messages for this command, for instance with its flags.

    Returns:
      0, 2 for bad input or a file system that refuses, 130 after Ctrl-C, 143 after SIGTERM.
    """
    # Orbax's threads print the traceback of what is raised, and told, here.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with _umask(), _notes_as_lines(shown):
            _replace_home()
            main()
    except (UserError, OSError, Stopped, KeyboardInterrupt) as error:
        code, line = verdict(error)
        print(shown(line), file=sys.stderr)
        return code
    return 0

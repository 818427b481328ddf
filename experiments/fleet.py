"""Many commands, a few at a time: each a process of its own, with a log of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from jaxlora.utils import process as host
from jaxlora.utils.errors import Stopped

LOOK_EVERY = 0.5  # seconds
_COLUMNS = "120"  # of the tables in a log


class Job(Protocol):
    """Something to run."""

    @property
    def command(self) -> Sequence[str]:
        """What to run."""

    @property
    def log(self) -> Path:
        """Where what it says goes, after what is there already."""


J = TypeVar("J", bound=Job)
J_contra = TypeVar("J_contra", bound=Job, contravariant=True)


class Watcher(Protocol[J_contra]):
    """Someone who watches (the screen does)."""

    def started(self, job: J_contra) -> None:
        """A job's process has been started."""

    def ended(self, job: J_contra, code: int) -> None:
        """It has ended; see `subprocess.Popen.returncode`."""

    def look(self) -> None:
        """Called every `LOOK_EVERY` seconds."""


class Fleet(Generic[J]):
    """Runs jobs, `at_once` of them at a time.

    Args:
      jobs: in the order in which they are started.
      at_once: how many run at the same time.
      watcher: is told what happens.
    """

    def __init__(self, jobs: Iterable[J], at_once: int, watcher: Watcher[J]) -> None:
        self._waiting = deque(jobs)
        self._at_once = at_once
        self._watcher = watcher
        self._running: list[tuple[J, subprocess.Popen[bytes]]] = []

    def run(self) -> list[tuple[J, int]]:
        """Run them all; one that fails stops no other.

        Returns:
          Each job with its exit code, in the order in which they ended.

        Raises:
          Stopped: after Ctrl-C or SIGTERM, when the running ones have been told to stop and have
            ended; after a second signal they are told again, and do not save what they have.
        """
        codes = []
        with host.stop_signals() as stopped:
            try:
                while (self._waiting or self._running) and not stopped():
                    self._start()
                    time.sleep(LOOK_EVERY)
                    codes += self._ended()
                    self._watcher.look()
            finally:
                self._stop()
            if stopped():
                raise Stopped(stopped(), "; go on with the same command")
        return codes

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._at_once:
            job = self._waiting.popleft()
            self._running.append((job, start(job)))
            self._watcher.started(job)

    def _ended(self) -> list[tuple[J, int]]:
        ended = [(job, code) for job, p in self._running if (code := p.poll()) is not None]
        self._running = [(job, p) for job, p in self._running if p.returncode is None]
        for job, code in ended:
            self._watcher.ended(job, code)
        return ended

    def _stop(self) -> None:
        processes = [process for _, process in self._running]
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
        finally:  # a second signal came while they saved
            for process in processes:
                if process.poll() is None:
                    process.terminate()
                    process.wait()


def start(job: Job) -> subprocess.Popen[bytes]:
    """Start a job; its process hears of signals from us alone, not from the terminal."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": _COLUMNS},
            start_new_session=True,
        )


def reason(log: Path, code: int) -> str:
    """Why a job failed: the signal that ended it, or the last line of its log."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else f"ended with exit code {code}"

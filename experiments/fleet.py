"""Run many commands, a few at a time, each in its own process with its own log."""

from __future__ import annotations

import contextlib
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
TO_SAVE = 600.0  # seconds that terminated jobs have to save their states
TO_END = 30.0  # seconds that they have after a second SIGTERM, before they are killed
_COLUMNS = "120"  # of the tables in a log


class Job(Protocol):
    """A command to run."""

    @property
    def command(self) -> Sequence[str]:
        """The command line."""

    @property
    def log(self) -> Path:
        """The file to which its output is appended."""


J = TypeVar("J", bound=Job)
J_contra = TypeVar("J_contra", bound=Job, contravariant=True)


class Watcher(Protocol[J_contra]):
    """Callbacks that observe a fleet."""

    def started(self, job: J_contra) -> None:
        """Handle the start of a job's process."""

    def ended(self, job: J_contra, code: int) -> None:
        """Handle the end of a job's process; `code` is `subprocess.Popen.returncode`."""

    def look(self) -> None:
        """Handle a tick; called every `LOOK_EVERY` seconds."""


class Fleet(Generic[J]):
    """Runs jobs, up to `at_once` of them concurrently.

    Args:
      jobs: the jobs, in the order in which they are started.
      at_once: number of concurrent jobs.
      watcher: observer of the fleet.
    """

    def __init__(self, jobs: Iterable[J], at_once: int, watcher: Watcher[J]) -> None:
        self._waiting = deque(jobs)
        self._at_once = at_once
        self._watcher = watcher
        self._running: list[tuple[J, subprocess.Popen[bytes]]] = []

    def run(self) -> list[tuple[J, int]]:
        """Run all jobs; a job that fails does not stop the others.

        Returns:
          Each job with its exit code, in the order in which they ended.

        Raises:
          Stopped: after Ctrl-C or SIGTERM, once the running jobs have been terminated and have
            ended. After a second signal, or if they take long, they are terminated again, and end
            without saving, or are killed.
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
            _terminate(processes, TO_SAVE)
        finally:  # also if a second signal arrives while they save
            _terminate(processes, TO_END)
            for process in processes:
                process.kill()
                process.wait()


def _terminate(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Terminate those that still run, and wait up to `seconds` until all have ended."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + seconds
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in processes:
            process.wait(max(0.0, until - time.monotonic()))


def start(job: Job) -> subprocess.Popen[bytes]:
    """Start a job in a new session, so that it gets signals only from us, not the terminal."""
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
    """Return why a job failed: the signal that ended it, or the last line of its log."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else f"ended with exit code {code}"

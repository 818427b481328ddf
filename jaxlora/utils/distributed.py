"""Runs of several processes: how they join, wait for each other, and stop together.

Each process drives its own devices, and all run the same program. Checkpoints are written by all
processes, all other files by the primary process (number 0) alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from jaxlora.utils import process as host
from jaxlora.utils.errors import ConfigError, Stopped, UserError
from jaxlora.utils.trees import Tree

# Environment variables in which launchers that JAX supports give the number of processes.
_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
# The environment variable with a pod's number in an Indexed Job of Kubernetes. The number of pods
# is in none. JAX's own detection needs a client and permission to list pods; two flags do not.
_INDEX = "JOB_COMPLETION_INDEX"
# Keys of the coordinator's store, and how often it is polled, in seconds.
_FAILED, _ARRIVED, _POLL = "jaxlora/failed", "jaxlora/arrived", 0.1
_barriers = itertools.count()


def join(coordinator: str | None = None, processes: int = 1, process: int | None = None) -> None:
    """Join the other processes, if there are any. Call it before anything else of JAX.

    Under Slurm and Open MPI JAX finds the others by itself; elsewhere (Kubernetes, ssh) the
    arguments say where they are.

    Args:
      coordinator: `host:port` of process 0.
      processes: number of processes.
      process: number of this process, from 0; None: its index in an Indexed Job of Kubernetes,
        else 0.

    Raises:
      UserError: if the arguments contradict each other, or the processes cannot connect.
    """
    launcher = next((x for name, x in _LAUNCHERS.items() if _count(name) > 1), None)
    if coordinator is None and processes > 1:
        raise ConfigError("processes", "goes with `coordinator`, host:port of process 0")
    if coordinator is None and process is not None:
        raise ConfigError("process", "goes with `coordinator`, host:port of process 0", process)
    if process is None:
        process = _count(_INDEX, 0)
    if coordinator is not None and not (0 <= process < processes and ":" in coordinator):
        raise ConfigError(
            "coordinator",
            f"with `processes={processes}` and `process={process}`: write host:port, and the "
            "number of this process from 0",
            coordinator,
        )
    try:
        if coordinator is not None:
            jax.distributed.initialize(coordinator, processes, process)
        elif launcher is not None:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes could not connect ({launcher or coordinator}): {error}"
        ) from error


def _count(name: str, default: int = 1) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def is_primary() -> bool:
    """Return whether this is process 0, which alone writes files other than checkpoints."""
    return jax.process_index() == 0


def _store() -> Any:
    """Return the coordinator's key-value store. JAX has no public name for it."""
    return distributed.global_state.client


def wait(name: str) -> None:
    """Wait until all processes have called this, without a time limit.

    A collective operation of the devices would time out after half a minute and block signals.
    """
    count = jax.process_count()
    if count == 1:
        return
    barrier = f"{_ARRIVED}/{next(_barriers)} {name.replace('/', ' ')}"
    _store().key_value_set(f"{barrier}/{jax.process_index()}", "")
    while len(_store().key_value_dir_get(barrier)) < count:
        time.sleep(_POLL)


def agreed_signal(received: int, due: bool) -> int:
    """Return the signal for which all processes stop at this step, or 0 to continue.

    If one process stopped alone, the others would hang in the next step, so they exchange what
    they received. This waits for the devices, so it is done only at steps that wait for them
    anyway.

    Args:
      received: the signal that this process has received, or 0.
      due: whether this step waits for the devices; must be equal in all processes.
    """
    if jax.process_count() == 1:
        return received
    return int(multihost_utils.process_allgather(np.int32(received)).max()) if due else 0


@contextlib.contextmanager
def together(shown: Callable[[str], str] = str) -> Iterator[None]:
    """End all processes if one of them fails in this context, with its message and exit code.

    The others may be waiting for the failed process in a collective operation, which no exception
    can interrupt, so a thread in each of them ends it. Stopping at an agreed step is no failure.

    Args:
      shown: rewrites the message for this command, see `process.exit_code`.
    """
    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
    watcher.start()
    try:
        with host.ended_by_sigterm():
            yield
            wait("all done")
    except BaseException as error:
        if not (isinstance(error, Stopped) and error.saved):
            _end_others(error, watcher, shown)
        raise
    finally:
        over.set()
        watcher.join()


def _watch(over: threading.Event) -> None:
    """End this process once another one has failed."""
    while not over.wait(_POLL):
        for _, failed in _store().key_value_dir_get(_FAILED):
            process, code, line = json.loads(failed)
            if process == jax.process_index():
                return
            print(line, file=sys.stderr, flush=True)
            jax.distributed.shutdown()  # waits for the failed process to call it, too
            os._exit(code)


def _end_others(
    error: BaseException, watcher: threading.Thread, shown: Callable[[str], str]
) -> None:
    """Publish the error that ends this process, and wait until the others have read it.

    If another process failed earlier, the watcher ends this process during the wait.
    """
    code, line = host.verdict(error)
    failed = json.dumps([jax.process_index(), code, shown(line)])
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process failed first
        _store().key_value_set(f"{_FAILED}/first", failed)
    watcher.join()
    jax.distributed.shutdown()


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Run the block in process 0 first, then in the others, which find what it has prepared."""
    if not is_primary():
        wait(name)
    yield
    if is_primary():
        wait(name)


def gather(tree: Tree) -> Tree:
    """Gather a tree of arrays, possibly sharded over processes, as complete NumPy arrays."""
    return jax.tree.map(_gather, tree)


def _gather(x: jax.Array | np.ndarray) -> np.ndarray:
    # `process_allgather` would concatenate one copy from each process of an array that all have.
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)

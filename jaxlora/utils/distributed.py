"""Many processes: joining them, waiting for one another, and ending together.

Each process drives its own devices. All of them compute the same program; the first one alone
writes what people read, and checkpoints are written by all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from jaxlora.utils import process as host
from jaxlora.utils.errors import Stopped, UserError
from jaxlora.utils.trees import Tree

# What launchers that JAX knows tell of the number of processes.
_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
# Where Kubernetes writes a pod's number in an Indexed Job. It does not say how many pods there are,
# and JAX's own look at the cluster needs a client and the right to list pods; two flags do not.
_INDEX = "JOB_COMPLETION_INDEX"
# Keys of the coordinator's store, and the seconds between two looks at it.
_FAILED, _HERE, _LOOK = "jaxlora/failed", "jaxlora/here", 0.1
_waits = itertools.count()


def join(coordinator: str | None = None, processes: int = 1, process: int | None = None) -> None:
    """Join the other processes, if there are any; call it before all else of JAX.

    Slurm and Open MPI tell JAX what it needs. Elsewhere (Kubernetes, ssh) the arguments do.

    Args:
      coordinator: `host:port` of the first process.
      processes: how many there are.
      process: which one this is, from 0; None: what an Indexed Job of Kubernetes says, or 0.

    Raises:
      UserError: if the arguments do not fit each other, or the processes do not meet.
    """
    launcher = next((x for name, x in _LAUNCHERS.items() if _count(name) > 1), None)
    if coordinator is None and processes > 1:
        raise UserError("--processes goes with --coordinator=host:port, the first one's address")
    if process is None:
        process = _count(_INDEX, 0)
    if coordinator is not None and not (0 <= process < processes and ":" in coordinator):
        raise UserError(
            f"--coordinator={coordinator} --processes={processes} --process={process}: write "
            "host:port, and the number of this process from 0"
        )
    try:
        if coordinator is not None:
            jax.distributed.initialize(coordinator, processes, process)
        elif launcher is not None:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes did not meet ({launcher or coordinator}): {error}"
        ) from error


def _count(name: str, default: int = 1) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def is_primary() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def _store() -> Any:
    """Return the coordinator's store of keys; it needs no device. JAX has no public name for it."""
    return distributed.global_state.client


def wait(name: str) -> None:
    """Wait until all processes are here, however long the slowest takes.

    A collective of the devices would give up after half a minute, and let no signal through.
    """
    count = jax.process_count()
    if count == 1:
        return
    here = f"{_HERE}/{next(_waits)} {name.replace('/', ' ')}"
    _store().key_value_set(f"{here}/{jax.process_index()}", "")
    while len(_store().key_value_dir_get(here)) < count:
        time.sleep(_LOOK)


def agreed_signal(received: int, due: bool) -> int:
    """Return the signal that all processes stop for at this step, or 0 to go on.

    A process that stopped alone would leave the others waiting for its part of the next step, so
    they ask one another. That waits for the devices; it is done only at steps that do so anyway.

    Args:
      received: the signal that this process has received, or 0.
      due: whether this is such a step; the same in all processes.
    """
    if jax.process_count() == 1:
        return received
    return int(multihost_utils.process_allgather(np.int32(received)).max()) if due else 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """End all processes when one of them fails while this lasts, with its line and exit code.

    The others may be waiting for the failed one inside a collective, which no exception interrupts,
    so a thread of theirs ends them. A step at which all have agreed to stop is no failure.
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
            wait("all are done")
    except BaseException as error:
        if not (isinstance(error, Stopped) and error.saved):
            _end_others(error, watcher)
        raise
    finally:
        over.set()
        watcher.join()


def _watch(over: threading.Event) -> None:
    """End this process when another one has failed."""
    while not over.wait(_LOOK):
        for _, failed in _store().key_value_dir_get(_FAILED):
            process, code, line = json.loads(failed)
            if process == jax.process_index():
                return
            print(line, file=sys.stderr, flush=True)
            jax.distributed.shutdown()  # waits until the failed one has seen it
            os._exit(code)


def _end_others(error: BaseException, watcher: threading.Thread) -> None:
    """Tell the others what ends this process, and wait until they have heard of it.

    If another one has failed before, the watcher ends this process in here.
    """
    failed = json.dumps([jax.process_index(), *host.verdict(error)])
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one's is there
        _store().key_value_set(f"{_FAILED}/first", failed)
    watcher.join()
    jax.distributed.shutdown()


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """The first process does this alone, then the others do (they find what it has prepared)."""
    if not is_primary():
        wait(name)
    yield
    if is_primary():
        wait(name)


def gather(tree: Tree) -> Tree:
    """Whole NumPy arrays of a tree whose parts may lie with other processes."""
    return jax.tree.map(_gather, tree)


def _gather(x: jax.Array | np.ndarray) -> np.ndarray:
    # What this process has already would come back once for each process.
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)

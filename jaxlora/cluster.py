"""Many processes: joining them, and waiting for one another.

Each process drives its own devices. All of them compute the same program; the first one alone
writes what people read, and checkpoints are written by all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlora.errors import UserError
from jaxlora.trees import Tree

# What launchers that JAX knows tell of the number of processes.
_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
# Where Kubernetes writes a pod's number in an Indexed Job. It does not say how many pods there are,
# and JAX's own look at the cluster needs a client and the right to list pods; two flags do not.
_INDEX = "JOB_COMPLETION_INDEX"


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


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """The first process does this alone, then the others do (they find what it has prepared)."""
    if not first():
        wait(name)
    yield
    if first():
        wait(name)


def host_tree(tree: Tree) -> Tree:
    """Whole NumPy arrays of a tree whose parts may lie with other processes."""
    return jax.tree.map(_whole, tree)


def _whole(x: jax.Array | np.ndarray) -> np.ndarray:
    # What this process has already would come back once for each process.
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)

"""Statistics of an aggregator's last update, for logging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def metrics(
    state: Any, tasks: Sequence[str] | None = None, parts: Sequence[str] | None = None
) -> dict[str, jax.Array]:
    """Return the statistics of the last update as a flat dict of scalars, inside or outside of jit.

    Args:
      state: state of `aggregate` or `pcgrad`, or of a transform that contains one, such as a chain.
      tasks: names of the tasks; numbers if not given.
      parts: names of the parts (see `part_names`) if `per` is not `"tree"`; numbers if not given.

    Returns:
      `conflicts`, `weight/TASK`, `norm/TASK` and `cosine/TASK+TASK`, each prefixed by `PART/` if
      there are parts. A state of `pcgrad` has no weights and norms.

    Raises:
      ValueError: if `state` does not contain exactly one aggregator's state, or the number of names
        is not that of the tasks or parts.

    >>> import optax
    >>> from jaxlora.aggregation import aggregate
    >>> tx = optax.chain(aggregate("mgda", num_tasks=2), optax.sgd(1.0))
    >>> grads = {"w": jnp.array([[1.0, 0.0], [-1.0, 0.0]])}
    >>> _, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
    >>> found = metrics(state, tasks=("sst", "sts"))
    >>> list(found)
    ['conflicts', 'weight/sst', 'weight/sts', 'norm/sst', 'norm/sts', 'cosine/sst+sts']
    >>> float(found["cosine/sst+sts"])
    -1.0
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(x)]
    if len(found) != 1:
        raise ValueError(f"needs the state of one aggregator, found {len(found)}")
    (seen,) = found
    if jnp.ndim(seen.conflicts) == 0:
        return _flat(seen, tasks)
    count = len(seen.conflicts)
    flat: dict[str, jax.Array] = {}
    for n, part in enumerate(_names("parts", parts, count)):
        one = jax.tree.map(lambda x, n=n: x[n] if jnp.ndim(x) else x, seen)
        flat |= {f"{part}/{name}": value for name, value in _flat(one, tasks).items()}
    return flat


def _is_state(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "cosines") and hasattr(value, "conflicts")


def _names(what: str, names: Sequence[str] | None, count: int) -> list[str]:
    found = list(map(str, range(count)) if names is None else names)
    if len(found) != count:
        raise ValueError(f"{what} has {len(found)} names for {count} {what}")
    return found


def _flat(seen: Any, tasks: Sequence[str] | None) -> dict[str, jax.Array]:
    named = _names("tasks", tasks, len(seen.cosines))
    flat = {"conflicts": seen.conflicts}
    for word, values in (("weight", "weights"), ("norm", "norms")):
        if hasattr(seen, values):
            flat |= {f"{word}/{name}": getattr(seen, values)[t] for t, name in enumerate(named)}
    for i, first in enumerate(named):
        for j, second in enumerate(named[i + 1 :], i + 1):
            flat[f"cosine/{first}+{second}"] = seen.cosines[i, j]
    return flat

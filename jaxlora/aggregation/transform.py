"""Gradient aggregators as optax transforms: per-task gradients in, one gradient out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora.aggregation.checks import check_number, check_task_axis
from jaxlora.aggregation.gram import cosines, gram, norms, weighted_sum
from jaxlora.aggregation.method import MEMBERS, Method, State
from jaxlora.utils.trees import Tree, names

Per = Literal["tree", "leaf"] | Callable[[str], str]


class AggregateState(NamedTuple):
    """State of `aggregate`, with statistics of the last update.

    If `per` is not `"tree"`, all arrays except `updates` have a leading axis of parts, in the order
    of `part_names`.

    Attributes:
      updates: `i32[]`, number of updates so far.
      rules: the method's state for each group.
      weights: `f32[T]`, the weights of the gradients.
      conflicts: `i32[]`, number of task pairs within a group with a negative dot product.
      cosines: `f32[T, T]`, cosines between the gradients.
      norms: `f32[T]`, norms of the gradients.
    """

    updates: jax.Array
    rules: tuple[State, ...]
    weights: jax.Array
    conflicts: jax.Array
    cosines: jax.Array
    norms: jax.Array


def aggregate(
    method: str | Method,
    num_tasks: int,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    per: Per = "tree",
    every: int = 1,
    ema: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Combine per-task gradients by any registered method; put it first in an optax chain.

    `update` takes leaves `[T, ...]` and returns leaves `[...]`, the weighted sum over tasks. With
    `groups` it returns leaves `[K, ...]`, a sum for each group. The weights are computed from the
    T×T matrix of the gradients' dot products, within the compiled step and on any mesh. No epsilon
    is added to the dot products. The counterpart in optax is
    `optax.experimental.aggregating.Aggregator`, whose implementations average. If a gradient or
    loss of a group is not finite where weights are computed, or they give no finite weights, the
    group's update is NaN, and its method's state and averaged weights stay unchanged.

    Do not pass it the gradients of heads, which belong to one task each: see `sum_tasks` and
    `per_task_grads`.

    Args:
      method: a name in `aggregation.MEMBERS`, or a `Method`, to set the method's parameters:
        `aggregate(aggregation.cagrad(c=0.4), num_tasks=3)`.
      num_tasks: T, the size of every leaf's leading axis.
      groups: a partition of the task indices; each group is aggregated separately.
      per: which parts of the tree have separate weights: the whole `"tree"`, each `"leaf"`, or the
        parts named by a function from a leaf's dotted path to its part's name.
      every: compute weights in every n-th update and reuse them in between, which reads the
        gradients once instead of twice.
      ema: decay of an exponential moving average of the weights, in [0, 1): Zhou et al. 2022, "On
        the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond" (CR-MOGM).

    Returns:
      An optax transform whose state is an `AggregateState`. Methods that weight by losses take
      them as `update(grads, state, params, losses=losses)`, with `losses: f32[T]`; if you scale
      a task's gradient by a factor, scale its loss too.

    Raises:
      ValueError: for an unknown name or a bad argument; from `update`, if a leaf is not
        `[T, ...]` or not a real float, or if losses are missing.

    >>> tx = optax.chain(aggregate("upgrad", num_tasks=2), optax.sgd(1.0))
    >>> state = tx.init({"w": jnp.zeros(2)})
    >>> grads = {"w": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
    >>> updates, state = tx.update(grads, state)
    >>> updates["w"].round(4).tolist()
    [-0.25, -0.75]
    >>> optax.tree.get(state, "weights").round(4).tolist(), int(optax.tree.get(state, "conflicts"))
    ([1.0, 0.75], 1)
    """
    chosen = None if groups is None else tuple(map(tuple, groups))
    made = _Aggregator(make_method(method), num_tasks, chosen, per, every, ema)
    return optax.GradientTransformationExtraArgs(made.init, made.update)


def make_method(method: str | Method) -> Method:
    """Return the method of a name, with its default parameters; a `Method` is returned as is.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
    """
    if isinstance(method, Method):
        return method
    if method not in MEMBERS:
        raise ValueError(f"no aggregator {method!r}; there are {', '.join(sorted(MEMBERS))}")
    return MEMBERS[method].make()


def part_names(tree: Tree, per: Per) -> list[str]:
    """Return the names of the parts with separate weights, in the order of the state's arrays.

    >>> part_names({"a": {"x": 0, "y": 0}, "b": 0}, lambda path: path.split(".")[0])
    ['a', 'b']
    """
    return list(dict.fromkeys(_part_of_leaves(tree, per)))


def _part_of_leaves(tree: Tree, per: Per) -> list[str]:
    if per == "tree":
        return ["tree"] * len(jax.tree.leaves(tree))
    return names(tree) if per == "leaf" else list(map(per, names(tree)))


@dataclasses.dataclass(frozen=True)
class _Aggregator:
    """The arguments of `aggregate`, and the two functions of its transform."""

    method: Method
    num_tasks: int
    groups: tuple[tuple[int, ...], ...] | None
    per: Per
    every: int
    ema: float

    def __post_init__(self) -> None:
        check_number(self.num_tasks)
        tasks = list(range(self.num_tasks))
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be from 0 to below 1, got {self.ema}")
        if self.every > 1 and self.method.every_step:
            raise ValueError(f"{self.method.name} must see every step, but every={self.every}")
        if sorted(t for group in self._groups for t in group) != tasks or () in self._groups:
            raise ValueError(f"groups must hold each of {tasks} once, got {self.groups}")

    @property
    def _groups(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(range(self.num_tasks)),) if self.groups is None else self.groups

    def init(self, params: optax.Params) -> AggregateState:
        """Return the initial state; it depends on `params` only if there are parts."""
        if self.per == "tree":
            return self._start(0)._replace(updates=jnp.int32(0))
        starts = [self._start(part) for part in range(len(part_names(params, self.per)))]
        stacked: AggregateState = jax.tree.map(lambda *x: jnp.stack(x), *starts)
        return stacked._replace(updates=jnp.int32(0))

    def _start(self, part: int) -> AggregateState:
        T, groups = self.num_tasks, self._groups
        rules = tuple(
            self.method.init(len(tasks), part * len(groups) + n) for n, tasks in enumerate(groups)
        )
        return AggregateState(
            jnp.int32(0), rules, jnp.zeros(T), jnp.int32(0), jnp.zeros((T, T)), jnp.zeros(T)
        )

    def update(
        self,
        updates: optax.Updates,
        state: AggregateState,
        params: optax.Params | None = None,
        *,
        losses: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, AggregateState]:
        """Return the weighted sums and the next state."""
        del extra
        name = f"aggregate({self.method.name!r}, num_tasks={self.num_tasks})"
        check_task_axis(name, self.num_tasks, updates, params)
        losses = self._checked(losses)

        def fresh(state: AggregateState) -> tuple[jax.Array, AggregateState]:
            return self._weigh(self._gram(updates), losses, state)

        def again(state: AggregateState) -> tuple[jax.Array, AggregateState]:
            return state.weights, state

        if self.every == 1:
            weights, after = fresh(state)
        else:
            # Where gradients or losses gave no weights, there are none to use again.
            found = [jnp.any(state.weights[..., np.array(ids)] != 0, -1) for ids in self._groups]
            usable = jnp.all(jnp.isfinite(state.norms)) & jnp.all(jnp.stack(found))
            due = (state.updates % self.every == 0) | ~usable
            weights, after = jax.lax.cond(due, fresh, again, state)
        return self._combine(updates, weights), after._replace(updates=state.updates + 1)

    def _checked(self, losses: jax.Array | None) -> jax.Array | None:
        if not self.method.needs_losses:
            return None
        if losses is None or jnp.shape(losses) != (self.num_tasks,):
            found = "none" if losses is None else f"shape {jnp.shape(losses)}"
            raise ValueError(
                f"{self.method.name} weights by losses: give update(…, losses=) one for each of "
                f"{self.num_tasks} tasks, got {found}"
            )
        return jnp.asarray(losses, float)

    def _gram(self, grads: Tree) -> jax.Array:
        """Return the Gram matrix of the tree, `f32[T, T]`, or of each part, `f32[P, T, T]`."""
        parts: dict[str, list[jax.Array]] = {}
        for part, leaf in zip(
            _part_of_leaves(grads, self.per), jax.tree.leaves(grads), strict=True
        ):
            parts.setdefault(part, []).append(leaf)
        none = jnp.zeros((self.num_tasks, self.num_tasks))  # the result for a tree without leaves
        if self.per == "tree":
            return none + gram(grads)
        return jnp.stack([none + gram(leaves) for leaves in parts.values()])

    def _weigh(
        self, K: jax.Array, losses: jax.Array | None, state: AggregateState
    ) -> tuple[jax.Array, AggregateState]:
        """Return the weights of this update and the next state."""
        with jax.default_matmul_precision("highest"):
            if self.per == "tree":
                return self._weigh_part(K, losses, state)
            axes = AggregateState(None, 0, 0, 0, 0, 0)  # type: ignore[arg-type]
            return jax.vmap(self._weigh_part, (0, None, axes), (0, axes))(K, losses, state)

    def _weigh_part(
        self, K: jax.Array, losses: jax.Array | None, state: AggregateState
    ) -> tuple[jax.Array, AggregateState]:
        rules, weights, kept = [], state.weights, state.weights
        together = np.zeros(K.shape, bool)
        for tasks, rule in zip(self._groups, state.rules, strict=True):
            block, ids = np.ix_(tasks, tasks), np.array(tasks)
            own = None if losses is None else losses[ids]
            found, after = self.method.weights(K[block], own, rule)
            last = state.weights[ids]
            # Losses may be finite and yet give no weights: 0 has no logarithm.
            sound = jnp.all(jnp.isfinite(K[block])) & jnp.all(jnp.isfinite(found))
            sound &= True if own is None else jnp.all(jnp.isfinite(own))
            found = jnp.where(jnp.any(last != 0), self.ema * last + (1 - self.ema) * found, found)
            together[block] = True
            weights = weights.at[ids].set(jnp.where(sound, found, jnp.nan))
            kept = kept.at[ids].set(jnp.where(sound, found, last))
            rules.append(jax.tree.map(functools.partial(jnp.where, sound), after, rule))
        conflicts = jnp.sum(jnp.triu((K < 0) & together, 1), dtype=jnp.int32)
        seen = AggregateState(state.updates, tuple(rules), kept, conflicts, cosines(K), norms(K))
        return weights, seen

    def _combine(self, grads: Tree, weights: jax.Array) -> Tree:
        """Return the weighted sum over all tasks, `[...]`, or over each group's, `[K, ...]`."""
        leaves, structure = jax.tree.flatten(grads)
        parts = _part_of_leaves(grads, self.per)
        rows = list(dict.fromkeys(parts))
        sums = []
        for part, leaf in zip(parts, leaves, strict=True):
            row = weights if self.per == "tree" else weights[rows.index(part)]
            own = [weighted_sum(leaf, row, tasks) for tasks in self._groups]
            sums.append(own[0] if self.groups is None else jnp.stack(own))
        return jax.tree.unflatten(structure, sums)

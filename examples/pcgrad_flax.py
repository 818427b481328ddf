"""PCGrad in your own Flax and Optax training: two tasks with conflicting gradients on one trunk.

Both tasks read the same input. The targets of one are ten times as large, so with summed gradients
it dominates wherever the two disagree. Takes seconds on two cores.
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxlora

STEPS = int(os.environ.get("STEPS", "400"))
TASKS = ("large", "small")

# %% Data: y depends on x in the same few directions, with partly opposite signs
keys = jax.random.split(jax.random.key(0), 4)
x = jax.random.normal(keys[0], (512, 16))
shared, own = jax.random.normal(keys[1], (16, 3)), jax.random.normal(keys[2], (16, 3))
targets = {
    "large": 10 * jnp.tanh(x @ shared).sum(1),
    "small": jnp.tanh(x @ (own - shared)).sum(1),
}

# %% A model: the trunk is shared, each task has its own head
trunk, head = nn.Sequential([nn.Dense(6), nn.tanh]), nn.Dense(1)


def loss(trunk_params, head_params, batch):
    """Compute the mean squared error of one task."""
    inputs, wanted = batch
    found = head.apply(head_params, trunk.apply(trunk_params, inputs))[:, 0]
    return jnp.mean((found - wanted) ** 2)


# %% Training: only the first transform of the optax chain sees several tasks
def train(method):
    """Train with a gradient aggregator; return the losses and the fraction of conflicts."""
    tx = optax.chain(jaxlora.aggregate(method, num_tasks=len(TASKS)), optax.adam(1e-2))
    head_tx = optax.adam(1e-2)
    params = trunk.init(keys[3], x)
    heads = {task: head.init(keys[3], trunk.apply(params, x)) for task in TASKS}
    losses_of, batches = dict.fromkeys(TASKS, loss), {task: (x, targets[task]) for task in TASKS}

    @jax.jit
    def step(params, heads, state, head_state):
        losses, grads, head_grads = jaxlora.per_task_grads(losses_of, params, heads, batches)
        updates, state = tx.update(grads, state, params)
        head_updates, head_state = head_tx.update(head_grads, head_state, heads)
        params, heads = optax.apply_updates((params, heads), (updates, head_updates))
        return params, heads, state, head_state, losses, optax.tree.get(state, "conflicts")

    state, head_state, conflicts = tx.init(params), head_tx.init(heads), 0
    for _ in range(STEPS):
        params, heads, state, head_state, losses, conflict = step(params, heads, state, head_state)
        conflicts += int(conflict)
    return losses, conflicts / STEPS


# %% Compare
variances = jnp.array([targets[task].var() for task in TASKS])
print("unexplained variance of each task, and the share of steps in which gradients conflict")
for method in ("sum", "pcgrad", "nash_mtl"):
    losses, conflicts = train(method)
    large, small = losses / variances
    print(f"{method:<8}  large {large:.1%}  small {small:.1%}  conflicts {conflicts:.0%}")

"""The encoder's optimizer with each way to combine the gradients of tasks."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlora import aggregation
from jaxlora.training import config
from jaxlora.training.optimizer import aggregator, optimizers
from jaxlora.training.presets import make_settings
from jaxlora.utils.errors import UserError

NAMES = typing.get_args(config.Surgery)
GRADS = {"A": jnp.array([[1.0, 2.0, -1.0], [-1.0, 0.5, 3.0], [0.2, -2.0, 1.0]])}
LOSSES = jnp.array([1.0, 2.0, 0.5])


@pytest.mark.parametrize("name", NAMES)
def test_any_aggregator_may_begin_the_chain(name):
    tx = optax.with_extra_args_support(optimizers(3, 0.1, 0.1, surgery=name)[0])
    params = {"A": jnp.zeros(3)}
    update = jax.jit(lambda state: tx.update(GRADS, state, params, losses=LOSSES))
    updates, state = update(tx.init(params))
    assert updates["A"].shape == (3,) and jnp.isfinite(updates["A"]).all()
    assert optax.tree.get(state, "conflicts") == 2
    assert optax.tree.get(state, "cosines").shape == (3, 3)


def test_all_members_of_the_family_can_be_asked_for():
    assert set(NAMES) == {"none", *aggregation.MEMBERS}
    assert make_settings("lora3", surgery="upgrad").optimizer.surgery == "upgrad"
    with pytest.raises(UserError, match="surgery"):
        config.Settings.from_json(make_settings("lora3").to_json() | {"surgery": "upgard"})


def test_the_seed_reaches_what_draws():
    found = {
        seed: aggregator("random", 3, seed).update(GRADS, aggregator("random", 3, seed).init(None))
        for seed in (0, 1)
    }
    assert not np.allclose(found[0][0]["A"], found[1][0]["A"])

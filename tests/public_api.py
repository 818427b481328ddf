"""A program of somebody else on the public API: `mypy --strict` checks it, nothing runs it."""

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

import jaxlora
from jaxlora import lora
from jaxlora.pcgrad import cosines, gram

Params = dict[str, jax.Array]


def make_optimizer() -> optax.GradientTransformation:
    shared = optax.chain(jaxlora.pcgrad(num_tasks=2), optax.adamw(1e-4))
    own = optax.chain(jaxlora.sum_tasks(num_tasks=2), optax.adamw(1e-3))
    return optax.partition({"shared": shared, "own": own}, {"trunk": "shared", "heads": "own"})


def conflicts(grads: Params) -> jax.Array:
    return cosines(gram(grads))


def adapt(params: Params) -> int:
    config = lora.LoraConfig(rank=2, alpha=4.0, target_modules=("query",))
    adapter = lora.init(jax.random.key(0), params, config)
    lora.merge(params, adapter, config)
    return lora.count_params(adapter)


def predict(folder: str) -> list[str | tuple[str, ...] | None]:
    try:
        predictor: jaxlora.Predictor = jaxlora.load(folder)
    except jaxlora.UserError as error:
        raise SystemExit(str(error)) from error
    answers: list[jaxlora.Answer] = predictor([("sst", "A lovely film.")])
    return [answer.label for answer in answers]


def count(base: str) -> int:
    leaves: list[jax.Array] = jax.tree.leaves(jaxlora.from_pretrained(base).params)
    return sum(leaf.size for leaf in leaves)


def sentence_vectors(base: str, texts: list[str]) -> jax.Array:
    encoder = jaxlora.from_pretrained(base, pooling="cls")
    tokens = encoder.pack(texts, rows=2, length=64)
    return encoder.encode(encoder.params, tokens) - encoder.encode(encoder.params, texts)


def seen(state: jaxlora.PCGradState) -> float:
    return float(jnp.min(state.cosines))

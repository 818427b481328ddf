"""Sums of adapters: exact by concatenation, nearest by singular value decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from tiny import random_adapter

from jaxlora import lora
from jaxlora.lora import LoraConfig, combine

CONFIGS = [
    LoraConfig(2, 3.0, ("query", "intermediate.dense")),
    LoraConfig(5, 2.0, ("query", "value"), rslora=True, rank_pattern=(("value", 3),)),
]
WEIGHTS = [0.7, -1.5]


@pytest.fixture(scope="module")
def adapters(tiny):
    return [(random_adapter(tiny.params, config, 1.0), config) for config in CONFIGS]


def deltas(adapter):
    """`s A B` of each layer, by NumPy in float64."""
    tree, config = adapter
    flat = traverse_util.flatten_dict(tree)
    return {
        path: config.scale_of(path)
        * np.asarray(flat[*path, "A"], np.float64)
        @ np.asarray(flat[*path, "B"], np.float64)
        for path in {path[:-1] for path in flat}
    }


def summed(adapters):
    out = {}
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        for path, delta in deltas(adapter).items():
            out[path] = out.get(path, 0) + weight * delta
    return out


def test_add_is_the_weighted_sum_of_the_deltas(adapters):
    found, expected = deltas(lora.add(adapters, WEIGHTS)), summed(adapters)
    assert found.keys() == expected.keys()
    assert len({path[-1] for path in found}) == 3  # layers that only one of the two adapts
    for path, delta in expected.items():
        np.testing.assert_allclose(found[path], delta, atol=1e-5)


def test_a_sum_has_no_higher_rank_than_its_layer(tiny):
    wide = LoraConfig(24, 8.0, ("query", "intermediate.dense"))
    adapters = [(random_adapter(tiny.params, wide, 1.0), wide)] * 2
    found = lora.add(adapters, WEIGHTS)
    lora.targets(tiny.params, found[1])  # raises for a rank above 32
    for path, delta in summed(adapters).items():
        np.testing.assert_allclose(deltas(found)[path], delta, atol=1e-4)


def test_every_product_requests_full_precision():
    a, b = jnp.ones((8, 2)), jnp.ones((2, 6))
    program = jax.make_jaxpr(lambda a, b: combine._truncate(a, b, 1))(a, b)
    products = [p for p in str(program).split("\n") if "dot_general" in p]
    text = " ".join(str(program).split())
    assert products and text.count("dot_general[") == text.count(
        "precision=(Precision.HIGHEST, Precision.HIGHEST)"
    )


def test_merging_the_sum_with_its_configuration_adds_the_weighted_deltas(tiny, adapters):
    tree, config = lora.add(adapters, WEIGHTS)
    merged = lora.merge(tiny.params, tree, config)
    flat, base = (traverse_util.flatten_dict(t) for t in (merged, tiny.params))
    expected = summed(adapters)
    for path, kernel in base.items():
        change = expected.get(path[:-1], 0) if path[-1] == "kernel" else 0
        np.testing.assert_allclose(flat[path], np.asarray(kernel) + change, atol=1e-4)
    lora.targets(tiny.params, config)  # raises unless every name and rank fits
    ranks = {path[-1]: config.rank_of(path) for path in expected}
    assert ranks == {"query": 7, "value": 3, "dense": 2}


def test_truncate_finds_the_nearest_adapter_of_a_rank(adapters):
    whole = lora.add(adapters, WEIGHTS)
    for rank in (1, 2, 4):
        found = deltas(lora.truncate(whole, rank))
        for path, delta in summed(adapters).items():
            u, s, vt = np.linalg.svd(delta, full_matrices=False)  # Eckart & Young, layer by layer
            nearest = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
            np.testing.assert_allclose(found[path], nearest, atol=1e-4)
    full = deltas(lora.truncate(whole, 99))
    for path, delta in summed(adapters).items():
        np.testing.assert_allclose(full[path], delta, atol=1e-4)


def test_add_equals_pefts_cat(adapters, tiny_base, tmp_path):
    """peft's `add_weighted_adapter`, whose weights have one sign and whose adapters one form."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    import peft_oracle

    configs = [LoraConfig(2, 3.0, ("query", "value")), LoraConfig(4, 2.0, ("query", "value"))]
    model = peft_oracle.adapt(peft_oracle.bert(tiny_base), configs[0])
    model.add_adapter(
        "second", peft.LoraConfig(r=4, lora_alpha=2.0, target_modules=["query", "value"])
    )
    generator, flats = torch.Generator().manual_seed(0), [{}, {}]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
            *middle, module, factor, which, _ = name.split(".")
            layer = int(middle[middle.index("layer") + 1])
            path = ("layers", "attention", "self", module, factor[-1])
            flats[which == "second"].setdefault(path, {})[layer] = parameter.data.numpy().T
    ours = [
        (
            traverse_util.unflatten_dict(
                {path: jnp.stack([by[n] for n in sorted(by)]) for path, by in flat.items()}
            ),
            config,
        )
        for flat, config in zip(flats, configs, strict=True)
    ]
    weights = [0.7, 1.5]
    found = deltas(lora.add(ours, weights))
    model.add_weighted_adapter(["default", "second"], weights, "sum", combination_type="cat")
    checked = 0
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "sum" in module.lora_A:
            layer = int(name.split(".layer.")[1].split(".")[0])
            path = ("layers", "attention", "self", name.rsplit(".", 1)[-1])
            theirs = module.get_delta_weight("sum").detach().numpy().T
            np.testing.assert_allclose(found[path][layer], theirs, atol=1e-4)
            checked += 1
    assert checked == 2 * len(next(iter(found.values())))


def test_unequal_numbers_and_ranks_below_one_are_refused(adapters):
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        lora.add(adapters, [1.0])
    with pytest.raises(ValueError, match="0 adapters"):
        lora.add([], [])
    with pytest.raises(ValueError, match="`rank` 0: must be at least 1"):
        lora.truncate(adapters[0], 0)

"""The accelerator's check: its verdict, and what it says of a base that cannot be had."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import accelerator
from experiments.accelerator import TOLERANCE
from jaxlora.tasks.sharing import VARIANTS

NAN = float("nan")


@pytest.mark.parametrize(
    ("differences", "agree"),
    [([0.0, TOLERANCE], True), ([0.0, 2 * TOLERANCE], False), ([NAN, 0.0], False),
     ([0.0, NAN], False)],
)  # fmt: skip
def test_what_is_above_the_tolerance_or_no_number_does_not_agree(differences, agree):
    assert accelerator.agree(differences) == agree


@pytest.mark.parametrize("place", [0, 1])
def test_nan_in_any_leaf_is_seen(place):
    a, b = [np.ones(2), np.ones(2)], [np.ones(2), np.ones(2)]
    assert accelerator.difference(a, b) == 0
    a[place] = np.array([1.0, NAN])
    assert np.isnan(accelerator.difference(a, b))


def round_to_tf32(x):
    """To 10 bits after the point, of float32's 23."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + (1 << 12)) & ~np.uint32((1 << 13) - 1)).view(np.float32)


@pytest.mark.parametrize("name", ["lora3", pytest.param("baseline2", marks=pytest.mark.slow)])
def test_rounding_is_below_the_tolerance_and_tf32_above_it(tiny, name):
    """What another device may do to weights, and what a matmul in TF32 does to them."""

    def gradients(change):
        base = dataclasses.replace(tiny, params=jax.tree.map(change, tiny.params))
        return accelerator.two_steps(VARIANTS[name], base, jax.devices("cpu")[0])[0]

    noise = np.random.default_rng(0)
    exact = gradients(np.asarray)
    rounded = gradients(lambda x: np.float32(x * (1 + 1e-7 * noise.normal(size=x.shape))))
    tf32 = gradients(round_to_tf32)
    assert len(exact) == 2 and all(jax.tree.leaves(tree) for tree in exact)
    near, far = (list(map(accelerator.difference, got, exact)) for got in (rounded, tf32))
    assert accelerator.agree(near) and not accelerator.agree(far)


@pytest.mark.parametrize("adapters", [1, 8, pytest.param(40, marks=pytest.mark.slow)])
def test_the_vectors_of_every_adapter_are_compared(tiny, adapters):
    """In float32 they agree with weights that differ by rounding; in TF32 they would not."""

    def vectors(change):
        base = dataclasses.replace(tiny, params=jax.tree.map(change, tiny.params))
        return accelerator.serve(base, adapters, jax.devices("cpu")[0])[0]

    exact = vectors(np.asarray)
    assert exact.shape == (accelerator.REQUESTS, tiny.config.hidden_size)
    assert len(np.unique(exact, axis=0)) == accelerator.REQUESTS
    near, far = vectors(lambda x: np.float32(x * (1 + 1e-7))), vectors(round_to_tf32)
    assert accelerator.agree([accelerator.difference(near, exact)])
    assert not accelerator.agree([accelerator.difference(far, exact)])


def test_what_differs_is_printed_and_makes_the_verdict(monkeypatch, capsys, tiny):
    """As on a device that computes something else."""
    monkeypatch.setattr(accelerator.huggingface, "load", lambda _: tiny)
    chosen = {"variants": ("lora3",), "adapters": (3,), "cpu_only": True}
    assert accelerator.main(**chosen)
    shown = capsys.readouterr().out
    assert "a step of lora3" in shown and "256 requests, 3 adapters" in shown
    serve, calls = accelerator.serve, []

    def changed(*args):
        vectors, seconds = serve(*args)
        calls.append(args)
        return vectors * (1 + 1e-3 * len(calls)), seconds

    monkeypatch.setattr(accelerator, "serve", changed)
    assert not accelerator.main(**chosen)


@pytest.mark.parametrize(("agree", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_is_1_if_the_accelerator_disagrees(monkeypatch, agree, code):
    monkeypatch.setattr(accelerator, "main", lambda: agree)
    assert accelerator.cli([]) == code


def test_without_an_accelerator_nothing_is_compared(capsys):
    assert accelerator.cli([]) == 2
    assert "error: JAX finds no accelerator" in capsys.readouterr().err
    assert accelerator.requests(8) == 256 and accelerator.requests(512) == 512


def test_a_bad_base_is_no_difference(capsys):
    assert accelerator.cli(["--base=nowhere/x/y", "--cpu-only"]) == 2
    assert "error: --base" in capsys.readouterr().err

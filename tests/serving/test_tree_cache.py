"""Trees that are read when they are asked for, and kept within a budget."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.serving.tree_cache import StoredTrees, TreeCache


def tree(key):
    """Two arrays, of 4 · key bytes together."""
    return {"a": np.full(key // 2, key, np.float32), "b": np.zeros(key - key // 2, np.float32)}


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(0, 200))
def test_the_last_ones_are_kept_as_far_as_they_fit(keys, memory):
    asked, used = [], []
    cache = TreeCache(lambda key: asked.append(key) or tree(key), memory)
    for key in keys:
        was_kept = key in cache._kept
        asked.clear()
        assert cache(key)["a"].size == key // 2
        assert asked == ([] if was_kept else [key])
        used = [key, *(other for other in used if other != key)]
        kept = list(cache._kept)
        assert set(kept) == set(used[: len(kept)])
        size = 4 * sum(kept)
        assert size <= memory or kept == [key]
        everything = 4 * sum(used)
        assert set(kept) == set(used) or everything > memory


def test_what_cannot_be_read_is_not_kept():
    broken = {"b"}

    def read(key):
        if key in broken:
            raise ValueError(key)
        return tree(2)

    cache = TreeCache(read, 100)
    first = cache("a")
    for _ in range(2):
        with pytest.raises(ValueError, match="b"):
            cache("b")
    assert cache("a") is first
    broken.clear()
    assert cache("b") is not first


def test_threads_share_what_is_read():
    asked, ready = [], threading.Barrier(8)
    cache = TreeCache(lambda key: asked.append(key) or tree(key), 10**6)

    def use(number):
        ready.wait(10)
        return [cache(1 + (number + n) % 20)["a"].size for n in range(40)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(use, range(8)))
    assert found == [[(1 + (k + n) % 20) // 2 for n in range(40)] for k in range(8)]
    assert sorted(asked) == list(range(1, 21))


def test_a_pickled_copy_reads_for_itself():
    trees = StoredTrees({"x": 9, "y": 4}, TreeCache(tree, 1000))
    before = len(pickle.dumps(trees))
    assert list(trees) == ["x", "y"] and "z" not in trees and len(trees) == 2
    assert trees["x"] is trees["x"]
    assert len(pickle.dumps(trees)) == before
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(trees))["x"]["a"], trees["x"]["a"])
    with pytest.raises(KeyError):
        trees["z"]

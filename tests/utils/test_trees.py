"""Trees of arrays: their checksums."""

import numpy as np

from jaxlora.utils import trees


def test_a_checksum_tells_shapes_dtypes_paths_and_values_apart():
    """A scalar too from an array with one number."""
    other = (
        {"a": np.zeros(())}, {"a": np.zeros(1)}, {"a": np.zeros((1, 1))}, {"b": np.zeros(1)},
        {"a": np.ones(1)}, {"a": np.zeros(1, np.float32)}, {"a": {"a": np.zeros(1)}},
    )  # fmt: skip
    assert len({trees.checksum(tree) for tree in other}) == len(other)


def test_a_checksum_does_not_depend_on_the_order_in_memory():
    x = np.arange(6.0).reshape(2, 3)
    assert trees.checksum({"a": x}) == trees.checksum({"a": np.asfortranarray(x)})
    assert trees.checksum({"a": x}) != trees.checksum({"a": x.T})

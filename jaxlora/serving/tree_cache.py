"""Lazily read pytrees with a least-recently-used cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import jax

from jaxlora.utils.trees import Tree

Key = TypeVar("Key", bound=Hashable)


class TreeCache(Generic[Key]):
    """A function that returns trees and caches the most recently used within a memory budget.

    It is thread-safe. Pickling it leaves out the cached trees.

    >>> import numpy as np
    >>> asked = []
    >>> cache = TreeCache(lambda name: asked.append(name) or np.zeros(2), memory=32)
    >>> trees = [cache(name) for name in ("a", "b", "a", "c", "a", "b")]  # "c" takes b's place
    >>> asked
    ['a', 'b', 'c', 'b']
    """

    def __init__(self, read: Callable[[Key], Tree], memory: int) -> None:
        """Create an empty cache.

        Args:
          read: returns the tree of a key; its exceptions are passed on, and nothing is cached.
          memory: bytes for all cached trees; the most recent tree is kept regardless of its size.
        """
        self._read, self._memory, self._bytes = read, memory, 0
        self._kept: dict[Key, Tree] = {}  # the most recently used last
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._read, self._memory)

    def __call__(self, key: Key) -> Tree:
        """Return the tree of a key, from the cache if possible."""
        with self._lock:
            if key in self._kept:
                self._kept[key] = self._kept.pop(key)
            else:
                self._add(key, self._read(key))
            return self._kept[key]

    def _add(self, key: Key, tree: Tree) -> None:
        self._kept[key] = tree
        self._bytes += _size(tree)
        while self._bytes > self._memory and len(self._kept) > 1:
            self._bytes -= _size(self._kept.pop(next(iter(self._kept))))


def _size(tree: Tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


class StoredTrees(Mapping[str, Tree]):
    """A mapping from names to trees, which reads a tree on each access."""

    def __init__(self, keys: Mapping[str, Key], read: Callable[[Key], Tree]) -> None:
        """Create the mapping without reading a tree.

        Args:
          keys: name → the key that is passed to `read`.
          read: returns the tree of a key.
        """
        self._keys, self._read = keys, read

    def __getitem__(self, name: str) -> Tree:
        return self._read(self._keys[name])

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

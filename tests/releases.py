"""Skips for tests that need more of a dependency than its oldest supported release has."""

from importlib import metadata

import pytest


def since(package, *release, reason):
    """Skip a test with releases of a package before this one."""
    present = tuple(map(int, metadata.version(package).split(".")[: len(release)]))
    return pytest.mark.skipif(present < release, reason=reason)

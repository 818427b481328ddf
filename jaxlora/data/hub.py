"""Datasets from the Hugging Face Hub, downloaded once into the cache."""

from __future__ import annotations

import re
from pathlib import Path

from jaxlora.utils import cache, files
from jaxlora.utils.errors import UserError
from jaxlora.utils.extras import explained

PREFIX = "hub:"
_ADDRESS = re.compile(
    r"hub:(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>\w[\w.-]*))?(:(?P<split>\w[\w.-]*))?"
)


def find(item: str) -> str:
    """Return the local folder of a Hub dataset, downloading it if needed; other paths unchanged.

    Without a revision, the newest one is downloaded once and kept, in a folder `…@latest`.

    Args:
      item: a path, or `hub:owner/name`, optionally with `@revision` and `:split`.

    Raises:
      UserError: if the dataset cannot be loaded, or `datasets` is not installed.

    >>> find("tickets.csv")
    'tickets.csv'
    """
    if not item.startswith(PREFIX):
        return item
    match = _ADDRESS.fullmatch(item)
    if match is None:
        raise UserError(f"{item}: write hub:owner/name, or hub:owner/name@revision:split")
    name, revision, split = match["name"], match["revision"], match["split"]
    folder = cache.cache_dir() / "datasets" / f"{name.replace('/', '--')}@{revision or 'latest'}"
    if not folder.is_dir():
        _download(item, name, revision, folder)
    return str(folder / split if split else folder)


def _download(item: str, name: str, revision: str | None, folder: Path) -> None:
    with explained():
        import datasets
    try:
        found = datasets.load_dataset(name, revision=revision)
        with files.building(folder) as content:
            found.save_to_disk(str(content))
    except Exception as error:  # httpx, pyarrow and datasets have no common base error
        if folder.is_dir():  # another process finished first
            return
        raise UserError(
            f"{item}: cannot be loaded from the hub ({str(error).partition(chr(10))[0][:200]}); "
            "check the name and the network, or name a folder that `datasets` has saved"
        ) from error

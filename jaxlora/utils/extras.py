"""Which extra of `pip install jaxlora` brings a package that is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxlora.utils.errors import UserError

# As in pyproject.toml; tests compare the two. By the name that is imported.
EXTRAS = {
    "serve": ("huggingface_hub", "rich", "tokenizers", "transformers", "tyro"),
    "train": ("grain", "importlib_resources", "matplotlib", "tensorboardX", "tensorflow_datasets"),
    "report": ("jinja2",),
}


class MissingExtraError(UserError, ImportError):
    """A package is missing that an extra of jaxlora brings; the message names the extra."""


@contextmanager
def explained() -> Iterator[None]:
    """Name the extra to install when a package of one cannot be imported.

    Raises:
      MissingExtraError: for a package in `EXTRAS`; any other error passes unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        raise MissingExtraError(
            f"{package} is not installed; pip install 'jaxlora[{extra}]' brings it"
        ) from error

"""Optional packages, and the extra of `pip install jaxlora` that installs each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxlora.utils.errors import UserError

# Extra → packages by their import names. A test compares it with pyproject.toml.
EXTRAS = {
    "serve": ("huggingface_hub", "jinja2", "rich", "tokenizers", "transformers", "tyro"),
    "train": ("grain", "importlib_resources", "matplotlib", "tensorboardX", "tensorflow_datasets"),
    "parquet": ("pyarrow",),
    "hub": ("datasets",),
    "onnx": ("onnx", "onnxruntime"),
}


class MissingExtraError(UserError, ImportError):
    """Error for a missing optional package; the message names the extra that installs it."""


@contextmanager
def explained() -> Iterator[None]:
    """Name the extra to install if an optional package cannot be imported.

    Raises:
      MissingExtraError: for a package in `EXTRAS`; other errors are raised unchanged.
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

"""Common base of the three TFDS builders: features, content-keyed configs, reading."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from jaxlora.data.raw_examples import TextExample
from jaxlora.utils import files

Splits = Mapping[str, Sequence[TextExample]]


@dataclasses.dataclass(eq=False)
class SourceConfig(tfds.core.BuilderConfig):
    """A builder config with a function that reads the rows.

    Its `name` contains a hash of the content (`demo-3f9a…`). Changed content is therefore a new
    dataset, and a prepared dataset is never stale.

    Attributes:
      read: download manager → rows by split; called only if the dataset is not yet prepared.
    """

    read: Callable[[tfds.download.DownloadManager], Splits] = lambda _: {}


class RowsBuilder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]  # missing from the stubs of TFDS
):
    """A dataset of `TextExample`s in source order; subclasses add a name and a description."""

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = ""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "sentence1": tfds.features.Text(),
                    "sentence2": tfds.features.Text(),
                    "label": np.float32,
                    "line": np.int64,
                }
            ),
            disable_shuffling=True,  # training shuffles; the files keep the source order
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        splits = self.builder_config.read(dl_manager)
        return {split: self._generate_examples(rows) for split, rows in splits.items()}

    def _generate_examples(
        self, rows: Sequence[TextExample]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, row in enumerate(rows):
            yield key, row._asdict()


def load(builder_class: type[RowsBuilder], config: SourceConfig, folder: Path) -> Splits:
    """Prepare a dataset if needed, and read it.

    Args:
      builder_class: one of the three builders.
      config: identifies the content and reads it.
      folder: data folder of TFDS, with datasets and downloads.

    Raises:
      UserError: from `config.read`.
    """
    with _quiet():
        builder = builder_class(data_dir=folder, config=config)
        try:
            if not builder.is_prepared():
                builder.download_and_prepare(file_format="array_record")
                _settle(Path(builder.data_dir), folder)
        except OSError:
            # TFDS prepares in a temporary folder and renames it. The rename fails if another
            # process finished first, but then its content is the same.
            if not builder.is_prepared():
                raise
            builder = builder_class(data_dir=folder, config=config)
        return {split: _rows(builder.as_data_source(split)) for split in builder.info.splits}


def _settle(prepared: Path, folder: Path) -> None:
    """Make a prepared dataset and its parent folders not world-writable, and flush it to disk."""
    files.settle(prepared)
    for path in prepared.parents:
        if path.is_relative_to(folder):
            files.guard(path)


def _rows(source: Any) -> list[TextExample]:
    examples = source.__getitems__(range(len(source)))
    return [
        TextExample(
            id=example["id"].decode(),
            sentence1=example["sentence1"].decode(),
            sentence2=example["sentence2"].decode(),
            label=float(example["label"]),
            line=int(example["line"]),
        )
        for example in examples
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars, prints and config warnings of TFDS."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)

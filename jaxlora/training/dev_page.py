"""The HTML page of a run, with the evaluation of each task on its dev set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxlora.data.raw_examples import UNLABELLED, TextExample
from jaxlora.data.tokenized import Examples
from jaxlora.serving.evaluate_table import Labelled, report
from jaxlora.tasks.evaluation import Evaluation
from jaxlora.training.inputs import Data
from jaxlora.utils import files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAGE = "dev.html"
RESAMPLES = 200  # bootstrap resamples of the intervals; `jaxlora evaluate` takes 1,000


def write(
    path: Path, title: str, found: Mapping[str, Evaluation], data: Data, tokenizer: Tokenizer
) -> None:
    """Write the page of a run, without tasks whose predictions are not all finite.

    Args:
      path: the file to write.
      title: title of the page.
      found: task → evaluation on its dev set.
      data: examples of the tasks.
      tokenizer: the base's; the page shows texts as it reads them.

    Raises:
      MissingExtraError: if Jinja is not installed.
    """
    from jaxlora.serving import evaluation_page

    parts = []
    for name, one in found.items():
        if np.isfinite(one.predictions).all():
            dev = data[name]["dev"]
            labelled = Labelled(decode(dev, tokenizer), dev.unlabelled, len(dev.blank))
            parts.append((report(one, "the dev set", labelled, resamples=RESAMPLES), one))
    if parts:
        files.write_text(path, evaluation_page.page(parts, title))


def decode(examples: Examples, tokenizer: Tokenizer) -> list[TextExample]:
    """Return examples as the encoder reads them: truncated, and joint pairs as one text."""
    numbers = range(len(examples.lengths))
    texts = tokenizer.decode_batch([examples.sentence(n).tolist() for n in numbers])
    first, second = texts[:: examples.sentences], texts[1::2]
    if examples.sentences == 1:
        second = [""] * len(first)
    return [
        TextExample(str(identity), one, other, UNLABELLED)
        for identity, one, other in zip(examples.ids, first, second, strict=True)
    ]

"""Compare the models of an ONNX folder with ours, on labelled examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlora.data.raw_examples import TextExample, sentences
from jaxlora.serving import evaluate_table, inference
from jaxlora.serving.export_merged import TOKENIZER
from jaxlora.serving.export_onnx import MODEL, QUANTIZED
from jaxlora.serving.predictor import Predictor
from jaxlora.tasks.task import Task
from jaxlora.utils.extras import explained

with explained():
    from onnxruntime import InferenceSession
    from tokenizers import Encoding, Tokenizer

_BATCH = 32


class Compared(NamedTuple):
    """A model beside ours.

    Attributes:
      file: of the folder.
      score: by the task's metric.
      difference: the largest from our probabilities, or from our scores.
      size: bytes of its files.
    """

    file: str
    score: float
    difference: float
    size: int


def compare(
    folder: Path, predictor: Predictor, name: str, rows: Sequence[TextExample]
) -> tuple[float, list[Compared]]:
    """Compare each model of a folder with the predictor that it was exported from.

    Args:
      folder: from `export_onnx.save`.
      predictor: has the task.
      name: the task.
      rows: labelled examples.

    Returns:
      Our own score, and a row for each model.
    """
    ours = evaluate_table.evaluate(predictor, name, rows)
    expected = ours.predictions if ours.probabilities is None else ours.probabilities
    examples = [tuple(sentences(row, ours.task).values()) for row in rows]
    found = []
    for path in (folder / file for file in (MODEL, QUANTIZED)):
        if path.is_file():
            answers = run(folder, path.name, ours.task, examples)
            predicted = decide(ours.task, answers) if ours.task.classes else answers
            size = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))
            difference = float(np.abs(answers - expected).max())
            score = ours.task.score(predicted, ours.labels)
            found.append(Compared(path.name, score, difference, size))
    return ours.task.score(ours.predictions, ours.labels), found


def decide(task: Task, probabilities: np.ndarray) -> np.ndarray:
    """Return the predictions that follow from probabilities `f32[E, classes]`."""
    with np.errstate(divide="ignore"):  # a probability of 0 or 1 is a logit without end
        logits = np.log(probabilities)
        if task.thresholded:
            positive = probabilities[:, -task.outputs :]
            logits = np.log(positive) - np.log1p(-positive)
    return inference.decode(task, logits[:, 0] if task.outputs == 1 else logits)


def run(folder: Path, file: str, task: Task, examples: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Apply a model of a folder with ONNX Runtime.

    Returns:
      `f32[E, classes]`, probabilities, or `f32[E]`, scores.
    """
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    session = InferenceSession(str(folder / file))
    wanted = {one.name for one in session.get_inputs()}
    parts = []
    for start in range(0, len(examples), _BATCH):
        texts = [task.encoded(example) for example in examples[start : start + _BATCH]]
        given: dict[str, np.ndarray] = {}
        for end, column in zip(("", "_2"), zip(*texts, strict=True), strict=False):
            given |= _inputs(tokenizer.encode_batch(list(column)), end)
        fed = {key: value for key, value in given.items() if key in wanted}
        parts.append(session.run(None, fed)[-1])
    return np.concatenate(parts)


def _inputs(batch: Sequence[Encoding], end: str) -> Mapping[str, np.ndarray]:
    return {
        f"input_ids{end}": np.array([one.ids for one in batch]),
        f"attention_mask{end}": np.array([one.attention_mask for one in batch]),
        f"token_type_ids{end}": np.array([one.type_ids for one in batch]),
    }

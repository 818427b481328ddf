"""Compare the models of an ONNX folder with the predictor, on labelled examples."""

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
    """An ONNX model compared with the predictor.

    Attributes:
      file: name of the model file.
      score: its score by the task's metric.
      difference: largest absolute difference of a probability, or of a score.
      size: size of its files in bytes.
    """

    file: str
    score: float
    difference: float
    size: int


def compare(
    folder: Path, predictor: Predictor, name: str, rows: Sequence[TextExample]
) -> tuple[float, list[Compared]]:
    """Compare each model of an ONNX folder with the predictor.

    Args:
      folder: written by `export_onnx.save`.
      predictor: a predictor that serves the task.
      name: the name of the task.
      rows: labelled examples.

    Returns:
      The predictor's score, and one row per model.
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
    """Decode probabilities `f32[E, classes]` to predictions, as `inference.decode` does."""
    with np.errstate(divide="ignore"):  # probabilities of 0 and 1 have infinite logits
        logits = np.log(probabilities)
        if task.thresholded:
            positive = probabilities[:, -task.outputs :]
            logits = np.log(positive) - np.log1p(-positive)
    return inference.decode(task, logits[:, 0] if task.outputs == 1 else logits)


def run(folder: Path, file: str, task: Task, examples: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Run a model of the folder with ONNX Runtime.

    Returns:
      Probabilities, `f32[E, classes]`, or scores, `f32[E]`.
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

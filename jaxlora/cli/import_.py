"""`jaxlora import`: add a task from another program to a bank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jaxlora.cli.flags import call_one
from jaxlora.cli.terminal import Folder, Name, say
from jaxlora.data.task_files import check_name
from jaxlora.formats import huggingface
from jaxlora.formats import peft as peft_files
from jaxlora.formats.huggingface import absolute
from jaxlora.serving import bank as banks
from jaxlora.serving import export_peft, import_model, manifest
from jaxlora.serving.task_models import Pooling, TaskModels
from jaxlora.utils import files
from jaxlora.utils.errors import UserError


def peft(
    folder: Folder,
    /,
    bank: Path,
    name: Annotated[str, tyro.conf.arg(name="as")],
    base: str | None = None,
    base_sha256: str | None = None,
    any_base: bool = False,
    pooling: Pooling | None = None,
    adapter: str | None = None,
    classes: tuple[str, ...] = (),
    pair: bool = False,
    encoder_only: bool = False,
    update: bool = False,
) -> None:
    """Add an adapter from a PEFT folder to a bank, which is created if it is missing.

    An adapter of a sequence classifier (SEQ_CLS) is imported with its classifier, which becomes the
    head of the task. Any other adapter that jaxlora did not export has no head: its task compares
    two texts by the cosine of their vectors.

    Args:
      folder: a folder with adapter_config.json and adapter_model.safetensors, or with named
        subfolders that contain them.
      bank: the bank.
      name: name of the task in the bank.
      base: base of a new bank, for an adapter that jaxlora did not export (default: minilm); else
        the new path of the base, if it has moved.
      base_sha256: refuse the base if its weights have another checksum.
      any_base: import the adapter even if its folder names another base, or none.
      pooling: pooling of a new bank; default: cls for a sequence classifier, else mean.
      adapter: name of the adapter, if the folder has several.
      classes: names of the classifier's classes; default: the base's id2label, or numbers.
      pair: the classifier was trained on pairs of texts, which it reads jointly.
      encoder_only: leave out the classifier.
      update: replace the task with this name.
    """
    check_name(name, "--as")
    folder = peft_files.find(folder, adapter)
    base = None if base is None else absolute(base)
    like = None
    if encoder_only or not export_peft.described(folder):
        whole = not encoder_only and export_peft.classifies(folder)
        like = _like(bank, base, base_sha256, pooling, whole)
    trained = export_peft.load(
        folder, name, like, base, any_base=any_base, encoder_only=encoder_only, classes=classes,
        pair=pair,
    )  # fmt: skip
    _check_given(trained, base_sha256, pooling)
    _add(bank, trained, name, update)


def model(
    model: Name,
    /,
    bank: Path,
    name: Annotated[str, tyro.conf.arg(name="as")],
    classes: tuple[str, ...] = (),
    pair: bool = False,
    update: bool = False,
) -> None:
    """Add a complete third-party model to a bank: a sequence classifier or a sentence encoder.

    The model becomes the base of a new bank. In a bank whose base has the same shape and tokenizer,
    the task stores the model's complete encoder. Cross-encoders read pairs jointly.

    Args:
      model: a folder or hub id of transformers or sentence-transformers.
      bank: the bank.
      name: name of the task in the bank.
      classes: names of the classifier's classes; default: its id2label, or numbers.
      pair: the classifier reads two texts jointly.
      update: replace the task with this name.
    """
    check_name(name, "--as")
    like = banks.load(bank) if manifest.exist(files.local(bank)) else None
    trained = import_model.load(model, name, like, classes=classes, pair=pair)
    _add(bank, trained, name, update)


def _add(bank: Path, trained: TaskModels, name: str, update: bool) -> None:
    """Add the imported task to the bank, and print what was done."""
    banks.add(bank, trained, [name], replace=update)
    say(f"{bank}: {'updated' if update else 'added'} {name}")
    if left_out := trained.models[name].facts.left_out:
        say(f"left out, since the vectors do not depend on it: {', '.join(left_out)}")


def _check_given(trained: TaskModels, base_sha256: str | None, pooling: str | None) -> None:
    """Refuse flags that contradict what was imported."""
    if pooling not in (None, trained.pooling):
        raise UserError(f"--pooling={pooling}: it is {trained.pooling} here; leave it out")
    weights = trained.fingerprint.weights
    if base_sha256 not in (None, weights):
        raise UserError(f"--base-sha256 {base_sha256}: {trained.base} has sha256 {weights}")


def _like(
    bank: Path, base: str | None, base_sha256: str | None, pooling: Pooling | None, classifier: bool
) -> TaskModels:
    """Return the bank that an imported adapter must fit, or an empty one with the chosen base."""
    if manifest.exist(files.local(bank)):
        return banks.load(bank)
    base = base or huggingface.MINILM
    found = huggingface.load(base, base_sha256)
    if found.left_out:
        say(f"{base}{found.without}")
    # Classifiers truncate at the length that transformers would use.
    length = min(512 if classifier else 128, found.config.max_length)
    pooling = pooling or ("cls" if classifier else "mean")
    return TaskModels(
        base=base, fingerprint=found.fingerprint, pooling=pooling, max_length=length,
        dtype="float32", models={}, trees={}, configs={}, origin=str(bank),
    )  # fmt: skip


COMMANDS: dict[str, Callable[..., None]] = {"peft": peft, "model": model}


def main(words: Sequence[str]) -> None:
    """Run one of `COMMANDS`."""
    about = "Add a task from another program to a bank."
    call_one(COMMANDS, "jaxlora import", about, words)

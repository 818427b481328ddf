"""The command `jaxlora`: training, banks of adapters, predictions, exports, imports and costs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Column, Table

from jaxlora.cli import cost_table
from jaxlora.cli.flags import exit_code
from jaxlora.data.quoting import Quoting
from jaxlora.data.task_files import check_name
from jaxlora.formats import huggingface
from jaxlora.formats import peft as peft_files
from jaxlora.formats.huggingface import absolute
from jaxlora.lora import LoraConfig
from jaxlora.nn.bert import param_shapes
from jaxlora.serving import bank as banks
from jaxlora.serving import export_merged as merged
from jaxlora.serving import export_peft as exchange
from jaxlora.serving import import_model as whole_models
from jaxlora.serving import manifest
from jaxlora.serving.predict_table import predict_file
from jaxlora.serving.predictor import Predictor
from jaxlora.serving.task_models import Pooling, TaskModels, combine_tasks
from jaxlora.utils import cache, files, process, trees
from jaxlora.utils.errors import UserError

Folder = Annotated[Path, tyro.conf.Positional]
Name = Annotated[str, tyro.conf.Positional]
CONSOLE = Console()


def say(text: str) -> None:
    """Print a line without wrapping it."""
    CONSOLE.print(text, soft_wrap=True, markup=False, highlight=False)


def train(words: Sequence[str]) -> None:
    """Train; only this command needs what the extra "train" brings."""
    from jaxlora.cli import train as training

    training.train(words)


def bank_add(folder: Folder, /, run: Path, task: tuple[str, ...] = ()) -> None:
    """Put the tasks of a finished run into a bank (created if it is missing).

    Args:
      folder: the bank.
      run: a run's --out folder.
      task: which of its tasks; default: all.
    """
    source = banks.load(run)
    names = tuple(dict.fromkeys(task)) or tuple(source.models)
    banks.add(folder, source, names)
    say(f"{folder}: added {', '.join(names)}")


def bank_update(folder: Folder, /, run: Path, task: tuple[str, ...] = ()) -> None:
    """Replace tasks of a bank by those of a finished run; the others are not touched.

    Args:
      folder: the bank.
      run: a run's --out folder.
      task: which of its tasks; default: all.
    """
    source = banks.load(run)
    names = tuple(dict.fromkeys(task)) or tuple(source.models)
    banks.add(folder, source, names, replace=True)
    say(f"{folder}: updated {', '.join(names)}")


def bank_remove(folder: Folder, task: Name, /) -> None:
    """Remove a task from a bank.

    Args:
      folder: the bank.
      task: its name.
    """
    banks.remove(folder, task)
    say(f"{folder}: removed {task}")


def bank_list(folder: Folder, /, base: str | None = None) -> None:
    """Show a bank's tasks: scores, parameters and bytes, beside one full model for each task.

    Args:
      folder: the bank.
      base: where its base is now, if it has moved.
    """
    rows, found = banks.contents(folder), banks.load_base_spec(folder).at(base).load_base()
    table = Table("task", "what", "dev", "adapter", "adapter M", "head M", "kB")
    for row in rows:
        score = "" if row.score is None else f"{row.metric} {row.score:.4f}"
        others = [r.task for r in rows if r.adapter == row.adapter and r.task != row.task]
        adapter = f"shared with {', '.join(others)}" if others else "own"
        cells = (
            row.task, row.title, score, adapter if row.adapter_parameters else "none",
            f"{row.adapter_parameters / 1e6:.3f}", f"{row.head_parameters / 1e6:.3f}",
            f"{row.bytes / 1e3:,.0f}",
        )  # fmt: skip
        table.add_row(*map(escape, cells))
    CONSOLE.print(table)
    each = trees.count(param_shapes(found.config))
    adapters = {row.adapter: row.adapter_parameters for row in rows}
    heads = sum(row.head_parameters for row in rows)
    added = sum(adapters.values()) + heads
    say(
        f"{len(rows)} tasks add {added / 1e6:.2f}M parameters "
        f"({sum(r.bytes for r in rows) / 1e6:.1f} MB) to a base of {each / 1e6:.2f}M: "
        f"{(each + added) / 1e6:.2f}M in all; a full model for each would be "
        f"{(each * len(rows) + heads) / 1e6:.2f}M."
    )


def bank_show(folder: Folder, task: Name, /) -> None:
    """Show everything that a bank stores about a task.

    Args:
      folder: the bank.
      task: its name.
    """
    print(banks.describe(folder, task))


def bank_verify(folder: Folder, /, base: str | None = None) -> None:
    """Compare every file of a bank with its checksum, and the base with its own.

    Args:
      folder: the bank.
      base: where its base is now, if it has moved.
    """
    problems = banks.verify(folder, base)
    if problems:
        raise UserError("\n".join(problems))
    say(f"{folder}: all is well")


def predict(
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    bank: Path,
    task: str | None = None,
    input: Path | None = None,
    output: Path | None = None,
    base: str | None = None,
    quoting: Quoting | None = None,
    strict: bool = False,
) -> None:
    """Predict one example given by its texts, or a whole table.

    Args:
      texts: a sentence, or the two of a pair.
      bank: a bank, or the folder of a finished run.
      task: the task; a table may have a column task instead.
      input: a table with a header: sentence (or sentence1, sentence2), task, id.
      output: where its answers go: a .csv, or a .jsonl with all probabilities.
      base: where the base is now, if it has moved; it must be the same.
      quoting: of the table: none: a double quote is part of the text; standard: as in any CSV;
        default: standard, and none for tabs if a field opens a quote and does not close it.
      strict: refuse a table with blank texts, instead of leaving their answers empty.
    """
    if (input is None) == (not texts) or (input is None) != (output is None):
        raise UserError('give --task and texts ("a" "b"), or --input and --output')
    process.reuse_memory()
    process.keep_programs(cache.cache_dir() / "xla")
    predictor = Predictor.load(bank, base)
    if input is not None and output is not None:
        columns, notes = (SpinnerColumn(), TextColumn("{task.completed:,} answered")), list[str]()
        with Progress(*columns, transient=True) as bar:
            shown = bar.add_task("")
            count = predict_file(
                predictor, input, output, task, lambda n: bar.update(shown, completed=n),
                quoting=quoting, strict=strict, note=notes.append,
            )  # fmt: skip
        say("; ".join([f"{output}: {count:,} answer{'' if count == 1 else 's'}", *notes]))
        return
    if task is None:
        raise UserError(f"--task is missing; there are {', '.join(predictor.tasks)}")
    (answer,) = predictor([(task, *texts)])
    if answer.probabilities is None:
        print(f"{answer.value:.4f}")
        return
    each = ", ".join(f"{name} {p:.4f}" for name, p in answer.probabilities.items())
    print(f"{answer.label}  ({each})")


def export_merged(out: Folder, /, bank: Path, task: str, base: str | None = None) -> None:
    """Write a task as a Hugging Face folder, its adapter merged into the weights.

    Args:
      out: a new folder.
      bank: a bank, or the folder of a finished run.
      task: the task.
      base: where the base is now, if it has moved; it must be the same.
    """
    trained = banks.load(bank).at(base)
    merged.save(out, trained.load_base(), trained, task)
    say(f"{out}: {task}, merged; its {merged.README} says how to apply it")


def export_peft(out: Folder, /, bank: Path, task: str, base: str | None = None) -> None:
    """Write a task's adapter as a PEFT folder, with its head beside it.

    Args:
      out: a new folder.
      bank: a bank, or the folder of a finished run.
      task: the task.
      base: where the base is now, if it has moved; it must be the same.
    """
    trained = banks.load(bank).at(base)
    if base is not None:
        trained.load_base()  # the folder would name it, so it must be the right one
    exchange.save(out, trained, task)
    say(f"{out}: {task} for PEFT")


def import_peft(
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
    """Put an adapter from a PEFT folder into a bank (created if it is missing).

    What PEFT made for a sequence classifier (SEQ_CLS) is imported whole, with its classifier as the
    task's head. Any other adapter that was not exported from here has no head: it compares two
    texts by the cosine of their vectors.

    Args:
      folder: adapter_config.json and adapter_model.safetensors, or named folders with those.
      bank: the bank.
      name: what to call its task there.
      base: of a new bank, for an adapter that was not exported from here (default: minilm); else
        where the base is now, if it has moved.
      base_sha256: refuse that base if its weights have another checksum.
      any_base: import it although its folder names another base, or none.
      pooling: likewise of a new bank; default: cls for a sequence classifier, else mean.
      adapter: which of several named adapters in the folder.
      classes: names of a classifier's classes; default: the base's id2label, or numbers.
      pair: the classifier was trained on pairs of texts, which it reads together.
      encoder_only: leave out the classifier.
      update: replace the task of that name.
    """
    check_name(name, "--as")
    folder = peft_files.find(folder, adapter)
    base = None if base is None else absolute(base)
    like = None
    if encoder_only or not exchange.described(folder):
        whole = not encoder_only and exchange.classifies(folder)
        like = _like(bank, base, base_sha256, pooling, whole)
    trained = exchange.load(
        folder, name, like, base, any_base=any_base, encoder_only=encoder_only, classes=classes,
        pair=pair,
    )  # fmt: skip
    _check_given(trained, base_sha256, pooling)
    banks.add(bank, trained, [name], replace=update)
    say(f"{bank}: {'updated' if update else 'added'} {name}")
    if left_out := trained.models[name].facts.left_out:
        say(f"left out, since the vectors do not depend on it: {', '.join(left_out)}")


def import_model(
    model: Name,
    /,
    bank: Path,
    name: Annotated[str, tyro.conf.arg(name="as")],
    classes: tuple[str, ...] = (),
    pair: bool = False,
    update: bool = False,
) -> None:
    """Put a whole model of others into a bank: a sequence classifier or a sentence encoder.

    The base of a new bank is the model itself. In a bank of another base with the same shape and
    tokenizer the task keeps the model's whole encoder. Cross-encoders read pairs together.

    Args:
      model: a folder or hub id of transformers or sentence-transformers.
      bank: the bank.
      name: what to call its task there.
      classes: names of a classifier's classes; default: its id2label, or numbers.
      pair: its classifier reads two texts together.
      update: replace the task of that name.
    """
    check_name(name, "--as")
    like = banks.load(bank) if manifest.exist(files.local(bank)) else None
    trained = whole_models.load(model, name, like, classes=classes, pair=pair)
    banks.add(bank, trained, [name], replace=update)
    say(f"{bank}: {'updated' if update else 'added'} {name}")


def _check_given(trained: TaskModels, base_sha256: str | None, pooling: str | None) -> None:
    """Refuse flags that say something else than what was imported."""
    if pooling not in (None, trained.pooling):
        raise UserError(f"--pooling={pooling}: it is {trained.pooling} here; leave it out")
    weights = trained.fingerprint.weights
    if base_sha256 not in (None, weights):
        raise UserError(f"--base-sha256 {base_sha256}: {trained.base} has sha256 {weights}")


def _like(
    bank: Path, base: str | None, base_sha256: str | None, pooling: Pooling | None, classifier: bool
) -> TaskModels:
    """What an imported adapter shall fit: the bank, or a new one's base."""
    if manifest.exist(files.local(bank)):
        return banks.load(bank)
    base = base or huggingface.MINILM
    found = huggingface.load(base, base_sha256)
    if found.left_out:
        say(f"{base}{found.without}")
    # A classifier cuts sentences where transformers would.
    length = min(512 if classifier else 128, found.config.max_length)
    pooling = pooling or ("cls" if classifier else "mean")
    return TaskModels(
        base=base, fingerprint=found.fingerprint, pooling=pooling, max_length=length,
        dtype="float32", models={}, trees={}, configs={}, origin=str(bank),
    )  # fmt: skip


def combine(
    bank: Folder,
    /,
    task: tuple[str, ...],
    name: Annotated[str, tyro.conf.arg(name="as")],
    weight: tuple[float, ...] = (),
    head: str | None = None,
    rank: int | None = None,
) -> None:
    """Add a task to a bank whose adapter is a weighted sum of others'.

    Args:
      bank: the bank.
      task: whose adapters.
      name: what to call the new task.
      weight: one for each; default: equal weights that sum to 1.
      head: the task whose head and labels it takes over; default: the first.
      rank: the nearest adapter of this rank, by singular value decomposition; default: the exact
        sum, whose rank is the sum of ranks.
    """
    check_name(name, "--as")
    if not task:
        raise UserError("--task: name at least one task whose adapter to take")
    if len(set(task)) != len(task):
        raise UserError(f"--task {' '.join(task)}: names a task twice; add up the weights")
    weights = weight or (1 / len(task),) * len(task)
    if len(weights) != len(task):
        raise UserError(f"--weight: {len(weights)} weights for {len(task)} tasks")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weight {' '.join(map(str, weights))}: must be finite numbers")
    if rank is not None and rank < 1:
        raise UserError(f"--rank must be at least 1, got {rank}")
    trained = banks.load(bank)
    for one in (*task, head or task[0]):
        trained.find(one)
    parts = dict(zip(task, weights, strict=True))
    made = combine_tasks(trained, parts, name, head or task[0], rank)
    banks.add(bank, made, [name])
    say(f"{bank}: added {name}")


def cost(
    *,
    variant: tuple[str, ...],
    base: tuple[str, ...] = ("bert-base",),
    mesh: tuple[str, ...] = ("data=1",),
    batch_size: int = 16,
    sentence_length: float = 20.0,
    row_length: int = 64,
    rank: int = 15,
    dtype: Literal["float32", "bfloat16"] = "float32",
    flops: float | None = None,
    link: float | None = None,
) -> None:
    """Say what a step will cost, before there are devices: FLOPs, memory, traffic, time.

    Args:
      variant: the paper's variants, one or more.
      base: minilm, bert-base, bert-large, 1b, 3b, 10b, or Hugging Face folders.
      mesh: devices, as `jaxlora train --mesh` takes them.
      batch_size: examples of each task in a step.
      sentence_length: tokens of a sentence on the average.
      row_length: tokens of a row, into which sentences are packed.
      rank: of the adapters.
      dtype: of matmul inputs.
      flops: FLOP/s that a device reaches; adds the time of a step when nothing overlaps.
      link: bytes/s between devices.
    """
    if rank < 1:
        raise UserError(f"--rank {rank}: must be above 0")
    head, *rows = cost_table.lines(
        base, variant, mesh, cost_table.check_rates(flops, link), batch_size=batch_size,
        sentence_length=sentence_length, row_length=row_length, dtype=dtype,
        adapter=LoraConfig(rank, float(rank)),
    )  # fmt: skip
    columns = (Column(name, overflow="fold") for name in head)
    table = Table(*columns, caption=cost_table.CAPTION, padding=0)
    for row in rows:
        table.add_row(*map(escape, row))
    CONSOLE.print(table)


class Commands(NamedTuple):
    """Commands under one word."""

    about: str
    by_name: dict[str, Callable[..., None]]


GROUPS = {
    "bank": Commands(
        "Keep the adapters and heads of many tasks of one base.",
        {
            "list": bank_list,
            "add": bank_add,
            "update": bank_update,
            "remove": bank_remove,
            "show": bank_show,
            "verify": bank_verify,
        },
    ),
    "export": Commands(
        "Write a task for other programs.", {"merged": export_merged, "peft": export_peft}
    ),
    "import": Commands(
        "Take over a task from other programs.", {"peft": import_peft, "model": import_model}
    ),
}
ALONE: dict[str, Callable[..., None]] = {
    "predict": predict,
    "combine": combine,
    "cost": cost,
}


def run(args: Sequence[str]) -> None:
    """Find the command and call it.

    Raises:
      UserError: for bad input.
    """
    word, *rest = args or ("--help",)
    if word == "train":
        train(rest)
    elif word in GROUPS:
        group = GROUPS[word]
        tyro.extras.subcommand_cli_from_dict(
            group.by_name, prog=f"jaxlora {word}", description=group.about, args=rest
        )
    elif word in ALONE:
        tyro.cli(ALONE[word], prog=f"jaxlora {word}", args=rest)
    else:
        known = [
            *(f"{g} {c}" for g, found in GROUPS.items() for c in found.by_name),
            "train",
            *ALONE,
        ]
        lines = "\n".join(f"  jaxlora {name}" for name in known)
        usage = f"{__doc__}\n\n{lines}\n\nEach takes --help."
        if word not in ("-h", "--help"):
            raise UserError(f"unknown command {word!r}\n{usage}")
        print(usage)


def main(args: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code (2: bad input, 130: interrupted)."""
    return exit_code(lambda: run(sys.argv[1:] if args is None else args))

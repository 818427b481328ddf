"""`jaxlora train`: train your own tasks, or one of the paper's variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jaxlora.cli import curves
from jaxlora.cli.console import ConsoleCallback, notes, result_table
from jaxlora.cli.flags import naming_flags
from jaxlora.cli.terminal import Names, make_console, say
from jaxlora.data import task_files
from jaxlora.lora import LoraConfig
from jaxlora.tasks.sharing import variant
from jaxlora.training import metrics_log
from jaxlora.training.config import PresetName, Settings, TaskChoice, VariantName, flat_names
from jaxlora.training.presets import PRESETS, Preset, make_settings, usual_preset
from jaxlora.training.run import RunOptions, run
from jaxlora.utils import cache, distributed, files, process


@dataclasses.dataclass(frozen=True)
class LoraFlags(LoraConfig):
    """Flags of the adapters; `--lora-dropout` is distinct from the dropout of encoder and heads."""

    dropout: Annotated[float, tyro.conf.arg(name="lora-dropout")] = 0.0

    def __post_init__(self) -> None:
        """Skip the checks, which `make_settings` does with errors that name the flag."""


@dataclasses.dataclass(frozen=True)
class TaskFlags(TaskChoice):
    """Flags for the choice of tasks; your own tasks are positional arguments."""

    tasks: Annotated[Names, tyro.conf.Positional] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Preset):
    """Train your own tasks, or one of the paper's variants on its tasks, and show dev scores.

    jaxlora train tickets.csv --text subject --label topic

    jaxlora train topics.toml

    jaxlora train --variant lora3

    The defaults below are those of the given preset and variant.

    Attributes:
      variant: own (an adapter for each task), or the paper's baseline1 (frozen BERT), baseline2–4
        (full fine-tuning), lora1–4 (adapters). The README has a table of which tasks share
        parameters, and of the STS losses.
      preset: own: general settings for your own tasks, including small ones, and their default;
        demo: MiniLM and built-in made-up data, the default without tasks of your own; cs224n:
        settings that train well on real data (needs --data-dir); paper: bert-base-uncased and the
        paper's settings (docs/paper.md lists those that are guessed).
      out: folder of the run; default: a folder in runs, named after the first file of your tasks,
        or after the variant.
      coordinator: host:port of process 0 of several processes; not needed under Slurm or Open MPI.
      processes: number of processes.
      process: number of this process, from 0; default: the pod's index in an Indexed Job, or 0.
    """

    variant: VariantName = "own"
    preset: PresetName | None = None
    choice: TaskFlags = TaskFlags()
    lora: LoraFlags = LoraFlags()
    run: RunOptions = RunOptions()
    out: Path | None = None
    coordinator: str | None = None
    processes: int = 1
    process: int | None = None

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        named = [item for item in self.choice.tasks if not task_files.is_value(item)]
        name = Path(named[0]).stem if named else self.variant
        return files.local(self.out or Path("runs") / name)


def parse(words: Sequence[str], prog: str = "jaxlora train") -> Flags:
    """Parse flags, with the preset's values as defaults.

    Values of tasks, such as `topic.epochs=3`, may be anywhere; the files must be adjacent.
    """
    omit = (tyro.conf.OmitArgPrefixes,)
    values = tuple(filter(task_files.is_value, words))
    words = [word for word in words if not task_files.is_value(word)]
    # The first pass finds the flags that the defaults depend on. Only the second shows help.
    first, _ = tyro.cli(
        Flags, args=words, prog=prog, config=omit, return_unknown_args=True, add_help=False
    )
    preset = first.preset or usual_preset(first.variant, bool(first.choice.tasks or values))
    start = PRESETS[preset](variant(first.variant))
    sections = {field.name: getattr(start, field.name) for field in dataclasses.fields(Preset)}
    sections["lora"] = LoraFlags(**vars(start.lora))
    sections["choice"] = TaskFlags(**{**vars(start.choice), "tasks": ()})
    default = Flags(variant=first.variant, preset=preset, **sections)
    found = tyro.cli(Flags, args=words, prog=prog, default=default, config=omit)
    choice = dataclasses.replace(found.choice, tasks=(*found.choice.tasks, *values))
    return dataclasses.replace(found, choice=choice)


def to_settings(flags: Flags, words: Sequence[str]) -> Settings:
    """Return the settings for the given flags.

    Args:
      flags: the result of `parse(words)`.
      words: the command line, which tells given flags from defaults.

    Raises:
      ConfigError: see `make_settings`.
    """
    given = {word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"}
    places = {name: place for name, place in flat_names(Preset).items() if name in given}
    asked = {name: getattr(getattr(flags, s), field) for name, (s, field) in places.items()}
    if flags.choice.tasks:
        asked["tasks"] = flags.choice.tasks
    return make_settings(flags.variant, flags.preset, **asked)


def main(words: Sequence[str]) -> None:
    """Join the other processes, if there are any, and train."""
    flags = parse(words)
    with process.rewritten(naming_flags(Flags)):
        distributed.join(flags.coordinator, flags.processes, flags.process)
        with distributed.together(naming_flags(Flags)):
            _train(flags, words)


def _train(flags: Flags, words: Sequence[str]) -> None:
    process.reuse_memory()
    process.keep_programs(cache.cache_dir() / "xla")
    console, out = make_console(quiet=not distributed.is_primary()), flags.folder
    callback, settings = ConsoleCallback(console), to_settings(flags, words)
    with callback.live():
        result = run(settings, out, callback, flags.run)
    if distributed.is_primary():
        metrics = {name: task.metric_name for name, task in settings.named.items()}
        records = metrics_log.read_records(out)
        curves.draw(records, out / "curves.png", settings.title, metrics)
    console.print(result_table(result))
    for line in notes(result):
        say(f"  {line}", console)
    say(f"Everything is in {out}; use it with jaxlora.load({str(out)!r}).", console)

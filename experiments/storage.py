"""Measure the disk space of many tasks: banks written to disk, against a full model per task.

python experiments/storage.py --tasks 3 10 100 --out docs
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from jaxlora import lora
from jaxlora.cli.flags import exit_code
from jaxlora.formats.fingerprint import Fingerprint
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.serving import bank
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.task import Task
from jaxlora.utils import files, trees

MB = 1e6
BASES = {
    "MiniLM": bert.BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "bert-base": bert.BertConfig(),
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Measure banks of many tasks.

    Attributes:
      tasks: numbers of tasks.
      rank: rank of the adapters.
      out: folder for storage.md and storage.png; default: only print the table.
    """

    tasks: tuple[int, ...] = (3, 10, 100)
    rank: int = 15
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A bank's size on disk and its base's size, in MB."""

    base: str
    tasks: int
    bank: float
    base_size: float

    @property
    def bundled(self) -> float:
        """Size of the base and the bank."""
        return self.base_size + self.bank

    @property
    def full(self) -> float:
        """Size of a fine-tuned model for each task."""
        return self.base_size * self.tasks


def measure(base: str, count: int, rank: int, folder: Path) -> Row:
    """Write a bank of `count` binary tasks, each with an adapter and a head, and measure it."""
    config = BASES[base]
    shapes, width = bert.param_shapes(config), config.hidden_size
    adapter = LoraConfig(rank, float(rank))
    tasks = [Task(f"task{n}", "binary") for n in range(count)]
    keys = jax.random.split(jax.random.key(0), count)
    found = [
        {"lora": jax.tree.map(lambda x, k=k: x + jax.random.normal(k, x.shape), tree)}
        for k, tree in ((k, lora.init(k, shapes, adapter)) for k in keys)
    ]
    heads = [t.init_head(k, width, "concat") for t, k in zip(tasks, keys, strict=True)]
    models = {
        t.name: TaskModel(t, t.name, head, "concat") for t, head in zip(tasks, heads, strict=True)
    }
    trained = TaskModels(
        base, Fingerprint(*["0" * 64] * 3), "mean", 128, "float32", models=models,
        trees=dict(zip(models, found, strict=True)), configs=dict.fromkeys(models, adapter),
        origin="made up",
    )  # fmt: skip
    bank.add(folder, trained, list(models))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Row(base, count, size / MB, 4 * trees.count(shapes) / MB)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells of the table, the header first."""
    head = ["base", "tasks", "bank", "base + bank", "a full model for each", "saved"]
    cells = [
        [
            row.base, str(row.tasks), f"{row.bank:,.1f} MB", f"{row.bundled:,.1f} MB",
            f"{row.full:,.0f} MB", f"{row.full / row.bundled:.1f} ×",
        ]
        for row in rows
    ]  # fmt: skip
    return [head, *cells]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot the disk space of both ways against the number of tasks, for each base."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    bases = list(dict.fromkeys(row.base for row in rows))
    panels = figure.subplots(1, len(bases), squeeze=False)[0]
    for axis, base in zip(panels, bases, strict=True):
        mine = [row for row in rows if row.base == base]
        counts = [row.tasks for row in mine]
        axis.plot(counts, [row.full for row in mine], "o--", label="a full model for each")
        axis.plot(counts, [row.bundled for row in mine], "o-", label="base + bank")
        axis.set(title=base, xlabel="tasks", ylabel="MB on disk", xscale="log", yscale="log")
        axis.set_xticks(counts, map(str, counts))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def write(rows: Sequence[Row], flags: Flags, out: Path) -> None:
    """Write `storage.md` and `storage.png`."""
    out.mkdir(parents=True, exist_ok=True)
    draw(rows, out / "storage.png")
    head, *cells = table(rows)
    lines = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells]]
    (out / "storage.md").write_text(
        "# Disk space of many tasks\n\n"
        "Sizes of banks written by `python experiments/storage.py`: each task has its own adapter "
        f"of rank {flags.rank} on the attention's four layers and its own head, in float32. Banks "
        "whose tasks share an adapter are smaller, since it is stored once. Memory use is limited "
        "by `--memory`, independently of the number of tasks: see "
        "[serving.md](serving.md#memory).\n\n"
        + "\n".join(lines)
        + "\n\n![MB on disk against the number of tasks](storage.png)\n"
    )


def main(flags: Flags) -> None:
    """Measure the banks, write the files and print the table."""
    rows = []
    for base in BASES:
        for count in flags.tasks:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(base, count, flags.rank, Path(folder) / "bank"))
    if flags.out is not None:
        write(rows, flags, files.local(flags.out))
    head, *cells = table(rows)
    shown: Any = Table(*head)
    for line in cells:
        shown.add_row(*line)
    Console().print(shown)


def cli(args: Sequence[str] | None = None) -> int:
    """Parse flags, measure and return the exit code."""
    return exit_code(main, Flags, args)


if __name__ == "__main__":
    sys.exit(cli())

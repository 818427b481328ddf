"""`jaxlora cost`: show the cost of a train step."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Column, Table

from jaxlora.cli import cost_table
from jaxlora.cli.flags import call
from jaxlora.cli.terminal import CONSOLE, print_json
from jaxlora.lora import LoraConfig
from jaxlora.serving.task_models import Dtype
from jaxlora.utils.errors import UserError


def cost(
    *,
    variant: tuple[str, ...],
    base: tuple[str, ...] = ("bert-base",),
    mesh: tuple[str, ...] = ("data=1",),
    batch_size: int = 16,
    sentence_length: float = 20.0,
    row_length: int = 64,
    rank: int = 15,
    dtype: Dtype = "float32",
    flops: float | None = None,
    link: float | None = None,
    json: bool = False,
) -> None:
    """Show what a step will cost, without the devices: FLOPs, memory, traffic, time.

    All columns are counted except temporary, an estimate that is fitted to XLA's programs for CPU.

    Args:
      variant: one or more of the paper's variants.
      base: minilm, bert-base, bert-large, 1b, 3b, 10b, or Hugging Face folders.
      mesh: devices, as in `jaxlora train --mesh`.
      batch_size: examples of each task in a step.
      sentence_length: mean number of tokens per sentence.
      row_length: tokens per row, into which sentences are packed.
      rank: rank of the adapters.
      dtype: dtype of matmul inputs.
      flops: FLOP/s that a device reaches; adds the time of a step without overlap.
      link: bytes/s between devices.
      json: print JSON.
    """
    if rank < 1:
        raise UserError(f"--rank {rank}: must be above 0")
    head, *rows = cost_table.lines(
        base, variant, mesh, cost_table.check_rates(flops, link), batch_size=batch_size,
        sentence_length=sentence_length, row_length=row_length, dtype=dtype,
        adapter=LoraConfig(rank, float(rank)),
    )  # fmt: skip
    if json:
        print_json([dict(zip(head, row, strict=True)) for row in rows])
        return
    columns = (Column(name, overflow="fold") for name in map(str, head))
    table = Table(*columns, caption=cost_table.CAPTION, padding=0)
    for row in rows:
        table.add_row(*map(escape, cost_table.show(row)))
    CONSOLE.print(table)


def main(words: Sequence[str]) -> None:
    """Run `cost`."""
    call(cost, "jaxlora cost", words)

"""The table of `jaxlora cost`, with a line for each step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jaxlora.formats import huggingface
from jaxlora.nn.bert import EncoderConfig, param_shapes
from jaxlora.training import cost, sharding
from jaxlora.training.cost import Estimate
from jaxlora.utils import files
from jaxlora.utils.errors import UserError

HEAD = (
    "base", "variant", "mesh", "rows", "TFLOP", "weights", "moments", "temporary", "in all",
    "sent",
)  # fmt: skip
CAPTION = (
    "a step's TFLOP on all devices; GB on each device, and GB that each sends in a step. All are "
    "counted but temporary, which is an estimate, fitted to XLA's programs for CPU."
)
GIGA, TERA = 1e9, 1e12
Cell = str | int | float


def find_base(name: str) -> EncoderConfig:
    """Return the configuration of a base: one of `cost.SIZES`, or that of a Hugging Face folder.

    Raises:
      UserError: if the name is neither.
    """
    if name in cost.SIZES:
        return cost.SIZES[name]
    path = files.local(name) / "config.json"
    if not path.is_file():
        raise UserError(f"--base {name}: write {', '.join(cost.SIZES)}, or a folder's path")
    return huggingface.read_config(path)


def find_mesh(text: str) -> dict[str, int]:
    """Return the sizes of the mesh's axes, which need not be available here.

    Raises:
      UserError: see `sharding.sizes`; also for `auto`, which gives no number of devices.

    >>> find_mesh("data=4,fsdp=2")
    {'data': 4, 'fsdp': 2}
    """
    if text == "auto":
        raise UserError("--mesh auto: say how many devices there will be, e.g. data=8")
    return sharding.sizes(text, 2**31)


def cells(base: str, variant: str, found: Estimate) -> tuple[Cell, ...]:
    """Return a line of the table, in the order of `HEAD`."""
    work, memory = found.work, found.memory
    split = ",".join(f"{axis}={getattr(work, axis)}" for axis in sharding.AXES)
    weights = memory.frozen + memory.trained + memory.best
    sizes = (weights, memory.moments, memory.temporary, memory.total)
    sent = found.traffic.wire(work.devices)
    return (
        base, variant, split, work.rows, found.flops.total / TERA,
        *(size / GIGA for size in (*sizes, sent)),
    )  # fmt: skip


def lines(
    bases: Iterable[str],
    variants: Iterable[str],
    texts: Iterable[str],
    rates: tuple[float, float] | None = None,
    **asked: object,
) -> list[tuple[Cell, ...]]:
    """Return the table, header first: every base with every variant (and group) on every mesh.

    Args:
      bases: names of bases, see `find_base`.
      variants: names of variants.
      texts: meshes, see `find_mesh`.
      rates: FLOP/s and the link's bytes/s; if given, a column of seconds is added.
      asked: further arguments of `cost.for_variant`.

    Raises:
      UserError: see `find_base`, `find_mesh` and `cost.for_variant`; for a rank that does not fit.
    """
    chosen = {base: find_base(base) for base in bases}
    sizes = [find_mesh(text) for text in texts]
    table: list[tuple[Cell, ...]] = [HEAD if rates is None else (*HEAD, "seconds")]
    for base, config in chosen.items():
        for variant in variants:
            for size in sizes:
                works = cost.for_variant(variant, config, **asked, **size)  # type: ignore[arg-type]
                for group, work in works.items():
                    work.adaptation.check(param_shapes(work.config))
                    found = cost.estimate(work)
                    time = () if rates is None else (found.seconds(*rates),)
                    name = variant if len(works) == 1 else f"{variant} {group}"
                    table.append((*cells(base, name, found), *time))
    return table


def show(row: tuple[Cell, ...]) -> tuple[str, ...]:
    """Format a line; the seconds, after the columns of `HEAD`, have more digits.

    >>> show(("data=1", 12, 1234.567))
    ('data=1', '12', '1,234.57')
    """
    digits = [3 if number == len(HEAD) else 2 for number in range(len(row))]
    return tuple(
        f"{cell:,.{n}f}" if isinstance(cell, float) else str(cell)
        for cell, n in zip(row, digits, strict=True)
    )


def check_rates(flops: float | None, link: float | None) -> tuple[float, float] | None:
    """Return the rates for `lines`, checked; None without any.

    Raises:
      UserError: if a rate is not above 0, or only that of the link is given.
    """
    if flops is None and link is None:
        return None
    if flops is None or not flops > 0 or (link is not None and not link > 0):
        raise UserError("--flops and --link are rates above 0; --link goes with --flops")
    return flops, math.inf if link is None else link

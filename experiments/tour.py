"""Draw the figures of docs/tour.md from numbers that the library computes.

python experiments/tour.py --out docs
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import jaxlora
from jaxlora import lora
from jaxlora.aggregation import MEMBERS
from jaxlora.cli.curves import COLOURS
from jaxlora.cli.flags import exit_code
from jaxlora.lora import LoraConfig
from jaxlora.pcgrad import gram, project
from jaxlora.tasks import losses
from jaxlora.tasks.sharing import VARIANTS, Groups, Variant
from jaxlora.tasks.task import NAMES
from jaxlora.training import parameter_count
from jaxlora.utils import files

SIZE, RANK = 24, 3  # the kernel's size and the adapter's rank in the first figure
GREY = "#777777"
GREEN = "#E3F2E1"
CONFLICT = ((3.0, 1.0), (-1.2, 0.4))  # gradients whose sum makes the second task worse


@dataclasses.dataclass(frozen=True)
class Flags:
    """Draw the tour's figures.

    Attributes:
      out: folder for tour-lora.png, tour-pcgrad.png, tour-methods.png, tour-losses.png and
        tour-variants.png.
    """

    out: Path = Path("docs")


class Learnt(NamedTuple):
    """A kernel, the target change and the learned change, `f32[in, out]` each."""

    kernel: jax.Array
    wanted: jax.Array
    change: jax.Array


def learn(steps: int = 500) -> Learnt:
    """Train an adapter of rank `RANK` to reproduce a change of that rank to a frozen kernel."""
    keys = jax.random.split(jax.random.key(0), 5)
    kernel = jax.random.normal(keys[0], (SIZE, SIZE)) / SIZE**0.5
    left, right = (jax.random.normal(k, (SIZE, RANK)) for k in keys[1:3])
    wanted = left @ right.T / SIZE
    base, config = {"dense": {"kernel": kernel}}, LoraConfig(RANK, float(RANK), ("dense",))
    x = jax.random.normal(keys[3], (256, SIZE))
    adapter, tx = lora.init(keys[4], base, config), optax.adam(0.02)

    def loss(adapter: Any) -> jax.Array:
        merged = lora.merge(base, adapter, config)["dense"]["kernel"]
        return jnp.mean((x @ merged - x @ (kernel + wanted)) ** 2)

    @jax.jit
    def step(adapter: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(adapter), state)
        return optax.apply_updates(adapter, updates), state

    state = tx.init(adapter)
    for _ in range(steps):
        adapter, state = step(adapter, state)
    merged = lora.merge(base, adapter, config)["dense"]["kernel"]
    return Learnt(kernel, wanted, merged - kernel)


def draw_lora(figure: Any) -> None:
    """Draw W + A B = W', and the singular values of W and of A B."""
    found = learn()
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.4))
    added = found.kernel + found.change
    names = ("W: frozen", f"(α/r)·A B: learnt, rank {RANK}", "W' = W + (α/r)·A B")
    for axes, name, matrix in zip(panels, names, (found.kernel, found.change, added), strict=False):
        axes.imshow(np.asarray(matrix), cmap="RdBu", vmin=-0.7, vmax=0.7)
        axes.set(title=name, xticks=[], yticks=[])
    axes, number = panels[3], np.arange(1, SIZE + 1)
    for label, matrix, style in (
        ("W", found.kernel, "o-"), ("A B", found.change, "s-"),
        ("the change wanted", found.wanted, "k+"),
    ):  # fmt: skip
        axes.plot(number, np.linalg.svd(np.asarray(matrix), compute_uv=False), style, label=label)
    axes.set(title="singular values", xlabel="number", xlim=(0.5, 12.5))
    axes.grid(alpha=0.3)
    axes.legend()


class Surgery(NamedTuple):
    """Two gradients and their projections; rows are vectors."""

    gradients: np.ndarray
    projected: np.ndarray

    @property
    def sums(self) -> np.ndarray:
        """Sums of the gradients, and of the projected ones."""
        return np.stack([self.gradients.sum(0), self.projected.sum(0)])


def operate(first: Sequence[float], second: Sequence[float]) -> Surgery:
    """Project two gradients in the plane with PCGrad."""
    gradients = jnp.array([first, second])
    weights = project(gram({"w": gradients}), jnp.array([[1, 0], [0, 1]]))
    return Surgery(np.asarray(gradients), np.asarray(weights @ gradients))


def draw_pcgrad(figure: Any) -> None:
    """Draw a conflict, its projection and the sums, and two gradients that agree."""
    conflict, peace = operate((3.0, 1.0), (-1.5, 1.5)), operate((3.0, 1.0), (1.0, 2.0))
    panels = figure.subplots(1, 3)
    titles = (
        "a conflict: the angle is obtuse",
        "projected: what conflicts is taken away",
        "no conflict",
    )
    drawn = (
        (*conflict.gradients, conflict.sums[0], ("g₁", "g₂", "g₁ + g₂"), GREY),
        (*conflict.projected, conflict.sums[1], ("g₁'", "g₂'", "g₁' + g₂'"), "black"),
        (*peace.projected, peace.sums[1], ("g₁", "g₂", "g₁ + g₂"), "black"),
    )
    for axes, title, (*vectors, labels, colour) in zip(panels, titles, drawn, strict=True):
        colours = (COLOURS["sst"], COLOURS["para"], colour)
        for (x, y), label, own in zip(vectors, labels, colours, strict=True):
            arrow = {"arrowstyle": "-|>", "color": own, "lw": 2}
            axes.annotate("", (x, y), (0, 0), arrowprops=arrow)
            above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            axes.annotate(label, (x, y), color=own, **above)
        axes.set(title=title, xlim=(-2.2, 4.6), ylim=(-0.5, 4.4), aspect="equal")
        axes.grid(alpha=0.3)
    for before, after in zip(conflict.gradients, conflict.projected, strict=True):
        panels[1].plot(*zip(before, after, strict=True), ":", color=GREY)  # the removed component


def directions() -> dict[str, np.ndarray]:
    """Compute the unit vector along which each method of the Gram matrix moves for `CONFLICT`."""
    gradients, params = {"w": jnp.array(CONFLICT)}, {"w": jnp.zeros(2)}
    found = {}
    for name, member in MEMBERS.items():
        if member.make().needs_losses:
            continue
        tx = jaxlora.aggregate(name, num_tasks=2)
        updates, _ = tx.update(gradients, tx.init(params), params)
        vector = np.asarray(updates["w"])
        found[name] = vector / np.linalg.norm(vector)
    return found


def harmless() -> np.ndarray:
    """Return the two edges of the cone of directions that make no task worse, `[2, 2]`."""
    (a, b), (c, d) = CONFLICT
    edges = np.array([(-b, a), (d, -c)])  # each is normal to one gradient
    inward = np.sign((edges @ np.array(CONFLICT).T).sum(1, keepdims=True))
    return inward * edges / np.linalg.norm(edges, axis=1, keepdims=True)


def draw_methods(figure: Any) -> None:
    """Draw each method's direction for one conflict, and the directions that harm neither task."""
    found = directions()
    columns = 5
    panels = figure.subplots(-(-len(found) // columns), columns, squeeze=False).flat
    cone = np.stack([np.zeros(2), *(9 * harmless())])
    for axes, (name, vector) in zip(panels, found.items(), strict=False):
        axes.fill(*cone.T, color=GREEN)
        colours = (COLOURS["sst"], COLOURS["para"], "black")
        for (x, y), colour in zip(np.stack([*CONFLICT, 2 * vector]), colours, strict=True):
            arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2}
            axes.annotate("", (x, y), (0, 0), arrowprops=arrow)
        axes.set(
            title=name, xlim=(-1.6, 3.3), ylim=(-0.4, 2.4), aspect="equal", xticks=[], yticks=[]
        )
    for axes in list(panels)[len(found) :]:
        axes.axis("off")


def draw_losses(figure: Any) -> None:
    """Draw each loss against its input, for three labels."""
    scores, cosines = jnp.linspace(-1, 6, 141), jnp.linspace(-1, 1, 141)
    panels = figure.subplots(1, 2)
    shown: tuple[tuple[str, str, jax.Array, Callable[..., jax.Array]], ...] = (
        ("squared error: (score − y)²", "the head's score", scores, losses.squared_error),
        ("cosine: (cos(u, v) − y/5)²", "cos(u, v)", cosines, losses.cosine_error),
    )
    for axes, (title, unit, x, loss) in zip(panels, shown, strict=True):
        for label, colour in zip((0.0, 2.5, 5.0), COLOURS.values(), strict=True):
            axes.plot(x, loss(x, jnp.full_like(x, label)), color=colour, label=f"y = {label:g}")
        axes.set(title=title, xlabel=unit, ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[1].set_xticks((-1, -0.5, 0, 0.5, 1))


def trained_millions(found: Variant) -> float:
    """Count the parameters that a variant trains with bert-base, in millions."""
    return parameter_count.of_variant(found).incremental / 1e6


def draw_variants(figure: Any) -> None:
    """Draw one row per variant: which tasks share a tree, its kind, and its size."""
    axes = figure.subplots()
    what = {"frozen": "frozen", "lora": "adapter", "full": "whole BERT"}
    for row, found in enumerate(VARIANTS.values()):
        y = len(VARIANTS) - row
        axes.text(-0.15, y, found.name, ha="right", va="center", weight="bold")
        for left, width in spans(found.groups):
            filled = {"frozen": "white", "lora": "#FFF3C4", "full": "#FFD0B5"}[found.adapt]
            box = FancyBboxPatch(
                (left + 0.05, y - 0.32), width - 0.1, 0.64, facecolor=filled, edgecolor=GREY,
                boxstyle="round,pad=0,rounding_size=0.1",
                linestyle="--" if found.adapt == "frozen" else "-",
            )  # fmt: skip
            axes.add_patch(box)
        for column, name in enumerate(NAMES):
            axes.text(column + 0.5, y, name, ha="center", va="center")
        pcgrad_or_not = ", PCGrad" if len(found.groups) == 1 else ""
        text = (
            f"{what[found.adapt]}{pcgrad_or_not}; STS by {found.sts_loss}; "
            f"{trained_millions(found):,.1f}M trained"
        )
        axes.text(3.1, y, text, va="center")
    axes.set(xlim=(-1.0, 6.6), ylim=(0.4, len(VARIANTS) + 0.6))
    axes.axis("off")


def spans(groups: Groups) -> list[tuple[int, int]]:
    """Return the start and the width of each group's box, in tasks.

    >>> spans((("sst",), ("para", "sts")))
    [(0, 1), (1, 2)]
    """
    return [(NAMES.index(group[0]), len(group)) for group in groups]


FIGURES: dict[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
    "lora": (draw_lora, (12, 3.0)),
    "pcgrad": (draw_pcgrad, (12, 3.4)),
    "methods": (draw_methods, (12, 5.2)),
    "losses": (draw_losses, (9, 3.2)),
    "variants": (draw_variants, (9, 3.6)),
}


def main(flags: Flags) -> None:
    """Draw all figures."""
    folder = files.local(flags.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, size) in FIGURES.items():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(folder / f"tour-{name}.png", dpi=100)


def cli(args: Sequence[str] | None = None) -> int:
    """Parse flags, draw and return the exit code."""
    return exit_code(main, Flags, args)


if __name__ == "__main__":
    sys.exit(cli())

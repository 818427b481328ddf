"""Write RESULTS.md from the JSON files of the benchmarks: `python -m benchmarks.results`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tyro

from benchmarks import harness

HEAD = """# Measured speed

Written by `python -m benchmarks.results` from what `make bench` measured. Milliseconds are \
medians with (lowest–highest). All sides run in turn, ours in one process and the peers in \
another (for memory each in its own), on the same sentences from the same weights, with dropout; \
sentences are as long as the real ones (`lengths.json`). "× best peer" is the time of the \
fastest peer of a row over ours: above 1 we are faster. The peers: **padded-eager**, \
transformers + peft + torchjd, each task's batch padded; **sorted**, the same in sub-batches of \
similar lengths, with the faster one of MKL's and oneDNN's kernels; **flat**, by hand: one batch \
of all tasks without padding, one backward pass. In inference, **merged** has each task's \
adapter merged into a model of its own; the int8 model of ONNX Runtime is not compared, since its \
vectors differ. The floor is the time of the matmuls of the real tokens, each at the rate of \
its own shape, and of the fewest element-wise passes at the rate of a copy (for PCGrad alone: of \
its bytes). What was tried is in [LOG.md](LOG.md).
"""


def cell(value: Any) -> str:
    """Format a value for the tables."""
    if isinstance(value, dict):
        return str(harness.Spread(**{name: ms / 1e3 for name, ms in value.items()}))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def section(title: str, rows: list[dict[str, Any]]) -> str:
    """Format one benchmark as a Markdown table; a row may lack some columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(cell(row.get(c, '')) for c in columns)} |" for row in rows]
    return "\n".join(lines)


def in_order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the sort key of a row: variants as in the README, then batch, then float32 first."""
    variants = ("lora3", "lora1", "baseline2")
    variant = row.get("variant")
    number = variants.index(variant) if variant in variants else len(variants)
    return number, row.get("batch", 0), row.get("dtype") != "float32"


def sections(contents: list[dict[str, Any]]) -> list[str]:
    """Format all benchmarks; files with the same title become one table."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for content in contents:
        tables.setdefault(content["title"], []).extend(content["rows"])
    return [section(title, sorted(rows, key=in_order)) for title, rows in tables.items()]


def main(source: Path = harness.OUT, out: Path = Path(__file__).parent / "RESULTS.md") -> None:
    """Write the results of all benchmarks that have been run."""
    contents = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(source.glob("*.json"))]
    machine = contents[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = f"{machine['date']}; {machine['processor']}, {machine['cores']} cores, on the "
    where += f"{machine['device']}; Python {machine['python']}, {versions}."
    text = "\n\n".join([HEAD.strip(), where, *sections(contents)])
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)

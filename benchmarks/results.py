"""Write RESULTS.md from the JSON files of the benchmarks: `python -m benchmarks.results`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tyro

from benchmarks import harness

HEAD = """# Measured speed

Written by `python -m benchmarks.results` from what `make bench` measured. Milliseconds are \
medians with (lowest–highest); both sides run in turn, each in its own process, on the same \
sentences from the same weights, with dropout; both processes keep their freed memory. The peer's \
bfloat16 is autocast. "Floor" is the FLOPs of the real tokens at the \
matmul rate measured in the same run (for PCGrad the bytes at the copy rate). What was tried \
stands in [LOG.md](LOG.md).
"""


def cell(value: Any) -> str:
    """Format a value for the tables."""
    if isinstance(value, dict):
        return str(harness.Spread(**{name: ms / 1e3 for name, ms in value.items()}))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def section(content: dict[str, Any]) -> str:
    """Format one benchmark as a Markdown table."""
    columns = list(content["rows"][0])
    lines = [f"## {content['title']}", "", f"| {' | '.join(columns)} |"]
    lines.append("|" + "---|" * len(columns))
    lines += [f"| {' | '.join(map(cell, row.values()))} |" for row in content["rows"]]
    return "\n".join(lines)


def main(source: Path = harness.OUT, out: Path = Path(__file__).parent / "RESULTS.md") -> None:
    """Write all benchmarks that have been run."""
    contents = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(source.glob("*.json"))]
    machine = contents[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = f"{machine['date']}; {machine['processor']}, {machine['cores']} cores, on the "
    where += f"{machine['device']}; Python {machine['python']}, {versions}."
    text = "\n\n".join([HEAD.strip(), where, *map(section, contents)])
    out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)

"""`results.md`: the report's tables as Markdown, with everything needed to reproduce them."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.report import estimate, facts, tables
from experiments.report.claims import Context
from experiments.report.facts import Part
from experiments.report.tables import Table

HEAD = """# Results

Written by `{command}`. Scores are of the dev sets; the test predictions of every run are in its \
`predictions/` folder.
"""


def markdown(context: Context, parts: Sequence[Part], found: Sequence[Table], command: str) -> str:
    """Return the report as Markdown."""
    collection = context.collection
    sections = [
        HEAD.format(command=command).strip(),
        facts.headline(context),
        _list(f"**{part.title}**: {_counts(part)}. {part.sentence}" for part in parts),
        facts.chance([finding for part in parts for finding in part.findings]),
        context.data_note,
        *(
            [f"## What is missing\n\n{_list(lines)}"]
            if (lines := facts.missing(collection))
            else []
        ),
        *map(_table, found),
        f"## The paper's slips\n\n{_list(tables.footnotes())}",
        f"## How this was made\n\n{_list(f'{k}: {v}' for k, v in facts.about(collection).items())}",
        *_commands(context),
        not_run_here(context),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _counts(part: Part) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in part.counts.items())


def _list(lines: object) -> str:
    return "\n".join(f"- {line}" for line in lines)  # type: ignore[attr-defined]


def _table(table: Table) -> str:
    return f"## {table.title}\n\n{table.about}\n\n{rows(table)}"


def rows(table: Table) -> str:
    """Format a table, with numbers aligned to the right."""
    head = " | ".join(column.title for column in table.columns)
    marks = "|".join("---" if _is_text(table, n) else "---:" for n in range(len(table.columns)))
    body = [
        " | ".join(
            tables.show(value, column.digits).replace("|", "\\|")
            for value, column in zip(row, table.columns, strict=True)
        )
        for row in table.rows
    ]
    return "\n".join([f"| {head} |", f"|{marks}|", *(f"| {line} |" for line in body)])


def _is_text(table: Table, column: int) -> bool:
    return any(isinstance(row[column], str) for row in table.rows)


def _commands(context: Context) -> list[str]:
    commands = facts.commands(context.collection)
    if not commands:
        return []
    lines = "\n".join(commands.values())
    return [
        f"One run of each study (other seeds: `--seed` and another `--out`):\n\n```sh\n{lines}\n```"
    ]


def not_run_here(context: Context) -> str:
    """Describe the cost of the paper's setting; empty if it was run."""
    if any(run.settings["preset"] == estimate.PRESET for run in context.collection.runs):
        return ""
    found = estimate_table(context)
    text = (
        "## Not run here\n\nThe paper's own setting, bert-base on the full Quora set, was not run. "
        f"This does it:\n\n```sh\n{estimate.command(context.collection)}\n```"
    )
    return f"{text}\n\n{found.about}\n\n{rows(found)}" if found.rows else text


def estimate_table(context: Context) -> Table:
    """Build the table of costs."""
    found, how = estimate.costs(context.collection)
    columns = (
        tables.Column("variant", "variant"),
        tables.Column("paper_hours", "hours a seed, the paper's data", 1),
        tables.Column("official_hours", "hours a seed, official data", 1),
        tables.Column("gigabytes", "memory, GB", 1),
        tables.STATE,
    )
    cells = tuple(
        (c.variant, c.paper_hours, c.official_hours, c.gigabytes,
         context.collection.state(c.variant))
        for c in found
    )  # fmt: skip
    return Table(
        "not_run_here", "Not run here: estimated cost on this machine", how, columns, cells
    )

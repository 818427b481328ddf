"""Reproduce the paper and write the report: `python experiments/reproduce.py`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # `experiments` is not installed

from experiments import fleet, report, timing
from experiments.board import Board
from experiments.report.collect import PLAN
from experiments.report.files import read_plan
from experiments.runs import Inputs, Run, link, make_run, twins
from experiments.studies import EXTRAS, STUDIES, command, study
from jaxlora.cli.flags import exit_code
from jaxlora.cli.terminal import say
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.training import config, run_folder
from jaxlora.utils import files
from jaxlora.utils.errors import UserError

# Settings that can be chosen for all runs, unless a study fixes them.
SHARED = (
    "data_dir", "source", "base", "epochs", "max_steps", "batch_size", "eval_every", "max_length",
    "dtype",
)  # fmt: skip


def _shared_flags() -> type:
    """Make a dataclass of the settings `SHARED`, None by default, with the help of `config`."""
    fields, sections = [], typing.get_type_hints(config.Sections)
    for name in SHARED:
        section, field = config.flat_names(config.Sections)[name]
        kind, doc = sections[section], inspect.getdoc(sections[section]) or ""
        (about,) = re.findall(rf"^  {field}: (.*(?:\n    .*)*)", doc, re.MULTILINE)
        explained = tyro.conf.arg(help=" ".join(about.split()))
        optional: Any = Annotated[typing.get_type_hints(kind)[field] | None, explained]
        fields.append((name, optional, dataclasses.field(default=None)))
    return dataclasses.make_dataclass("SharedFlags", fields, frozen=True)


if TYPE_CHECKING:

    class SharedFlags:
        """Settings for all runs."""
else:
    SharedFlags = _shared_flags()


@dataclasses.dataclass(frozen=True)
class Flags:
    """Run every variant with every seed, except finished runs, then write the report.

    You can stop it with Ctrl-C at any time; the same command continues.

    Attributes:
      preset: demo: MiniLM and built-in synthetic data, for one epoch by default, so that all eight
        variants take minutes; cs224n: settings that train well on real data, in the folder
        --data-dir; paper: bert-base-uncased and the settings that the paper states; docs/paper.md
        lists those that are guessed.
      shared: settings for all runs, unless a study fixes them.
      variants: variants to run; names of extra studies (see --extras) are allowed, too.
      extras: also run questions that the paper left open: summed gradients, ranks, rates, …
      seeds: seeds of each variant; a verdict on scores needs two, "reproduced" three.
      jobs: number of concurrent runs.
      out: folder of all runs; default: runs/reproduce/<preset>.
      report: folder of the report.
      rebuild: only rewrite the report, from the runs in this folder.
      timing: finally also time the steps of this call's variants in turn, replacing earlier times;
        keep the machine otherwise idle.
    """

    preset: Literal["demo", "cs224n", "paper"] = "demo"
    shared: Annotated[SharedFlags, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SharedFlags
    )
    variants: tuple[str, ...] = tuple(VARIANTS)
    extras: bool = False
    seeds: tuple[int, ...] = (0,)
    jobs: int = 1
    out: Path | None = None
    report: Path = Path("report")
    rebuild: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    timing: bool = False

    @property
    def root(self) -> Path:
        """The folder of all runs."""
        return files.local(self.out or Path("runs") / "reproduce" / self.preset)

    def given(self) -> dict[str, Any]:
        """Return the shared settings that are given, and the demo's single epoch."""
        given = {name: value for name, value in vars(self.shared).items() if value is not None}
        return {"preset": self.preset, **({"epochs": 1} if self.preset == "demo" else {}), **given}


def chosen(flags: Flags) -> list[str]:
    """Return the names of the studies to run, without duplicates, in the order of `STUDIES`."""
    wanted = {study(name).name for name in flags.variants}
    if flags.extras:
        given = flags.given()
        real = given.get("source", flags.preset) != "demo" or "data_dir" in given
        wanted |= {name for name in EXTRAS if real or not STUDIES[name].real_data}
    return [name for name in STUDIES if name in wanted]


def make_runs(flags: Flags) -> list[Run]:
    """Resolve and check all runs; nothing is written.

    Raises:
      UserError: see `runs.make_run`; also without seeds or variants, or for too few jobs.
    """
    for name, values in (("--seeds", flags.seeds), ("--variants", flags.variants)):
        if not values:
            raise UserError(f"{name}: give at least one")
    if flags.jobs < 1:
        raise UserError(f"--jobs {flags.jobs}: must be at least 1")
    inputs = Inputs()
    return [
        make_run(
            STUDIES[name],
            STUDIES[name].asked(**flags.given(), seed=seed),
            flags.root,
            inputs,
        )
        for seed in dict.fromkeys(flags.seeds)  # every variant gets a seed before any gets a second
        for name in chosen(flags)
    ]


def write_plan(runs: Sequence[Run], flags: Flags) -> None:
    """Write `plan.json`: what was requested, in this call and in earlier ones.

    Raises:
      UserError: if the folder has runs of another preset.
    """
    path = flags.root / PLAN
    old = read_plan(path)
    if old.get("preset", flags.preset) != flags.preset:
        raise UserError(f"--out {flags.root}: holds runs of --preset={old['preset']}; name another")
    asked = {*old["studies"], *(run.study.name for run in runs)}
    commands = {
        run.study.name: command({**run.asked, "out": run.out})
        for run in reversed(runs)  # the first seed of each study is written last and stays
    }
    plan = {
        "preset": flags.preset,
        "studies": [name for name in STUDIES if name in asked],
        "seeds": sorted({*old["seeds"], *flags.seeds}),
        "commands": old["commands"] | commands,  # flags may differ from earlier ones
        "failed": old["failed"],
    }
    run_folder.write_json(path, plan)


def write_failures(runs: Sequence[Run], reasons: Mapping[Run, str], root: Path) -> None:
    """Record in `plan.json` which of a call's runs failed, and why, for the report."""
    plan = read_plan(root / PLAN)
    tried = {_place(run) for run in runs}
    others = {place: why for place, why in plan["failed"].items() if place not in tried}
    failed = others | {_place(run): why for run, why in reasons.items()}
    run_folder.write_json(root / PLAN, plan | {"failed": failed})


def _place(run: Run) -> str:
    return f"{run.study.name}/{run.out.name}"


def run_all(runs: Sequence[Run], jobs: int, console: Console) -> list[tuple[Run, int]]:
    """Run all unfinished runs; return those that failed, with their exit codes.

    Raises:
      Stopped: see `fleet.Fleet.run`.
    """
    same = twins(runs)
    own = [run for run in runs if run not in same]
    for run in own:
        if run.is_lost:
            run.out.unlink()
    board = Board(own, jobs, console)
    with board.live():
        ended = fleet.Fleet([run for run in own if not run.finished], jobs, board).run()
    for run, other in same.items():
        if other.finished:
            link(run, other)
            board.say(f"{run.name}: the same settings as {other.name}, and so its results")
    return [(run, code) for run, code in ended if code or not run.finished]


def main(flags: Flags) -> list[tuple[Run, int]]:
    """Run, measure and report; return the runs that failed."""
    # The children need the accelerator's memory; this process only reads settings and data.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console, failed, runs = Console(), [], []
    reasons: dict[Run, str] = {}
    root = files.local(flags.rebuild) if flags.rebuild else flags.root
    page = files.local(flags.report)
    if flags.rebuild is None:
        runs = make_runs(flags)
        write_plan(runs, flags)
        failed = run_all(runs, flags.jobs, console)
        reasons = {run: fleet.reason(run.log, code) for run, code in failed}
        write_failures(runs, reasons, root)
    elif not root.is_dir():
        raise UserError(f"--from {root}: is not a folder; name that of the runs")
    for run, why in reasons.items():
        print(f"failed: {run.name}: {why} ({run.log})", file=sys.stderr)
    say(f"The report: {report.build(root, page)}", console)
    finished = [run for run in runs if run.finished]
    if flags.timing and finished:  # after the first report, so that one exists if this fails
        timing.measure(finished, root / timing.FILE)
        say(f"The report with these times: {report.build(root, page)}", console)
    return failed


def cli(args: Sequence[str] | None = None) -> int:
    """Parse flags and run; return the exit code of `flags.exit_code`, or 1 if a run failed."""
    failed: list[tuple[Run, int]] = []
    code = exit_code(lambda flags: failed.extend(main(flags)), Flags, args)
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(cli())

"""Do what the paper did, and write the report: `python experiments/reproduce.py`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

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


@dataclasses.dataclass(frozen=True)
class Common:
    """Flags of `experiments/run.py` for all runs, where a study leaves them open.

    Attributes:
      preset: demo: MiniLM and built-in made-up data; cs224n: settings that train well on real data
        (needs --data-dir); paper: bert-base-uncased and the paper's settings, as far as it states
        them (docs/paper.md lists what is guessed).
      data_dir: folder with the tab-separated files of the CS224N default project.
      source: where the data comes from; cs224n if --data-dir is given, else the preset's.
      base: minilm, a local Hugging Face folder, or a hub id.
      epochs: passes over each group's largest training set; default: one in the demo, so that all
        eight variants take minutes, else the preset's.
      max_steps: train a group for so many steps at the most; the report marks runs that this cuts
        short, and draws no conclusion from them.
      batch_size: examples of each task in a step.
      eval_every: steps between evaluations and checkpoints.
      max_length: tokens a sentence is cut to, and the longest row.
      dtype: of matmul inputs.
    """

    preset: config.PresetName = "demo"
    data_dir: Path | None = None
    source: Literal["demo", "cs224n", "official"] | None = None
    base: str | None = None
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    eval_every: int | None = None
    max_length: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None

    def given(self) -> dict[str, Any]:
        """Those that are given, and the demo's single epoch."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Common)}
        default = {"epochs": 1} if self.preset == "demo" else {}
        return default | {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Flags(Common):
    """Run every variant with every seed that is not finished yet, then write the report.

    Stop it with Ctrl-C at any time: the same command goes on.

    Attributes:
      variants: which; the names of extra studies (see --extras) will do, too.
      extras: also run what the paper left open: summed gradients, ranks, learning rates, …
      seeds: a run of each variant with each; a verdict on scores takes two, "reproduced" three.
      jobs: runs at the same time.
      out: folder of all runs; default: runs/reproduce/<preset>.
      report: folder of the report.
      rebuild: only write the report anew, from the runs in this folder.
      timing: at the end also measure the steps of this call's variants in turn, instead of those
        measured before: keep the machine idle meanwhile.
    """

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


def chosen(flags: Flags) -> list[str]:
    """Names of the studies, each once, in the table's order."""
    wanted = {study(name).name for name in flags.variants}
    if flags.extras:
        real = flags.source != "demo" and (flags.preset != "demo" or flags.data_dir is not None)
        wanted |= {name for name in EXTRAS if real or not STUDIES[name].real_data}
    return [name for name in STUDIES if name in wanted]


def make_runs(flags: Flags) -> list[Run]:
    """All runs, resolved and checked; nothing is written.

    Raises:
      UserError: see `runs.make_run`.
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
        for seed in dict.fromkeys(flags.seeds)  # so that all variants have one before any has two
        for name in chosen(flags)
    ]


def write_plan(runs: Sequence[Run], flags: Flags) -> None:
    """`plan.json`: what was asked for, in this call and in earlier ones.

    Raises:
      UserError: if the folder holds the runs of another preset.
    """
    path = flags.root / PLAN
    old = read_plan(path)
    if old.get("preset", flags.preset) != flags.preset:
        raise UserError(f"--out {flags.root}: holds runs of --preset={old['preset']}; name another")
    asked = {*old["studies"], *(run.study.name for run in runs)}
    commands = {
        run.study.name: command({**run.asked, "out": run.out})
        for run in reversed(runs)  # so that each study's first seed stays
    }
    plan = {
        "preset": flags.preset,
        "studies": [name for name in STUDIES if name in asked],
        "seeds": sorted({*old["seeds"], *flags.seeds}),
        "commands": old["commands"] | commands,  # flags may be others than before
        "failed": old["failed"],
    }
    run_folder.write_json(path, plan)


def write_failures(runs: Sequence[Run], reasons: Mapping[Run, str], root: Path) -> None:
    """Add to `plan.json` which of a call's runs failed, and why, for the report to say."""
    plan = read_plan(root / PLAN)
    tried = {_place(run) for run in runs}
    others = {place: why for place, why in plan["failed"].items() if place not in tried}
    failed = others | {_place(run): why for run, why in reasons.items()}
    run_folder.write_json(root / PLAN, plan | {"failed": failed})


def _place(run: Run) -> str:
    return f"{run.study.name}/{run.out.name}"


def run_all(runs: Sequence[Run], jobs: int, console: Console) -> list[tuple[Run, int]]:
    """Run what is not finished; returns the runs that failed, with their exit codes.

    Raises:
      Stopped: see `fleet.Fleet.run`.
    """
    same = twins(runs)
    own = [run for run in runs if run not in same]
    for run in own:
        if run.out.is_symlink() and not run.out.exists():  # to a run that was deleted
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
    """Run, measure, report; returns the runs that failed."""
    # The children need the accelerator's memory; this process only looks at settings and data.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console, failed, runs = Console(), [], []
    reasons: dict[Run, str] = {}
    root = flags.rebuild or flags.root
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
    say(f"The report: {report.build(root, flags.report)}", console)
    finished = [run for run in runs if run.finished]
    if flags.timing and finished:  # after a report, so that there is one if this fails
        timing.measure(finished, root / timing.FILE)
        say(f"The report with these times: {report.build(root, flags.report)}", console)
    return failed


def cli(args: Sequence[str] | None = None) -> int:
    """Parse flags and run; returns the exit code, see `host.exit_code`; 1 if a run failed."""
    failed: list[tuple[Run, int]] = []
    code = exit_code(lambda: failed.extend(main(tyro.cli(Flags, args=args))))
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(cli())

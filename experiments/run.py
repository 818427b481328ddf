"""Train and evaluate one variant: `python experiments/run.py --variant=lora3`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from jaxlora import cluster, folders, host, report, rundir, settings, train


def main(flags: settings.Flags) -> None:
    """Join the other processes, if there are any, and run what the flags ask for."""
    cluster.join(flags.coordinator, flags.processes, flags.process)
    with cluster.together():
        _main(flags)


def _main(flags: settings.Flags) -> None:
    host.reuse_memory()
    host.keep_programs(rundir.cache_dir() / "xla")
    console = Console(quiet=not cluster.first())
    listener = report.ConsoleListener(console)
    out = folders.local(flags.out or Path("runs") / flags.variant)
    with listener.live():
        result = train.run(
            settings.resolve(flags),
            out,
            listener,
            resume=flags.resume,
            predict_test=flags.predict_test,
            mesh=flags.mesh,
            skip_nonfinite=flags.skip_nonfinite,
            base_sha256=flags.base_sha256,
            strict=flags.strict,
        )
    console.print(report.result_table(result))
    for line in report.notes(result):
        console.print(f"  {line}")
    report.say(console, f"Everything is in {out}; use it with jaxlora.load({str(out)!r}).")


def cli(args: Sequence[str] | None = None) -> int:
    """Parse flags and run; returns the exit code, see `host.exit_code`."""
    return host.exit_code(lambda: main(tyro.cli(settings.Flags, args=args)))


if __name__ == "__main__":
    sys.exit(cli())

"""The command `jaxlora train`: train and evaluate one variant."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from jaxlora.cli import console as report
from jaxlora.cli import curves
from jaxlora.training import config, run_folder
from jaxlora.training import run as training
from jaxlora.utils import cache, distributed, files, process


def train(flags: config.Flags) -> None:
    """Join the other processes, if there are any, and run what the flags ask for."""
    distributed.join(flags.coordinator, flags.processes, flags.process)
    with distributed.together():
        _train(flags)


def _train(flags: config.Flags) -> None:
    process.reuse_memory()
    process.keep_programs(cache.cache_dir() / "xla")
    console = Console(quiet=not distributed.is_primary())
    callback = report.ConsoleCallback(console)
    out = files.local(flags.out or Path("runs") / flags.variant)
    settings = config.resolve(flags)
    with callback.live():
        result = training.run(
            settings,
            out,
            callback,
            resume=flags.resume,
            predict_test=flags.predict_test,
            mesh=flags.mesh,
            skip_nonfinite=flags.skip_nonfinite,
            base_sha256=flags.base_sha256,
            strict=flags.strict,
        )
    if distributed.is_primary():
        curves.draw(run_folder.read_records(out), out / "curves.png", settings.title)
    console.print(report.result_table(result))
    for line in report.notes(result):
        console.print(f"  {line}")
    report.say(console, f"Everything is in {out}; use it with jaxlora.load({str(out)!r}).")

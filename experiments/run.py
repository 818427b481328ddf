"""Train and evaluate one variant: `python experiments/run.py --variant=lora3`."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import tyro
from rich.console import Console

from jaxlora import report, rundir, settings, train
from jaxlora.errors import UserError


def main(flags: settings.Flags) -> None:
    """Run what the flags ask for."""
    use_compilation_cache()
    console = Console()
    listener = report.ConsoleListener(console)
    out = flags.out or Path("runs") / flags.variant
    with listener.live():
        result = train.run(
            settings.resolve(flags), out, listener,
            resume=flags.resume, predict_test=flags.predict_test,
        )  # fmt: skip
    console.print(report.result_table(result))
    console.print(f"Everything is in {out}; use it with jaxlora.load({str(out)!r}).")


def use_compilation_cache() -> None:
    """Keep compiled programs between runs."""
    jax.config.update("jax_compilation_cache_dir", str(rundir.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    try:
        main(tyro.cli(settings.Flags))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

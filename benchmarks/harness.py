"""Timing: run the sides (ours and the peers) in turn, and write a table and a JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxlora.serving.task_models import Dtype
from jaxlora.utils import cache
from jaxlora.utils import process as host

OUT = Path("runs/bench")
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "torchjd",
    "sentence-transformers", "onnxruntime",
)  # fmt: skip
FEWEST_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds of repeated runs."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Compute the spread of some measurements."""
        return cls(min(seconds), statistics.median(seconds), max(seconds))

    def per(self, count: float) -> Spread:
        """Return the spread per item, for runs of `count` items each."""
        return Spread(self.low / count, self.median / count, self.high / count)

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} ({1e3 * self.low:.1f}–{1e3 * self.high:.1f})"


K = TypeVar("K", bound=Hashable)


def interleave(
    sides: Mapping[K, Callable[[], object]],
    rounds: int,
    warmups: int = 1,
    most_seconds: float = math.inf,
) -> dict[K, Spread]:
    """Time calls of the sides in turn, A B A B …; the first `warmups` rounds are not counted.

    Each side must wait for its own results and leave no work running. After `most_seconds` no
    further round begins, except to reach `FEWEST_ROUNDS`.
    """
    seconds: dict[K, list[float]] = {name: [] for name in sides}
    start = time.perf_counter()
    for number in range(warmups + rounds):
        enough = number >= warmups + FEWEST_ROUNDS
        if enough and time.perf_counter() - start > most_seconds:
            break
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - began)
    return {name: Spread.of(all_runs[warmups:]) for name, all_runs in seconds.items()}


class Worker:
    """A side in its own process, isolated from other sides' threads and freed memory.

    It starts in the background, so that several can start concurrently. The first call waits until
    it is ready, and must not be timed.

    Args:
      factory: module-level function that returns the side, a function.
      *args: arguments of the factory.
      keep_memory: whether the process keeps freed memory, as jaxlora does in training.
    """

    def __init__(
        self, factory: Callable[..., Callable[..., Any]], *args: Any, keep_memory: bool = True
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(end, factory, args, keep_memory), daemon=True
        )
        self._process.start()
        end.close()
        self._ready = False

    def __call__(self, *args: Any) -> Any:
        """Call the side and wait for its result.

        Raises:
          EOFError: if its process has died.
        """
        if not self._ready:
            self._ready = self._pipe.recv() == "ready"
        self._pipe.send(args)
        return self._pipe.recv()

    def send(self, *args: Any) -> None:
        """Call the side without waiting for its result. It need not be ready."""
        self._pipe.send(args)

    def finished(self, seconds: float) -> bool:
        """Wait up to `seconds` for the result of `send`; return whether it came."""
        until = time.monotonic() + seconds
        try:
            while self._pipe.poll(max(0.0, until - time.monotonic())):
                if self._ready:
                    self._pipe.recv()
                    return True
                self._ready = self._pipe.recv() == "ready"
        except (EOFError, OSError):
            pass
        return False

    def close(self) -> None:
        """End the process and wait for it."""
        self._pipe.close()
        self._process.join()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self.close()


def _serve(
    pipe: Any, factory: Callable[..., Callable[..., Any]], args: tuple[Any, ...], keep_memory: bool
) -> None:
    if keep_memory:
        host.reuse_memory()
    host.keep_programs(cache.cache_dir() / "xla")
    side = factory(*args)
    pipe.send("ready")
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(side(*arguments))


def environment() -> dict[str, str]:
    """Return the environment of a process that is to use no cache of programs but its own."""
    own = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return own | {"PYTHONPATH": os.getcwd()}


def matmul_rate(shape: tuple[int, int, int], dtype: Any) -> float:
    """Measure the best FLOP/s of a matmul `[m, k] [k, n]`, accumulated in float32."""
    m, k, n = shape
    a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    spread = interleave({"": lambda: multiply(a, b).block_until_ready()}, 30, 3)[""]
    return 2 * m * k * n / spread.low


def copy_rate(size: int = 1 << 28) -> float:
    """Measure the bytes per second that a copy reads and writes in total."""
    host.reuse_memory()  # else this measures the kernel's page faults
    x = jnp.zeros(size // 4)
    copied = jax.jit(lambda x: x + 1)
    return 2 * size / interleave({"": lambda: copied(x).block_until_ready()}, 9, 2)[""].low


def read_rate(size: int = 1 << 29) -> float:
    """Measure the bytes per second that a read-only pass reads."""
    x = jnp.ones(size // 4)
    summed = jax.jit(jnp.sum)
    return size / interleave({"": lambda: summed(x).block_until_ready()}, 9, 2)[""].low


def peak_megabytes(status: str) -> float:
    r"""Return the peak resident memory in MB by the content of `/proc/PID/status`.

    It is that of the program alone; `ru_maxrss` begins with that of the process that started it.

    >>> peak_megabytes("VmPeak:\t 9000 kB\nVmHWM:\t 1000 kB\n")
    1.024
    """
    (peak,) = re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return int(peak) * 1024 / 1e6


def against_best(spreads: Mapping[str, Spread]) -> dict[str, Any]:
    """Compare the side `ours` with the best peer.

    >>> spreads = {"ours": Spread(1, 2, 3), "a": Spread(4, 5, 6), "b": Spread(2, 3, 9)}
    >>> against_best(spreads)["best peer"], against_best(spreads)["× best peer"]
    ('b', 1.5)
    """
    ours = spreads["ours"]
    best = min(spreads.keys() - {"ours"}, key=lambda name: spreads[name].median)
    return {
        "ours ms": ours,
        "best peer": best,
        "best peer ms": spreads[best],
        "× best peer": spreads[best].median / ours.median,
    }


def peer_device() -> str:
    """Return the torch device for the peers, on the same hardware as JAX's default backend."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def dtypes() -> tuple[Dtype, ...]:
    """Return the dtypes to measure: bfloat16 only where the hardware multiplies it.

    On a processor without such instructions a step of the fastest peer took thirty times as long
    as in float32.
    """
    known = Path("/proc/cpuinfo")
    if jax.default_backend() == "cpu" and known.exists() and not multiplies_bfloat16(known):
        return ("float32",)
    return ("float32", "bfloat16")


def multiplies_bfloat16(cpuinfo: Path) -> bool:
    """Return whether a processor has instructions for matmuls in bfloat16, by `/proc/cpuinfo`."""
    flags = set(cpuinfo.read_text(encoding="utf-8").split())
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})  # the last on Arm


def machine() -> dict[str, Any]:
    """Describe the machine and the package versions, for the header of a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": found,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def is_done(name: str, out: Path = OUT) -> bool:
    """Return whether `out/name.json` was measured on this machine with these versions."""
    path = out / f"{name}.json"
    if not path.exists():
        return False
    now, then = machine(), json.loads(path.read_text(encoding="utf-8"))["machine"]
    return all(now[key] == then[key] for key in ("device", "processor", "cores", "versions"))


def show(name: str, title: str, rows: Sequence[Mapping[str, Any]], out: Path = OUT) -> None:
    """Print rows as a table, and write them and the machine to `out/name.json`."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(_shown, row.values()))
    Console(width=None if os.isatty(1) else 140).print(table)
    out.mkdir(parents=True, exist_ok=True)
    plain = [{k: _plain(v) for k, v in row.items()} for row in rows]
    content = {"title": title, "machine": machine(), "rows": plain}
    (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Convert spreads to milliseconds, for the table and the file."""
    if not isinstance(value, Spread):
        return value
    return {name: 1e3 * seconds for name, seconds in dataclasses.asdict(value).items()}

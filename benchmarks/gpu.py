"""Run the benchmarks on a GPU, at the sizes of MiniLM and bert-base: `python -m benchmarks.gpu`.

Weights are random, which does not change the time, so nothing is downloaded. All sides of all step
rows compile at the same time, each in its own process; then they are timed in turn. They share the
GPU's memory, so choose `--sizes` and `--batch-sizes` that fit together.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from benchmarks import adapters, harness, memory, pcgrad, predict, start, step
from benchmarks.work import Work
from jaxlora.formats import families, huggingface
from jaxlora.nn import bert
from jaxlora.training import run_folder

Part = Literal["step", "pcgrad", "predict", "adapters", "start", "memory"]
Size = Literal["minilm", "bert-base"]
SIZES: Mapping[Size, bert.BertConfig] = {
    "minilm": bert.BertConfig(num_hidden_layers=6, hidden_size=384, intermediate_size=1536),
    "bert-base": bert.BertConfig(),
}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# A graph is captured for each shape of a batch, which pays for small batches only.
SMALL_ONLY: tuple[step.PeerName, ...] = ("padded-graphs",)
PEERS: tuple[step.PeerName, ...] = (
    "padded-eager", "flat", "flat-compile", "padded-compile", *SMALL_ONLY
)  # fmt: skip
SMALL = 8
OURS = "ours"
TOGETHER = "ours in one program"  # with batches that are on the device, so it has less to do


@dataclasses.dataclass(frozen=True)
class Flags:
    """Run the benchmarks on a GPU, and write their JSON files to `out`.

    Attributes:
      parts: benchmarks to run; all but `step` at the last of `sizes`.
      sizes: sizes of the random BERT.
      batch_sizes: batch sizes of the train steps.
      steps: number of steps in a timed call.
      rounds: number of timed calls of each side.
      compile_seconds: seconds for all sides to compile; a side that takes longer is left out.
      out: folder of the JSON files.
    """

    parts: tuple[Part, ...] = ("step", "pcgrad", "predict", "adapters", "start", "memory")
    sizes: tuple[Size, ...] = ("minilm", "bert-base")
    batch_sizes: tuple[int, ...] = (8, 64, 256)
    steps: int = 8
    rounds: int = 5
    compile_seconds: float = 600.0
    out: Path = harness.OUT


@dataclasses.dataclass
class Row:
    """The sides of one row of the table, each in its own process, compiling in the background."""

    size: Size
    work: Work
    steps: int
    sides: dict[str, harness.Worker]

    @property
    def complete(self) -> bool:
        """Whether there is something to compare: a side of ours and a peer."""
        return OURS in self.sides and not {*self.sides}.isdisjoint(PEERS)

    @classmethod
    def start(cls, size: Size, base: str, work: Work, steps: int) -> Row:
        """Start all sides, and their first call."""
        sides = {
            OURS: harness.Worker(step.make_ours, work, base),
            TOGETHER: harness.Worker(step.make_ours, work, base, steps),
        }
        names = [name for name in PEERS if work.batch_size <= SMALL or name not in SMALL_ONLY]
        device = harness.peer_device()
        sides |= {name: harness.Worker(make_peer, name, work, base, device) for name in names}
        for worker in sides.values():
            worker.send(steps)
        return cls(size, work, steps, sides)

    def wait(self, until: float) -> None:
        """Wait for the first calls; drop the sides that failed or are late."""
        late = [s for s, w in self.sides.items() if not w.finished(until - time.monotonic())]
        for name in late:
            print(f"{self.size}, batch {self.work.batch_size}: without {name}")
            self.sides.pop(name).kill()

    def measure(self, rounds: int) -> dict[str, Any]:
        """Time the sides in turn."""
        calls = {name: functools.partial(worker, self.steps) for name, worker in self.sides.items()}
        spreads = {
            name: spread.per(self.steps)
            for name, spread in harness.interleave(calls, rounds, 1).items()
        }
        together = spreads.pop(TOGETHER, None)
        return {
            "size": self.size,
            "batch": self.work.batch_size,
            **harness.against_best(spreads),
            f"{TOGETHER} ms": together or "–",
            **{f"{name} ms": spread for name, spread in spreads.items() if name != OURS},
        }


def make_peer(name: step.PeerName, work: Work, base: str, device: str) -> Callable[[int], Any]:
    """Build a peer; JAX, which only makes its parameters, stays off the GPU."""
    jax.config.update("jax_platforms", "cpu")
    return step.make_peer(name, work, base, device)


def measure_steps(bases: Mapping[Size, str], flags: Flags) -> None:
    """Measure lora3's step in bfloat16 for all sizes and batch sizes."""
    until = time.monotonic() + flags.compile_seconds
    rows = [
        Row.start(size, base, Work("lora3", batch, "bfloat16"), flags.steps)
        for batch in flags.batch_sizes
        for size, base in bases.items()
    ]
    for row in rows:
        row.wait(until)
    for row in rows:
        if row.complete:
            try:
                show_row(row, flags)
            except (EOFError, OSError):
                print(f"{row.size}, batch {row.work.batch_size}: a process died")
        for worker in row.sides.values():
            worker.kill()


def show_row(row: Row, flags: Flags) -> None:
    """Measure a row; print and write it."""
    title = "A step of lora3 in bfloat16 (ms: median, low–high)"
    name = f"gpu-step-{row.size}-{row.work.batch_size}"
    harness.show(name, title, [row.measure(flags.rounds)], flags.out)


def write_random_base(folder: Path, config: bert.BertConfig) -> str:
    """Write a Hugging Face folder with random weights, and return its path."""
    leaves, structure = jax.tree.flatten(bert.param_shapes(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = jax.tree.unflatten(
        structure,
        [0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = huggingface.export(params, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = families.of(config).read_fields
    about = {theirs: getattr(config, ours) for ours, theirs in fields.items()}
    run_folder.write_json(folder / "config.json", {"model_type": config.model_type} | about)
    words = [*WORDS, *(f"w{n}" for n in range(config.vocab_size - len(WORDS)))]
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def main(flags: Flags) -> None:
    """Run all benchmarks."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # many processes share the GPU
    bases = {
        size: write_random_base(flags.out / f"random-{size}", SIZES[size]) for size in flags.sizes
    }
    base = bases[flags.sizes[-1]]
    run: dict[Part, Callable[[], Any]] = {
        "step": lambda: measure_steps(bases, flags),
        "pcgrad": lambda: pcgrad.main(pcgrad.Flags(out=flags.out)),
        "predict": lambda: predict.main(predict.Flags(base=base, out=flags.out)),
        "adapters": lambda: adapters.main(
            adapters.Flags(base=base, tasks=(1, 8, 64, 512), banks=(10,), out=flags.out)
        ),
        "start": lambda: start.main(start.Flags(base=base, variants=("lora3",), out=flags.out)),
        "memory": lambda: memory.main(memory.Flags(base=base, out=flags.out)),
    }
    for part in flags.parts:
        run[part]()


if __name__ == "__main__":
    main(tyro.cli(Flags))

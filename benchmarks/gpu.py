"""Run the benchmarks on an accelerator, at the size of bert-base: `python -m benchmarks.gpu`.

Weights are random, which does not change the time, so nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from benchmarks import adapters, harness, memory, pcgrad, predict, start, step
from jaxlora.formats import families, huggingface
from jaxlora.nn import bert
from jaxlora.training import run_folder

Part = Literal["step", "pcgrad", "predict", "adapters", "start", "memory"]
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Run the benchmarks on a GPU, and write their JSON files to `out`.

    Attributes:
      parts: benchmarks to run.
      layers: number of layers of the random BERT; bert-base has 12.
      batch_sizes: batch sizes of the train steps.
      together: number of steps in one program.
      rounds: number of timed runs of each side.
      out: folder of the JSON files.
    """

    parts: tuple[Part, ...] = ("step", "pcgrad", "predict", "adapters", "start", "memory")
    layers: int = 12
    batch_sizes: tuple[int, ...] = (8, 64, 256)
    together: int = 8
    rounds: int = 5
    out: Path = harness.OUT


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
    config = dataclasses.replace(bert.BertConfig(), num_hidden_layers=flags.layers)
    base = write_random_base(flags.out / "random-base", config)
    others: dict[str, Callable[[], Any]] = {
        "pcgrad": lambda: pcgrad.main(pcgrad.Flags(out=flags.out)),
        "predict": lambda: predict.main(predict.Flags(base=base, out=flags.out)),
        "adapters": lambda: adapters.main(
            adapters.Flags(base=base, tasks=(1, 8, 64, 512), banks=(10,), out=flags.out)
        ),
        "start": lambda: start.main(start.Flags(base=base, variants=("lora3",), out=flags.out)),
        "memory": lambda: memory.main(memory.Flags(base=base, out=flags.out)),
    }
    for size in flags.batch_sizes if "step" in flags.parts else ():
        step.main(
            step.Flags(
                base=base, variants=("lora3",), batch_sizes=(size,), dtypes=("bfloat16",),
                peers=tuple(step.PEERS), together=flags.together,
                rounds=flags.rounds, steps=8, name=f"gpu-step-{size}", out=flags.out,
            )
        )  # fmt: skip
    for part, run in others.items():
        if part in flags.parts:
            run()


if __name__ == "__main__":
    main(tyro.cli(Flags))

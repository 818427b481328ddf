"""Estimate of the cost of the paper's setting (bert-base, all of Quora) from measured runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from experiments import storage
from experiments.report.collect import Collection, Run
from jaxlora.nn import bert
from jaxlora.tasks.sharing import VARIANTS, group_name
from jaxlora.tasks.task import NAMES
from jaxlora.training.config import LoopConfig
from jaxlora.training.presets import paper
from jaxlora.utils import trees

PRESET = "paper"
COMMAND = "python experiments/reproduce.py --preset=paper"
BASE = "minilm"  # the base whose runs are extrapolated
# Training examples: the paper's, and those of --source=official, which that command downloads.
PAPER_DATA = {"sst": 8_544, "para": 141_000, "sts": 6_040}
OFFICIAL_DATA = {"sst": 8_544, "para": 363_849, "sts": 5_749}
BENCH = Path(__file__).parents[2] / "benchmarks" / "RESULTS.md"
BENCHED = {"frozen": "lora3", "lora": "lora3", "full": "baseline2"}
HOW = (
    "Hours: this root's own seconds a step, by group, × {flops:.1f} (matmul parameters of "
    "bert-base's layers over MiniLM's) × {batch} / batch (as many examples fewer a step) × the "
    "steps of {epochs} epochs at batch {batch}: over the paper's data (8,544 SST-5, 141,000 "
    "Quora and 6,040 STS-B examples), and over the official releases that this command "
    "downloads (8,544, 363,849 and 5,749). For baseline1 that leaves out encoding everything "
    "once. Memory: the base in float32, and what the bench measured that training steps add at "
    "batch 8 (MiniLM, lora3 or baseline2, see benchmarks/RESULTS.md) × {activations:.1f} "
    "(layers × width) with a frozen base or × {parameters:.1f} (parameters) where all weights "
    "are trained."
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one seed of a variant: hours with either data set, and peak memory."""

    variant: str
    paper_hours: float
    official_hours: float
    gigabytes: float | None


def costs(collection: Collection) -> tuple[list[Cost], str]:
    """Estimate the cost of each variant with a finished MiniLM run, and describe how."""
    small, large = storage.BASES["MiniLM"], bert.BertConfig()
    preset = paper(VARIANTS["lora3"]).loop  # the same for all
    flops = _layers(large) / _layers(small)
    wide = large.num_hidden_layers * large.hidden_size
    activations = wide / (small.num_hidden_layers * small.hidden_size)
    sizes = {name: _parameters(config) for name, config in (("small", small), ("large", large))}
    parameters = sizes["large"] / sizes["small"]
    peaks = bench_peaks(BENCH.read_text(encoding="utf-8")) if BENCH.exists() else {}
    found = []
    for name, runs in collection.variants.items():
        run = runs[0]
        if run.settings["base"] != BASE or set(run.result["dev"]) != set(NAMES):
            continue
        factor = flops * preset.batch_size / run.settings["batch_size"] / 3600
        hours = [factor * _seconds(run, preset, data) for data in (PAPER_DATA, OFFICIAL_DATA)]
        adapt = VARIANTS[name].adapt
        added = peaks.get(BENCHED[adapt])
        more = parameters if adapt == "full" else activations
        memory = None if added is None else (4 * sizes["large"] + 1e6 * added * more) / 1e9
        found.append(Cost(name, hours[0], hours[1], memory))
    how = HOW.format(
        flops=flops, batch=preset.batch_size, epochs=preset.epochs,
        activations=activations, parameters=parameters,
    )  # fmt: skip
    return found, how


def command(collection: Collection) -> str:
    """Return the command, with the dtype in which the hours were measured."""
    dtypes = {runs[0].settings["dtype"] for runs in collection.variants.values()}
    return f"{COMMAND} --dtype={dtypes.pop()}" if len(dtypes) == 1 else COMMAND


def bench_peaks(text: str, batch: int = 8) -> dict[str, float]:
    """Read the MB that train steps add, by variant, from the benchmark's table.

    >>> bench_peaks("| lora3 | 8 | 1452 | flat | 751 | 1.93 |")
    {'lora3': 1452.0}
    """
    rows = re.findall(rf"^\| (\w+) \| {batch} \| (\d+) \|", text, re.M)
    return {variant: float(peak) for variant, peak in rows}


def _layers(config: bert.BertConfig) -> int:
    """Count the parameters of the layers' matmuls; each takes two FLOPs per token."""
    h = config.hidden_size
    return config.num_hidden_layers * (4 * h * h + 2 * h * config.intermediate_size)


def _parameters(config: bert.BertConfig) -> int:
    return trees.count(bert.param_shapes(config))


def _seconds(run: Run, preset: LoopConfig, data: Mapping[str, int]) -> float:
    """Extrapolate a run's seconds per step, by group, to the preset's steps on some data."""
    seconds = 0.0
    for group in run.settings["groups"]:
        progress = run.result["groups"][group_name(group)]
        longest = max(data[task] for task in group)
        steps = preset.epochs * -(-longest // preset.batch_size)
        seconds += steps * progress["seconds"] / progress["step"]
    return seconds

"""A root of runs written by hand: round scores and counts, so that a report's answers are known.

Every task has `EXAMPLES` dev examples. A classifier is right on the first ones; an STS prediction
mixes the labels with a pattern orthogonal to them, so that Pearson's r is exactly what it is
meant to be.
"""

import csv
import dataclasses
import json

import numpy as np

from experiments.report import claims, scores, times
from experiments.report.collect import collect
from jaxlora.tasks.sharing import VARIANTS

EXAMPLES, RESAMPLES = 20, 400
TASKS = ("sst", "para", "sts")
SEEDS = (0, 1)
VERSIONS = {"jax": "9.8.7", "flax": "6.5.4"}
BASE, TREE, HEAD = 22_000_000, 400_000, 200_000  # parameters: encoder, adapter, one head
SIGNAL, NOISE = np.tile([[1, 1, -1, -1], [1, -1, 1, -1]], EXAMPLES // 4)  # orthogonal


@dataclasses.dataclass(frozen=True)
class Answers:
    """How many classes each seed gets right, its r, and its seconds to the best dev score."""

    sst: tuple[int, int]
    para: tuple[int, int]
    r: float
    best: tuple[float, float] = (5.0, 5.0)


ANSWERS = {
    "baseline1": Answers((8, 8), (14, 14), 0.6),
    "baseline2": Answers((10, 10), (16, 16), 0.8),
    "baseline3": Answers((10, 12), (16, 16), 0.8),
    "baseline4": Answers((12, 12), (16, 16), 1.0, best=(10.0, 12.0)),
    "lora1": Answers((10, 10), (16, 16), 0.6),
    "lora2": Answers((12, 12), (15, 15), 0.96, best=(6.0, 8.0)),
    "lora3": Answers((10, 11), (16, 16), 0.8),
    "lora3-summed": Answers((10, 11), (16, 16), 0.8),
}
PLAN = {
    "preset": "cs224n",
    "studies": [*VARIANTS, "lora3-summed"],
    "seeds": list(SEEDS),
    "commands": {"lora2": "python experiments/run.py --variant=lora2 --epochs=7"},
}
TIMING = {
    "machine": {"cpu": "two cores of nothing"},
    "studies": {
        "lora2": {"ms_per_step": {"low": 80.0, "median": 90.0, "high": 99.0}, "steps": 20},
        "baseline4": {"ms_per_step": {"low": 100.0, "median": 100.0, "high": 125.0}, "steps": 60},
    },
}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_root(root):
    """Seven variants and an extra finished with two seeds; of lora4 one seed is begun."""
    write_json(root / "plan.json", PLAN)
    write_json(root / "timing.json", TIMING)
    for study, answers in ANSWERS.items():
        for seed in SEEDS:
            write_run(root, study, seed, answers)
    begin(root / "lora4" / "seed0", "lora4", 0)
    return root


def write_run(root, study, seed, answers, skipped=0, **settings):
    """A finished run; `settings` are others than usual."""
    folder = root / study / f"seed{seed}"
    variant = VARIANTS[study.removesuffix("-summed")]
    surgery = "none" if study.endswith("-summed") else "pcgrad"
    begin(folder, variant.name, seed, surgery, **settings)
    right = {"sst": answers.sst[seed % 2], "para": answers.para[seed % 2]}
    for task, classes in (("sst", 5), ("para", 2)):
        write_classes(folder / "predictions" / f"{task}-dev.csv", right[task], classes)
    write_similarities(folder / "predictions" / "sts-dev.csv", answers.r)
    dev = {task: count / EXAMPLES for task, count in right.items()} | {"sts": answers.r}
    counted = parameters(variant)
    groups = ["+".join(group) for group in variant.groups]
    write_json(folder / "result.json", {
        "variant": variant.name, "dev": dev, "dev_mean": sum(dev.values()) / 3,
        "parameters": counted, "train_seconds": 20.0 + 2 * seed,
        "groups": {
            name: {"step": 20, "seconds": 6.0, "best_step": 20, "skipped": skipped,
                   "best_seconds": answers.best[seed % 2] / len(groups)}
            for name in groups
        },
    })  # fmt: skip
    model = folder / "model" / "d" / "arrays"
    model.parent.mkdir(parents=True, exist_ok=True)
    with model.open("wb") as file:  # a file of four bytes a number, without taking that room
        file.truncate(4 * counted["incremental"])


def begin(folder, variant, seed, surgery="pcgrad", **more):
    """A run with a few steps behind it and no result; `more` are other settings."""
    row = VARIANTS[variant]
    settings = {
        "variant": variant, "adapt": row.adapt, "groups": row.groups, "preset": "cs224n",
        "source": "cs224n", "base": "minilm", "dtype": "float32", "learning_rate": 2e-4,
        "head_learning_rate": 5e-3,
        "rank": 8, "batch_size": 16, "surgery": surgery, "seed": seed,
    } | more  # fmt: skip
    write_json(folder / "config.json", {"settings": settings, "inputs": {}, "versions": VERSIONS})
    lines = []
    for group in row.groups:
        name = "+".join(group)
        cosine = {"sst-para": -0.1, "sst-sts": 0.2, "para-sts": 0.0} if len(group) > 1 else {}
        for step in (10, 20):
            lines.append({
                "kind": "train", "group": name, "step": step,
                "loss": dict.fromkeys(group, 1 / step),
                "conflicts": 2.0, "cosine": cosine, "steps_per_second": 8.0,
            })  # fmt: skip
        lines.append({"kind": "eval", "group": name, "step": 20, "dev": dict.fromkeys(group, 0.5)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def parameters(variant):
    """What `jaxlora.training.parameter_count` would count with these sizes."""
    trees = {"frozen": 0, "lora": TREE, "full": BASE}[variant.adapt] * len(variant.groups)
    heads = 3 * HEAD
    return {
        "base": BASE, "encoder": trees, "heads": heads, "incremental": trees + heads,
        "bundled": trees + heads + (0 if variant.adapt == "full" else BASE),
    }  # fmt: skip


def write_classes(path, right, classes):
    """Right on the first `right` examples, one class too high on the others."""
    labels = [n % classes for n in range(EXAMPLES)]
    found = [(y + (n >= right)) % classes for n, y in enumerate(labels)]
    write_rows(path, found, labels, [0.75] * EXAMPLES)


def write_similarities(path, r):
    labels = 2.5 + 2 * SIGNAL
    write_rows(path, 2.5 + r * SIGNAL + (1 - r * r) ** 0.5 * NOISE, labels, [""] * EXAMPLES)


def write_rows(path, predictions, labels, confidence):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = zip(range(EXAMPLES), predictions, labels, confidence, strict=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "prediction", "label", "confidence"), *rows])


def examine(root):
    """The context of a report of these runs, and its findings."""
    collection = collect(root)
    context = claims.Context(
        collection, scores.score(collection, RESAMPLES, 0), times.measure(collection)
    )
    return context, claims.examine(context)

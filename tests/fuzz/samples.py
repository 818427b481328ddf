"""Sound folders, as small as can be, for the generators to spoil."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from jaxlora import lora
from jaxlora.formats import families, huggingface
from jaxlora.lora import LoraConfig
from jaxlora.nn.bert import BertConfig, param_shapes
from jaxlora.serving import export_peft, finished_run, manifest, task_models, tree_files
from jaxlora.serving.task_models import TaskModel, TaskModels
from jaxlora.tasks.task import PARA, SST, STS_COSINE, Task
from jaxlora.utils import files, trees

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "runs", "##s", ".", "e", "[MASK]")
BERT = BertConfig(len(WORDS), 8, 2, 2, 16, 32)
ADAPTER = LoraConfig(2, 4.0, ("query", "output.dense"), rank_pattern=(("query", 1),))
TASKS = (SST, PARA, STS_COSINE)


def tokenizer() -> Tokenizer:
    """A WordPiece tokenizer of ten words, set up as BERT's is."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    built = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return built


def base(folder: Path) -> Path:
    """A Hugging Face folder with a BERT of zeros."""
    folder.mkdir(parents=True)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), param_shapes(BERT))
    save_file(huggingface.export(params, BERT), folder / "model.safetensors")
    fields = families.of(BERT).read_fields
    config = {"model_type": "bert"} | {name: getattr(BERT, ours) for ours, name in fields.items()}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def trained(base_folder: Path) -> TaskModels:
    """Three tasks, an adapter each, untrained."""
    shapes, key = param_shapes(BERT), jax.random.key(0)
    models = {
        task.name: TaskModel(
            task, task.name, task.init_head(key, BERT.hidden_size, "concat"), "concat"
        )
        for task in TASKS
    }
    return TaskModels(
        base=str(base_folder),
        fingerprint=huggingface.load(str(base_folder)).fingerprint,
        models=models,
        trees={task.name: {"lora": lora.init(key, shapes, ADAPTER)} for task in TASKS},
        configs={task.name: ADAPTER for task in TASKS},
        pooling="mean",
        max_length=16,
        dtype="float32",
        origin="a sample",
    )


def peft(folder: Path, source: TaskModels, task: Task = SST) -> Path:
    """An exported task."""
    export_peft.save(folder, source, task.name)
    return folder


def classifier(folder: Path, source: TaskModels) -> tuple[Path, TaskModels]:
    """A sequence classifier as PEFT has it, and what it shall fit."""
    like = dataclasses.replace(source, pooling="cls")
    task = Task("topic", "classification", classes=("a", "b", "c"), head="pooler")
    head = task.init_head(jax.random.key(1), BERT.hidden_size, "concat")
    model = TaskModel(task, SST.name, head, "concat")
    export_peft.save(folder, dataclasses.replace(like, models={"topic": model}), "topic")
    for name in (export_peft.ABOUT, "head.safetensors"):
        (folder / name).unlink()
    return folder, like


def bank_manifest(source: TaskModels) -> dict[str, Any]:
    """The manifest of a bank with one task, unsigned."""
    facts = task_models.Facts(dev={"accuracy": 0.5}, variant="lora1", versions={"jax": "0"})
    entry = manifest.TaskEntry(SST, "sst-0123456789abcdef", "sst-fedcba9876543210", "concat", facts)
    whole = dataclasses.replace(
        manifest.empty(source),
        tasks={"sst": entry},
        adapters={"sst-0123456789abcdef": ADAPTER},
        sizes={"heads/sst-fedcba9876543210": manifest.Size(10, 1000)},
    )
    values = {"format": manifest.FORMAT, **dataclasses.asdict(whole)}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def run(folder: Path, source: TaskModels) -> Path:
    """A finished run as an earlier jaxlora left it."""
    settings = source.base_spec() | {
        "variant": "lora1", "adapt": "lora", "groups": [[name] for name in source.models],
        "pair_features": "concat", "rank": 2, "alpha": 4.0, "rslora": False, "lora_dropout": 0.0,
        "target_modules": ADAPTER.target_modules, "rank_pattern": [["query", 1]],
        "alpha_pattern": [], "tasks": [{"task": dataclasses.asdict(task)} for task in TASKS],
    }  # fmt: skip
    del settings["fingerprint"]
    tree = {
        "adapters": dict(source.trees),
        "heads": {name: one.head for name, one in source.models.items() if one.head},
    }
    tree_files.save(folder / finished_run.MODEL, tree)
    inputs = source.fingerprint.to_inputs() | {"the data of sst": "0" * 64}
    config = {"settings": settings, "inputs": inputs, "versions": {"jax": "0"}}
    files.write_json(folder / finished_run.CONFIG, config)
    dev = dict.fromkeys(source.models, 0.5)
    model = trees.checksum(tree_files.load(folder / finished_run.MODEL))
    files.write_json(folder / finished_run.RESULT, {"dev": dev, "model": model})
    return folder

"""Targets that are folders of others: base models, PEFT adapters, banks and runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from hypothesis import strategies as st

from jaxlora import lora
from jaxlora.formats import families, huggingface, peft_config
from jaxlora.formats import peft as peft_files
from jaxlora.formats import tokenizer as base_tokenizer
from jaxlora.nn.bert import param_shapes
from jaxlora.serving import bank, export_merged, export_peft, finished_run, manifest, task_models
from jaxlora.training import metrics_log, run_folder
from jaxlora.training.config import Settings
from jaxlora.training.presets import make_settings
from jaxlora.utils.errors import UserError
from tests.fuzz import hostile, samples

INDEX = "model.safetensors.index.json"
Inputs = st.SearchStrategy[Any]


def targets(folder: Path) -> dict[str, tuple[Inputs, Callable[..., None]]]:
    """Inputs and checks by name."""
    base = samples.base(folder / "base")
    source = samples.trained(base)
    peft = samples.peft(folder / "peft", source)
    others, like = samples.classifier(folder / "classifier", source)
    run = samples.run(folder / "run", source)
    begun = {"settings": make_settings("lora1").to_json(), "inputs": {}}
    plain = samples.bank_manifest(source)
    return {
        "base name": (_names(), find_base),
        "base config": (_json(base / "config.json"), read_base_config),
        "base index": (hostile.json_files({"weight_map": {"x": "model.safetensors"}}), read_index),
        "base weights": (_tensors(base / "model.safetensors"), read_weights),
        "tokenizer file": (_json(base / "tokenizer.json"), read_tokenizer),
        "PEFT config": (
            _json(peft / peft_config.CONFIG), _in_copy(peft, peft_config.CONFIG, adapter)
        ),
        "PEFT tensors": (
            _tensors(peft / peft_files.TENSORS), _in_copy(peft, peft_files.TENSORS, adapter)
        ),
        "PEFT classifier's config": (
            _json(others / peft_config.CONFIG),
            _in_copy(others, peft_config.CONFIG, classifier(like)),
        ),
        "PEFT classifier's tensors": (
            _tensors(others / peft_files.TENSORS),
            _in_copy(others, peft_files.TENSORS, classifier(like)),
        ),
        "special tokens": (
            hostile.json_files({"pad_token": "[PAD]", "cls_token": {"content": "[CLS]"}}),
            _in_copy(base, "tokenizer_config.json", find_special_tokens),
        ),
        "head": (_tensors(peft / "head.safetensors"), _in_copy(peft, "head.safetensors", imported)),
        "jaxlora.json": (
            _json(peft / export_peft.ABOUT), _in_copy(peft, export_peft.ABOUT, imported)
        ),
        "bank manifest": (st.tuples(hostile.json_files(plain), st.booleans()), read_bank),
        "run config": (hostile.json_files(begun), read_settings),
        "old run's config": (
            _json(run / finished_run.CONFIG), _in_copy(run, finished_run.CONFIG, read_run)
        ),
        "old run's result": (
            _json(run / finished_run.RESULT), _in_copy(run, finished_run.RESULT, read_run)
        ),
        "run metrics": (_records(), read_metrics),
    }  # fmt: skip


def _json(path: Path) -> st.SearchStrategy[bytes]:
    return hostile.json_files(json.loads(path.read_text()))


def _tensors(path: Path) -> st.SearchStrategy[bytes]:
    """Safetensors files: damaged, or with another header that has the right length."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]

    def packed(other: Any) -> bytes:
        text = json.dumps(other).encode()
        return struct.pack("<Q", len(text)) + text + data

    return st.one_of(hostile.damaged(content), hostile.changed(header, 1).map(packed))


def _in_copy(folder: Path, name: str, check: Callable[[Path], None]) -> Callable[..., None]:
    """A check that sees the folder with one file of it replaced."""

    def with_content(content: bytes, scratch: Path) -> None:
        copy = scratch / "copy"
        if not copy.exists():
            shutil.copytree(folder, copy)
        (copy / name).write_bytes(content)
        check(copy)

    return with_content


def _names() -> st.SearchStrategy[str]:
    part = st.one_of(st.sampled_from(("minilm", "~", "..", "bert-base", "a", "@")), hostile.texts)
    return st.lists(part, min_size=1, max_size=3).map("/".join)


def find_base(name: str, scratch: Path) -> None:
    """`pretrained.find`, without a network."""
    assert huggingface.find(name).is_dir()


def read_base_config(content: bytes, scratch: Path) -> None:
    """`pretrained.read_config`, and whether the network it describes can be built."""
    (scratch / "config.json").write_bytes(content)
    config = huggingface.read_config(scratch / "config.json")
    with contextlib.suppress(UserError):  # nothing is there to be converted
        huggingface.convert({}, config)


def read_index(content: bytes, scratch: Path) -> None:
    """`pretrained.weight_files`: nothing outside of the folder."""
    (scratch / INDEX).write_bytes(content)
    for path in huggingface.weight_files(scratch):
        assert path.parent == scratch and path.suffix == ".safetensors"
        assert path.name.encode() and "\0" not in path.name


def read_weights(content: bytes, scratch: Path) -> None:
    """`pretrained.read_tensors` and `convert`."""
    (scratch / "model.safetensors").write_bytes(content)
    params = huggingface.convert(
        huggingface.read_tensors([scratch / "model.safetensors"], families.of(samples.BERT)),
        samples.BERT,
    )
    _check_shapes(params, param_shapes(samples.BERT))


def _check_shapes(tree: Any, like: Any) -> None:
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, like)


def read_tokenizer(content: bytes, scratch: Path) -> None:
    """`base_tokenizer.load`."""
    (scratch / "tokenizer.json").write_bytes(content)
    (scratch / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = base_tokenizer.load(scratch, samples.BERT.vocab_size)
    assert len(tokenizer.encode("").ids) == 2


def adapter(folder: Path) -> None:
    """`peft_files.load`."""
    shapes = param_shapes(samples.BERT)
    found, config = peft_files.load(folder, samples.BERT)
    factors, kernels = traverse_util.flatten_dict(found), lora.targets(shapes, config)
    assert {path[:-1] for path in factors} == kernels.keys()
    for path, kernel in kernels.items():
        (layers, fan_in, fan_out), rank = kernel.shape, config.rank_of(path)
        assert factors[*path, "A"].shape == (layers, fan_in, rank)
        assert factors[*path, "B"].shape == (layers, rank, fan_out)
        assert math.isfinite(config.scale_of(path))


def classifier(like: task_models.TaskModels) -> Callable[[Path], None]:
    """`exchange.load` of a folder that PEFT wrote."""

    def check(folder: Path) -> None:
        _check_trained(export_peft.load(folder, "similar", like), ["similar"])

    return check


def find_special_tokens(folder: Path) -> None:
    """`merged.special_tokens`."""
    base = huggingface.load(str(folder))
    found = export_merged.special_tokens(base)
    assert found.keys() >= {"pad_token", "cls_token", "sep_token"}
    assert all(base.tokenizer.token_to_id(token) is not None for token in found.values())


def imported(folder: Path) -> None:
    """`exchange.load`."""
    found = export_peft.load(folder, "similar")
    _check_trained(found, ["similar"])


def _check_trained(found: task_models.TaskModels, names: list[str]) -> None:
    assert list(found.models) == names
    for name, one in found.models.items():
        assert hostile.is_safe(name) and one.task.name == name and one.tree in found.trees
        assert one.task.outputs >= 0
        json.dumps(dataclasses.asdict(one.facts))
    for config in found.configs.values():
        assert math.isfinite(config.scale_of(("self", "query")))


def read_bank(value: tuple[bytes, bool], scratch: Path) -> None:
    """`manifest.read` (also of one that was signed anew) and what stands on it."""
    content, sign = value
    if sign:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            content = json.dumps(manifest.signed(json.loads(content))).encode()
    (scratch / manifest.NAME).write_bytes(content)
    found = manifest.read(scratch)
    folders = list(found.folders())
    for part, name in folders:
        assert name and (scratch / part / name).resolve().parent == (scratch / part).resolve()
    # Its trees are not there; neither may be its base.
    assert len(bank.verify(scratch)) - len(folders) in (0, 1)
    for name in found.tasks:
        bank.describe(scratch, name)
    for config in found.adapters.values():
        assert config is None or math.isfinite(config.scale_of(("self", "query")))
    with contextlib.suppress(UserError):
        bank.load(scratch)


def read_settings(content: bytes, scratch: Path) -> None:
    """`Settings.from_json`, and what a run that goes on compares."""
    (scratch / finished_run.CONFIG).write_bytes(content)
    config = finished_run.read_config(scratch)
    with contextlib.suppress(UserError):
        run_folder.check(scratch, config["settings"], resume=True)
        run_folder.check_same_inputs(scratch, {"the base model": "0"})
    settings = Settings.from_json(config["settings"])
    names = {name for group in settings.groups for name in group}
    assert all(map(hostile.is_safe, names))


def read_run(folder: Path) -> None:
    """`bank.load` of a run that an earlier jaxlora finished."""
    found = bank.load(folder)
    _check_trained(found, list(found.models))
    assert found.trees.keys() == {one.tree for one in found.models.values()}


RECORD = {"kind": "train", "group": "sst", "step": 1, "loss": {"sst": 0.5}}
LINE = json.dumps(RECORD).encode() + b"\n"


def _records() -> st.SearchStrategy[bytes]:
    other = hostile.changed(RECORD, 1).map(lambda value: json.dumps(value).encode() + b"\n")
    return st.one_of(
        hostile.damaged(LINE * 3), st.lists(other, max_size=3).map(b"".join).map(LINE.__add__)
    )


def read_metrics(content: bytes, scratch: Path) -> None:
    """`metrics_log.read_records`: sound records, from the first line on."""
    (scratch / metrics_log.METRICS).write_bytes(content)
    found = metrics_log.read_records(scratch)
    assert len(found) <= len(content.splitlines())
    assert all(isinstance(r["step"], int) and isinstance(r["group"], str) for r in found)
    assert found[:1] == [RECORD] or not content.startswith(LINE)

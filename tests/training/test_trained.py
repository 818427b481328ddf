"""What a run has trained is a bank, whatever the variant; killed while it is written, too."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from tiny import leaves_equal, random_adapter

from jaxlora.data.delimited import Reading
from jaxlora.data.tables import Columns, Table
from jaxlora.serving import bank, finished_run, manifest, tree_files
from jaxlora.tasks.sharing import VARIANTS, group_name
from jaxlora.training import inputs, trained
from jaxlora.training.presets import make_settings
from jaxlora.utils import files
from jaxlora.utils.errors import Note, UserError

DEV = {"sst": 0.25, "para": 0.5, "sts": -0.125}


def models(variant, base, size=0.2, table=None):
    """Settings of a variant, and models as if they had been trained."""
    more = {"rank": 3} if variant.startswith("lora") else {}
    settings = make_settings(variant, base=base.name, max_length=16, **more)
    if table:
        settings = dataclasses.replace(
            settings,
            data=dataclasses.replace(settings.data, source="files"),
            tasks=tuple(dataclasses.replace(spec, table=table) for spec in settings.tasks),
        )
    tree = {
        "frozen": {},
        "lora": {"lora": random_adapter(base.params, settings.lora, size)}
        if settings.adapt == "lora"
        else {},
        "full": {"params": jax.tree.map(lambda x: x + size, base.params)},
    }[settings.adapt]
    heads = {
        name: task.init_head(
            jax.random.key(1), base.config.hidden_size, settings.model.pair_features
        )
        for name, task in settings.named.items()
    }
    best = {
        group_name(names): {
            "trainable": jax.tree.map(np.asarray, tree),
            "heads": {name: heads[name] for name in names if heads[name]},
        }
        for names in settings.groups
    }
    checksums = base.fingerprint.to_inputs() | {inputs.data_of(name): f"of {name}" for name in DEV}
    return settings, trained.task_models(settings, checksums, best, DEV, settings.named)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bank_keeps_all_of_a_run(tiny, tmp_path, variant):
    settings, source = models(variant, tiny)
    bank.write(tmp_path / "run" / finished_run.MODEL, source)
    found = bank.load(tmp_path / "run")
    assert found.base_spec() == source.base_spec() and found.origin == str(tmp_path / "run")
    assert list(found.models) == ["sst", "para", "sts"]
    for name, one in source.models.items():
        again = found.models[name]
        assert (again.task, again.pair_features) == (one.task, one.pair_features)
        assert again.facts == one.facts
        assert again.facts.dev == {one.task.metric: DEV[name]}
        assert again.facts.data == f"of {name}" and again.facts.variant == variant
        leaves_equal(again.head, one.head)
        leaves_equal(found.trees[again.tree], source.trees[one.tree])
        assert found.configs.get(again.tree) == source.configs.get(one.tree)
    kept = {one.tree for one in found.models.values()}
    assert len(kept) == (1 if settings.adapt == "frozen" else len(settings.groups))
    assert bank.verify(tmp_path / "run") == []


def test_a_bank_keeps_how_the_tables_were_read(tiny, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text('text^label\n"a^1\n')
    table = Table(Columns(("text",), "label"), str(path), str(path), None, "^", "none")
    _, source = models("lora3", tiny, table=table)
    bank.write(tmp_path / "run" / finished_run.MODEL, source)
    found = bank.load(tmp_path / "run").models
    assert found["sst"].facts.columns == table.columns
    assert found["sst"].facts.reading == Reading("^", {"^": "none"})
    stored = tmp_path / "run" / finished_run.MODEL / manifest.NAME
    values = json.loads(stored.read_text())
    edited = json.dumps(values).replace('"delimiter": "^"', '"delimiter": "^^"')
    stored.write_text(json.dumps(manifest.signed(json.loads(edited))))
    with pytest.raises(UserError, match=r"reading: delimiter: '\^\^' is not one character"):
        bank.load(tmp_path / "run")
    for entry in values["tasks"].values():
        del entry["facts"]["reading"]
    stored.write_text(json.dumps(manifest.signed(values | {"format": 5})))  # as it was before
    before = bank.load(tmp_path / "run").models["sst"].facts
    assert (before.columns, before.reading) == (table.columns, None)


def test_a_table_that_is_gone_when_training_ends_is_noted(tiny, tmp_path):
    path = tmp_path / "x.txt"
    table = Table(Columns(("text",), "label"), str(path), str(path))
    with pytest.warns(Note, match=r"x\.txt.*does not record .* the tables of \w+ were read"):
        _, source = models("lora3", tiny, table=table)
    assert source.models["sst"].facts.columns == table.columns
    assert source.models["sst"].facts.reading is None


def test_whole_encoders_stay_in_the_bank_of_their_run(tiny, tmp_path):
    _, whole = models("baseline4", tiny)
    _, adapters = models("lora1", tiny)
    bank.write(tmp_path / "run", whole)
    with pytest.raises(UserError, match="sst is a fully fine-tuned BERT; banks keep adapters"):
        bank.add(tmp_path / "bank", bank.load(tmp_path / "run"), ["sst"])
    bank.remove(tmp_path / "run", "sst")
    with pytest.raises(UserError, match="holds the full encoders of a run"):
        bank.add(tmp_path / "run", adapters, ["sst"])
    assert list(bank.load(tmp_path / "run").models) == ["para", "sts"]


def test_a_run_that_is_not_finished_says_so(tiny, tmp_path):
    files.write_json(tmp_path / finished_run.CONFIG, {"settings": {}, "inputs": {}})
    with pytest.raises(UserError, match=r"the run is not finished, .* model/bank\.json .*resume"):
        bank.load(tmp_path)
    bank.write(tmp_path / finished_run.MODEL, models("lora3", tiny)[1])
    assert list(bank.load(tmp_path).models) == ["sst", "para", "sts"]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(tree_files, "save"), (files, "write_json"), (files, "settle"), (os, "rename")],
)
def test_killed_while_it_is_written_it_is_the_old_or_the_new_or_none(
    tiny, tmp_path, monkeypatch, owner, name, before
):
    run = tmp_path / "run"
    files.write_json(run / finished_run.CONFIG, {"settings": {}, "inputs": {}})
    old, new = (models("lora3", tiny, size)[1] for size in (0.2, 0.3))
    bank.write(run / finished_run.MODEL, old)
    real = getattr(owner, name)

    def die(*args, **kwargs):
        if not before:
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, die)
        bank.write(run / finished_run.MODEL, new)
    try:
        found = bank.load(run)
    except UserError as error:
        assert "not finished" in str(error)
    else:
        same = [
            all(
                np.array_equal(a, b)
                for a, b in zip(
                    jax.tree.leaves(list(found.trees.values())),
                    jax.tree.leaves(list(other.trees.values())),
                    strict=True,
                )
            )
            for other in (old, new)
        ]
        assert any(same)
        assert bank.verify(run) == []
    bank.write(run / finished_run.MODEL, new)
    leaves_equal(list(bank.load(run).trees.values()), list(new.trees.values()))


def test_what_a_bank_holds_is_said_by_its_manifest_alone(tiny, tmp_path, monkeypatch):
    bank.write(tmp_path / "bank", models("lora3", tiny)[1])
    rows = {row.task: row for row in bank.contents(tmp_path / "bank")}
    _, source = models("lora3", tiny)
    adapter = sum(x.size for x in jax.tree.leaves(source.trees[source.models["sst"].tree]))
    assert {row.adapter_parameters for row in rows.values()} == {adapter}
    stored = [p.stat().st_size for p in (tmp_path / "bank").rglob("*") if p.is_file()]
    manifest = (tmp_path / "bank" / "bank.json").stat().st_size
    assert abs(sum(row.bytes for row in rows.values()) - (sum(stored) - manifest)) < 3
    monkeypatch.setattr(tree_files, "load", pytest.fail)
    assert {row.task: row for row in bank.contents(tmp_path / "bank")} == rows

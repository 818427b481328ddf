"""The bank: tasks added, updated, removed and served one by one; nothing else touched or lost."""

import csv
import dataclasses
import hashlib
import json
import re
import resource
import shutil
from pathlib import Path

import filelock
import numpy as np
import peft_oracle
import pytest
from tiny import Silent, write_data

import jaxlora
from jaxlora import lora
from jaxlora.cli import main
from jaxlora.serving import bank, export_merged, export_peft, finished_run, tree_files
from jaxlora.serving import manifest as manifests
from jaxlora.serving import predictor as predict
from jaxlora.serving.chunks import every_shape
from jaxlora.serving.predict_table import predict_file
from jaxlora.training import run as train
from jaxlora.training import run_folder
from jaxlora.training.presets import make_settings
from jaxlora.training.run import RunOptions
from jaxlora.utils import files, process, trees
from jaxlora.utils.errors import UserError

FAST = {
    "batch_size": 6,
    "max_steps": 3,
    "max_length": 16,
    "learning_rate": 0.05,
    "preset": "cs224n",
}
NOBODYS = dict.fromkeys(("weights", "config", "tokenizer"), "0" * 64)
PAIR = ("a dog runs", "the cat was in a film")
REQUESTS = [("sts", *PAIR), ("sst", "a very good film"), ("para", *PAIR), ("sst", "not good")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_base):
    """Finished runs: separate adapters of two kinds, a shared one, and heads only."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_data(folder / "data")
    kinds = {
        "lora1": {"rank": 4},
        "again": {"rank": 2, "alpha": 8.0, "target_modules": ("value", "intermediate.dense")},
        "lora4": {"rank": 3},
        "baseline1": {},
    }
    for seed, (name, more) in enumerate(kinds.items()):
        variant = {"again": "lora1"}.get(name, name)
        flags = FAST | more
        if variant == "baseline1":
            del flags["learning_rate"]
        settings = make_settings(variant, base=str(tiny_base), data_dir=data, seed=seed, **flags)
        train.run(settings, folder / name, Silent(), RunOptions(predict_test=False))
    return folder


@pytest.fixture
def three(runs, tmp_path):
    """A bank with the three tasks of `lora1`."""
    bank.add(tmp_path / "bank", bank.load(runs / "lora1"), ["sst", "para", "sts"])
    return tmp_path / "bank"


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (manifests.NAME, bank.LOCK)
    }


def values(predictor):
    return np.array([answer.value for answer in predictor(REQUESTS)])


def test_a_bank_answers_as_its_run_does(runs, three):
    assert list(jaxlora.Predictor.load(three).tasks) == ["sst", "para", "sts"]
    np.testing.assert_allclose(
        values(jaxlora.load(three)), values(jaxlora.load(runs / "lora1")), atol=1e-6
    )


def test_an_update_leaves_every_other_file_as_it_was(runs, three):
    before, answers = hashes(three), values(jaxlora.load(three))
    bank.add(three, bank.load(runs / "again"), ["sts"], replace=True)
    after = hashes(three)
    assert before.items() <= after.items()  # the old version is kept, too
    now = values(jaxlora.load(three))
    np.testing.assert_allclose(now[1:], answers[1:], atol=1e-5)
    again = jaxlora.load(runs / "again")
    np.testing.assert_allclose(now[:1], values(again)[:1], atol=1e-5)
    assert abs(now[0] - answers[0]) > 1e-3


def scored(run, task, score, dev_data="d"):
    """A run's tasks, one of them with another dev score."""
    source = bank.load(run)
    model = source.models[task]
    facts = dataclasses.replace(model.facts, dev={model.task.metric: score}, dev_data=dev_data)
    models = {**source.models, task: dataclasses.replace(model, facts=facts)}
    return dataclasses.replace(source, models=models)


def test_a_version_is_brought_back_bit_for_bit(runs, three):
    first, answers = hashes(three), values(jaxlora.load(three))
    bank.add(three, bank.load(runs / "again"), ["sts", "sst"], replace=True)
    second, others = hashes(three), values(jaxlora.load(three))
    assert [len(bank.history(three, name)) for name in ("sst", "para", "sts")] == [2, 1, 2]
    for name in ("sts", "sst"):
        bank.rollback(three, name)
    np.testing.assert_array_equal(values(jaxlora.load(three)), answers)
    assert hashes(three) == second and bank.verify(three) == []
    for name in ("sts", "sst"):  # and back again
        bank.rollback(three, name)
    np.testing.assert_array_equal(values(jaxlora.load(three)), others)
    for name in ("sts", "sst"):
        bank.remove(three, name)
    kept = {name: value for name, value in first.items() if "/para-" in name}
    assert hashes(three) == kept  # with a task its versions go


def test_the_last_versions_are_kept(runs, three):
    for score in range(8):
        bank.add(three, scored(runs / "lora1", "sts", score / 10), ["sts"], replace=True)
    dev = [version.facts.dev["pearson"] for version in bank.history(three, "sts")]
    assert dev == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    bank.rollback(three, "sts", 2)
    assert bank.history(three, "sts")[-1].facts.dev == {"pearson": 0.3}
    bank.add(three, scored(runs / "lora1", "sts", 0.3), ["sts"], replace=True)
    assert len(bank.history(three, "sts")) == 6  # the same once more is no version
    for version in (0, 6, -1):
        with pytest.raises(UserError, match=f"sts has no earlier version {version}"):
            bank.rollback(three, "sts", version)
    with pytest.raises(UserError, match="para has no earlier version; see"):
        bank.rollback(three, "para")


def test_an_update_only_if_better(runs, three, capsys):
    bank.add(three, scored(runs / "lora1", "sts", 0.5), ["sts"], replace=True)
    before = hashes(three)
    for score in (0.4, 0.5, float("nan")):
        (change,) = bank.add(
            three, scored(runs / "again", "sts", score), ["sts"], replace=True, if_better=True
        )
        assert not change.made and hashes(three) == before
    for other in ("e", None):  # another dev set, or an unknown one
        with pytest.raises(UserError, match=r"scores of sts .* not known to be of one dev set"):
            bank.add(
                three, scored(runs / "again", "sts", 0.9, other), ["sts"], replace=True,
                if_better=True,
            )  # fmt: skip
    (change,) = bank.add(
        three, scored(runs / "again", "sts", 0.6), ["sts"], replace=True, if_better=True
    )
    assert (change.made, change.better, change.before, change.after) == (True, True, 0.5, 0.6)
    assert bank.history(three, "sts")[-1].facts.dev == {"pearson": 0.6}


def test_the_dev_set_of_a_run_is_known(runs):
    one, again = (bank.load(runs / name).models for name in ("lora1", "again"))
    assert all(one[name].facts.dev_data == again[name].facts.dev_data for name in one)
    assert len({model.facts.dev_data for model in one.values()} - {None}) == 3


def test_a_damaged_version_is_not_kept(runs, three):
    (head,) = (three / "heads").glob("sts-*") or [None]
    shutil.rmtree(head)
    bank.add(three, bank.load(runs / "again"), ["sts"], replace=True)
    assert len(bank.history(three, "sts")) == 1 and bank.verify(three) == []


def test_commands_of_versions(runs, three, call):
    code, shown = call("bank", "update", three, f"--run={runs / 'again'}", "--task=sts")
    assert code == 0 and re.search(r"sts: Pearson r -?0\.\d+ → -?0\.\d+", shown)
    versions = json.loads(call("bank", "history", three, "sts", "--json")[1])
    assert [version["task"]["name"] for version in versions] == ["sts", "sts"]
    assert call("bank", "rollback", three, "sts")[0] == 0
    swapped = json.loads(call("bank", "history", three, "sts", "--json")[1])
    assert swapped == versions[::-1]
    assert "2 (present)" in call("bank", "history", three, "sts")[1]
    rows = json.loads(call("bank", "list", three, "--json")[1])
    assert {row["task"] for row in rows} == {"sst", "para", "sts"}
    code, shown = call("bank", "rollback", three, "sts", "--version=7")
    assert code == 2 and "sts has no earlier version 7" in shown


def test_adding_and_removing_leave_every_other_file_as_it_was(runs, tmp_path):
    folder = tmp_path / "bank"
    bank.add(folder, bank.load(runs / "lora1"), ["sst"])
    first = hashes(folder)
    bank.add(folder, bank.load(runs / "lora4"), ["para", "sts"])
    assert first.items() <= hashes(folder).items()
    rows = {row.task: row for row in bank.contents(folder)}
    assert rows["para"].adapter == rows["sts"].adapter != rows["sst"].adapter
    assert len(list((folder / "adapters").iterdir())) == 2  # what two tasks share is stored once
    assert rows["sts"].head_parameters == 0
    bank.remove(folder, "para")
    assert [row.task for row in bank.contents(folder)] == ["sst", "sts"]
    bank.remove(folder, "sts")
    assert hashes(folder) == first


def with_merged_weights(run, base):
    """The same tasks, as if each tree were a whole BERT of its own."""
    merged = {
        name: {"params": lora.merge(base.params, tree["lora"], run.configs[name])} if tree else {}
        for name, tree in run.trees.items()
    }
    return dataclasses.replace(run, trees=merged, configs={})


def test_tasks_of_any_run_are_served_together(runs, tmp_path):
    """Other ranks, alphas and layers, and one without an adapter, in one pass."""
    folder = tmp_path / "bank"
    origin = {"sst": "again", "para": "baseline1", "sts": "lora4"}
    for task, run in origin.items():
        bank.add(folder, bank.load(runs / run), [task])
    predictor = jaxlora.load(folder)
    mixed = predictor(REQUESTS)
    assert predictor([]) == []
    for request, answer in zip(REQUESTS, mixed, strict=True):
        run = bank.load(runs / origin[request[0]])
        (alone,) = jaxlora.Predictor(predictor.base, with_merged_weights(run, predictor.base))(
            [request]
        )
        assert answer.value == pytest.approx(alone.value, abs=1e-5)
        if alone.probabilities:
            assert answer.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


def test_a_predictor_keeps_its_tokenizer(three, monkeypatch):
    made = []
    whole = predict.truncating
    monkeypatch.setattr(predict, "truncating", lambda *args: made.append(args) or whole(*args))
    predictor = jaxlora.load(three)
    for _ in range(2):
        predictor(REQUESTS)
    assert len(made) == 1


def test_a_bank_below_the_home_folder(three, monkeypatch):
    monkeypatch.setenv("HOME", str(three.parent))
    assert "sst" in jaxlora.load(f"~/{three.name}").tasks


def test_any_number_of_requests_takes_few_programs(three):
    """Requests come in ever new numbers; compiling for each would cost time and memory."""
    model = jaxlora.load(three)
    for count in range(1, 120, 2):
        model((REQUESTS * 40)[:count])
    assert 1 < model._mixed(4)._cache_size() <= len(every_shape(model.trained.max_length, True))


def test_what_does_not_belong_is_refused(runs, three, tmp_path):
    before = hashes(three) | {"manifest": (three / manifests.NAME).read_text()}
    source = bank.load(runs / "again")
    whole = with_merged_weights(source, jaxlora.load(three).base)
    for call, message in [
        (
            lambda: bank.add(three, source, ["sts"]),
            "has sts already; replace it",
        ),
        (lambda: bank.add(three, source, ["stss"]), "no task .stss.; there are sst, para, sts"),
        (lambda: bank.remove(three, "topic"), "no task 'topic'; it has"),
        (lambda: bank.describe(three, "topic"), "no task 'topic'"),
        (
            lambda: bank.add(three, whole, ["sst"], replace=True),
            "fully fine-tuned BERT",
        ),
        (
            lambda: bank.add(
                three, dataclasses.replace(source, pooling="cls"), ["sst"], replace=True
            ),
            "has pooling mean, .* has cls; train with pooling mean",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            call()
    assert hashes(three) | {"manifest": (three / manifests.NAME).read_text()} == before
    bank.remove(three, "para")
    with pytest.raises(UserError, match="has no para yet; add it"):
        bank.add(three, source, ["para"], replace=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no bank"):
        bank.add(tmp_path / "full", source, ["sts"])
    with pytest.raises(UserError, match="not a bank"):
        bank.remove(tmp_path / "none", "sts")
    assert not (tmp_path / "none").exists()


def test_another_base_is_refused(three, tiny_base, runs, tmp_path):
    other = shutil.copytree(tiny_base, tmp_path / "other")
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    manifest = json.loads((three / manifests.NAME).read_text())
    (three / manifests.NAME).write_text(
        json.dumps(manifests.signed(manifest | {"base": str(other)}))
    )
    with pytest.raises(UserError, match="not the weights that"):
        jaxlora.load(three)
    (three / manifests.NAME).write_text(
        json.dumps(
            manifests.signed(
                manifest | {"fingerprint": {**manifest["fingerprint"], "weights": "0" * 64}}
            )
        )
    )
    with pytest.raises(UserError, match="is a bank of"):
        bank.add(three, bank.load(runs / "again"), ["sts"], replace=True)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("victim", ["save", "write_json", "rmtree"])
@pytest.mark.parametrize("change", ["update", "add", "remove"])
def test_killed_at_any_moment_it_holds_the_old_state_or_the_new(
    runs, three, monkeypatch, victim, before, change
):
    source = bank.load(runs / "again")
    bank.remove(three, "para")
    old = bank.load(three).models.keys()
    old_value = values_of(three, "sts")
    module = {"save": tree_files, "write_json": files, "rmtree": shutil}[victim]
    real = getattr(module, victim)

    def die(*args, **kwargs):
        if not before:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(module, victim, die)
    actions = {
        "update": lambda: bank.add(three, source, ["sts"], replace=True),
        "add": lambda: bank.add(three, source, ["para"]),
        "remove": lambda: bank.remove(three, "sts"),
    }
    try:
        actions[change]()
        died = False
    except Killed:
        died = True
    monkeypatch.undo()
    assert died or victim != "write_json"
    assert bank.verify(three) == []
    new = {"update": old, "add": old | {"para"}, "remove": old - {"sts"}}[change]
    found = bank.load(three).models.keys()
    assert found in (old, new)
    if "sts" in found and (change != "update" or victim == "save"):
        assert values_of(three, "sts") == old_value
    # The next change tidies up what the killed one left.
    bank.add(three, bank.load(runs / "lora4"), ["sst"], replace=True)
    manifest = json.loads((three / manifests.NAME).read_text())
    earlier = [entry for entries in manifest["history"].values() for entry in entries]
    entries = [*manifest["tasks"].values(), *earlier]
    used = {entry["head"] for entry in entries} | set(manifest["adapters"])
    left = {
        p.name for part in (manifests.ADAPTERS, manifests.HEADS) for p in (three / part).iterdir()
    }
    assert left == used - {None}


def values_of(folder, task):
    return jaxlora.load(folder)([(task, *PAIR)])[0].value


def test_one_writer_at_a_time(runs, three):
    with (
        filelock.FileLock(three / bank.LOCK),
        pytest.raises(UserError, match="another process is changing it"),
    ):
        bank.remove(three, "sst")
    bank.remove(three, "sst")


def corrupt_every(three):
    for path in sorted(three.rglob("*")):
        if path.is_file() and path.stat().st_size and path.name not in (manifests.NAME, bank.LOCK):
            yield path


@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped", "gone"])
def test_damage_is_found_and_never_loaded(three, how):
    answers, manifest = values(jaxlora.load(three)), bank.load(three)
    assert manifest.models.keys() == {"sst", "para", "sts"}
    # Orbax copies small arrays out of what each process wrote, and reads the copies.
    files = sorted(
        corrupt_every(three), key=lambda p: ("ocdbt.process_0" in p.parts, -p.stat().st_size)
    )
    manifest_file = next(p for p in files if p.name == "manifest.ocdbt")
    for path in [manifest_file, *files]:
        whole = path.read_bytes()
        middle = len(whole) // 2
        changed = {
            "truncated": whole[:middle],
            "emptied": b"",
            "flipped": whole[: middle // 2] + bytes(b ^ 1 for b in whole[middle // 2 :]),
        }
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(changed[how])
        problems = bank.verify(three)
        if problems:
            stored = path.relative_to(three).parts[1]
            with pytest.raises(UserError, match=stored):
                values(jaxlora.load(three))
            assert stored in problems[0]
        else:  # a byte that Orbax does not read
            np.testing.assert_array_equal(values(jaxlora.load(three)), answers)
        path.write_bytes(whole)
        if problems and path != manifest_file:
            break
    else:
        pytest.fail("whatever is damaged, nothing is found")
    assert bank.verify(three) == []


def test_a_missing_head_is_named(three):
    head = next((three / bank.HEADS).glob("sts-*"))
    shutil.rmtree(head)
    (problem,) = bank.verify(three)
    assert head.name in problem
    with pytest.raises(UserError, match=rf"{head.name}: missing; .*bank update"):
        jaxlora.load(three).predict("sts", [PAIR])


@pytest.mark.parametrize("part", [manifests.ADAPTERS, manifests.HEADS])
def test_a_damaged_tree_refuses_the_requests_to_its_task_alone(three, part):
    expected = values(jaxlora.load(three))
    (tree,) = (three / part).glob("sts-*")
    for path in tree.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    predictor = jaxlora.load(three)
    for _ in range(2):  # a failure is not kept, nor does it take the place of others
        with pytest.raises(UserError, match=rf"{tree.name}: damaged.*bank update"):
            predictor(REQUESTS)
    found = [answer.value for answer in predictor(REQUESTS[1:])]
    np.testing.assert_allclose(found, expected[1:], atol=1e-6)


def test_a_tree_is_read_when_it_is_first_needed(three, reads, call):
    predictor = jaxlora.load(three)
    assert "sst" in repr(predictor.tasks) and bank.contents(three)
    assert call("bank", "list", three, "--json")[0] == call("bank", "list", three)[0] == 0
    assert call("bank", "history", three, "sst")[0] == call("bank", "show", three, "sst")[0] == 0
    assert reads == []
    for _ in range(2):
        predictor.predict("sst", ["a film"])
        assert [name.partition("-")[0] for name in reads] == ["sst", "sst"]  # adapter and head


def test_an_open_predictor_keeps_its_versions_and_says_what_is_gone(runs, three, monkeypatch):
    """Adapters and heads that were not read before the change, from another current folder."""
    expected = values(jaxlora.load(three))
    monkeypatch.chdir(three.parent)
    predictor = jaxlora.load(three.name)
    bank.add(three, bank.load(runs / "again"), ["sts", "sst"], replace=True)
    bank.remove(three, "para")
    monkeypatch.chdir("/")
    sure = [REQUESTS[0], REQUESTS[1], REQUESTS[3]]
    found = [answer.value for answer in predictor(sure)]
    np.testing.assert_allclose(found, expected[[0, 1, 3]], atol=1e-6)
    with pytest.raises(
        UserError, match=r"para-\w+: the bank was changed since it was opened.*again"
    ):
        predictor(REQUESTS)
    shutil.rmtree(three)
    with pytest.raises(UserError, match="the bank was changed since"):
        predictor(REQUESTS)


def test_predictors_and_task_models_say_what_they_are(three):
    shown = repr(jaxlora.load(three, memory=2**20))
    what = "base .*, 3 tasks .1 classification, 1 binary, 1 similarity.*, 1 MiB for trees"
    assert re.fullmatch(rf"Predictor\('{three}': {what}\)", shown)
    assert re.fullmatch(r"TaskModels\('.*bank': base .*, 3 tasks .*\)", repr(bank.load(three)))


def test_a_bank_and_a_run_of_the_last_version(runs, three, tmp_path):
    """Their tasks do not say which kind of head they have."""
    answers = values(jaxlora.load(three))
    path = three / manifests.NAME
    manifest = json.loads(path.read_text())
    for entry in manifest["tasks"].values():
        assert entry["task"].pop("head") == "mlp"
    path.write_text(json.dumps(manifests.signed(manifest)))
    np.testing.assert_array_equal(values(jaxlora.load(three)), answers)
    bank.add(three, bank.load(runs / "again"), ["sts"], replace=True)  # beside tasks of today's
    np.testing.assert_array_equal(values(jaxlora.load(three))[1:], answers[1:])
    run = shutil.copytree(runs / "lora1", tmp_path / "run")
    config = json.loads((run / finished_run.CONFIG).read_text())
    for table in config["settings"]["tasks"]:
        assert table["task"].pop("head") == "mlp"
    (run / finished_run.CONFIG).write_text(json.dumps(config))
    np.testing.assert_array_equal(values(jaxlora.load(run)), values(jaxlora.load(runs / "lora1")))
    now = json.loads((runs / "lora1" / finished_run.CONFIG).read_text())["settings"]
    run_folder.check(run, now, resume=True)
    with pytest.raises(UserError, match=r"other settings.*:\n  `seed`: 0 there, 99 here$"):
        run_folder.check(run, now | {"seed": 99}, resume=True)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m | {"format": 7}, "format 7 is newer than this jaxlora's 6"),
        (lambda m: [m], "not a bank's manifest"),
        (
            lambda m: {k: v for k, v in m.items() if k != "base"},
            "base: missing; it was changed by hand",
        ),
        (lambda m: m | {"pooling": 3}, "pooling: must be 'cls' or 'mean', not 3"),
        (lambda m: m | {"adapters": {}}, "is not described"),
        (lambda m: m | {"tasks": {"../x": m["tasks"]["sst"]}}, "cannot be a name"),
        (lambda m: m | {"tasks": {"x" * 300: m["tasks"]["sst"]}}, "cannot be a name"),
        (lambda m: m | {"tasks": {"a\n": m["tasks"]["sst"]}}, "cannot be a name"),
        (lambda m: m | {"tasks": {"sts": m["tasks"]["sst"]}}, "task sts is called 'sst'"),
        (lambda m: m | {"tasks": {"sst": m["tasks"]["sst"] | {"head": "../../x"}}}, "not the name"),
        (lambda m: m | {"tasks": {"sst": m["tasks"]["sst"] | {"head": None}}}, "needs a head"),
        (lambda m: m | {"tasks": {"sst": m["tasks"]["sst"] | {"head": 7}}}, "changed by hand"),
        (lambda m: m | {"tasks": {"sst": {}}}, "tasks.sst.task: missing"),
        (lambda m: m | {"tasks": 3}, "changed by hand"),
        (
            lambda m: m | {"tasks": {"sst": m["tasks"]["sst"] | {"task": {"name": "sst"}}}},
            "changed by hand",
        ),
    ],
)
def test_a_manifest_changed_by_hand(three, edit, message):
    """Even one whose checksum has been made to fit."""
    path = three / manifests.NAME
    changed = edit(json.loads(path.read_text()))
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"bank.json: "):
        bank.load(three)
    path.write_text(json.dumps(manifests.signed(changed) if isinstance(changed, dict) else changed))
    with pytest.raises(UserError, match=message):
        bank.load(three)


def test_any_change_of_the_manifest_is_found(three):
    """An alpha that fits all else would only change the answers."""
    path = three / manifests.NAME
    text = path.read_text()
    assert text.count('"alpha": 4.0') == 3
    path.write_text(text.replace('"alpha": 4.0', '"alpha": 400.0', 1))
    with pytest.raises(UserError, match="changed by hand or damaged"):
        bank.verify(three)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda e, a: a.update(rank=3, alpha=3.0),
            "para.* has rank 4, its configuration says 3",
        ),
        (lambda e, a: a.update(target_modules=["query"]), "none of its configuration's target"),
        (lambda e, a: e.update(pair_features="concat"), "the head of para does not fit its task"),
        (lambda e, a: e["task"].update(pair=False), "the head of para does not fit its task"),
    ],
)
def test_a_manifest_that_does_not_fit_its_numbers(three, edit, message):
    path = three / manifests.NAME
    manifest = json.loads(path.read_text())
    entry = manifest["tasks"]["para"]
    edit(entry, manifest["adapters"][entry["adapter"]])
    path.write_text(json.dumps(manifests.signed(manifest)))
    predictor = jaxlora.load(three)
    with pytest.raises(UserError, match=message):
        predictor([("para", *PAIR[: predictor.task("para").texts])])
    (problem,) = bank.verify(three)
    assert re.search(message, problem)


def test_longer_texts_than_the_base_can_are_refused(three):
    path = three / manifests.NAME
    path.write_text(json.dumps(manifests.signed(json.loads(path.read_text()) | {"max_length": 65})))
    with pytest.raises(UserError, match=r"max_length 65, .* has 64"):
        jaxlora.load(three)


def test_an_update_repairs_a_damaged_task(runs, three):
    answers = values(jaxlora.load(three))
    head = next((three / bank.HEADS).glob("sst-*"))
    data = max(head.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data.write_bytes(b"")
    assert bank.verify(three)
    bank.add(three, bank.load(runs / "lora1"), ["sst"], replace=True)
    assert bank.verify(three) == []
    np.testing.assert_array_equal(values(jaxlora.load(three)), answers)


def test_a_first_change_that_was_killed_is_no_obstacle(runs, tmp_path, monkeypatch):
    def die(*args):
        raise Killed

    monkeypatch.setattr(files, "write_json", die)
    with pytest.raises(Killed):
        bank.add(tmp_path / "bank", bank.load(runs / "lora1"), ["sst"])
    monkeypatch.undo()
    assert (tmp_path / "bank" / bank.HEADS).is_dir()
    bank.add(tmp_path / "bank", bank.load(runs / "lora1"), ["sts"])
    assert list(jaxlora.load(tmp_path / "bank").tasks) == ["sts"]
    assert not list((tmp_path / "bank" / bank.HEADS).glob("sst-*"))


def test_numbers_that_are_not_finite_are_refused(runs, three):
    source = bank.load(runs / "again")
    source.models["sst"].head["out"]["bias"] = np.full(5, np.nan, np.float32)
    with pytest.raises(UserError, match="not finite"):
        bank.add(three, source, ["sst"], replace=True)


def test_a_reader_sees_one_moment(three, runs, monkeypatch):
    """A task and its versions go after the manifest was read and before its trees are."""
    real, calls = manifests.read, []

    def read(folder):
        found = real(folder)
        if not calls:
            calls.append(1)
            bank.remove(three, "sts")
            bank.add(three, bank.load(runs / "again"), ["sts"])
        return found

    monkeypatch.setattr(manifests, "read", read)
    opened = bank.load(three)
    with pytest.raises(UserError, match="the bank was changed since it was opened"):
        opened.trees[opened.models["sts"].tree]
    opened = bank.load(three)
    assert opened.configs[opened.models["sts"].tree].rank == 2
    assert opened.trees[opened.models["sts"].tree]


def test_a_manifest_that_is_no_json(three):
    (three / manifests.NAME).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        bank.load(three)


# ---- the command


@pytest.fixture
def call(monkeypatch, capsys):
    monkeypatch.setattr(process, "keep_programs", lambda folder: None)
    monkeypatch.setattr(process, "reuse_memory", lambda: None)

    def command(*args):
        code = main.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return command


def test_the_commands(runs, tmp_path, call):
    folder = tmp_path / "bank"
    assert call("bank", "add", folder, "--run", runs / "lora1", "--task", "sst", "sts")[0] == 0
    assert call("bank", "add", folder, "--run", runs / "lora4", "--task", "para")[0] == 0
    code, shown = call("bank", "list", folder)
    assert code == 0
    assert all(text in shown for text in ("sst", "para", "sts", "3 tasks: ", "a full model"))
    assert call("bank", "update", folder, "--run", runs / "again", "--task", "sts")[0] == 0
    code, shown = call("bank", "show", folder, "sts")
    assert json.loads(shown)["lora"]["rank"] == 2
    code, shown = call("bank", "verify", folder)
    assert (code, "all is well" in shown) == (0, True)
    assert call("bank", "remove", folder, "para")[0] == 0
    assert list(jaxlora.load(folder).tasks) == ["sst", "sts"]
    code, shown = call("predict", "--bank", folder, "--task", "sts", *PAIR)
    assert float(shown) == pytest.approx(values_of(folder, "sts"), abs=1e-4)
    code, shown = call("predict", "--bank", folder, "--task", "sst", "a film")
    assert (code, shown.split()[0]) == (0, jaxlora.load(folder)([("sst", "a film")])[0].label)
    biggest = max(corrupt_every(folder), key=lambda p: p.stat().st_size)
    biggest.write_bytes(b"")
    assert call("bank", "verify", folder)[0] == 2


def test_the_commands_refuse(three, call, tmp_path):
    for args, message in [
        (("bank", "remove", three, "stt"), "it has sst, para, sts"),
        (("predict", "--bank", three, "--task", "stss", "a", "b"), "did you mean sts?"),
        (("predict", "--bank", three, "a"), "--task is missing"),
        (("predict", "--bank", three, "--task", "sts", "a"), "sts takes pairs"),
        (("predict", "--bank", three), "give --task and texts"),
        (
            ("predict", "--bank", tmp_path / "none", "--task", "sts", "a", "b"),
            "neither a bank nor a finished run",
        ),
        (("bnk",), "unknown command 'bnk'"),
    ]:
        code, shown = call(*args)
        assert code == 2
        assert message in shown


def test_exported_and_imported_it_is_the_same_bit_for_bit(runs, three, tmp_path, call):
    again = tmp_path / "again"
    for task in ("sst", "sts"):
        assert call("export", "peft", tmp_path / task, "--bank", three, "--task", task)[0] == 0
        code, shown = call("import", "peft", tmp_path / task, "--bank", again, "--as", task)
        assert (code, shown) == (0, f"{again}: added {task}\n")
    before, after = bank.load(three), bank.load(again)
    for task in ("sst", "sts"):
        old, new = before.models[task], after.models[task]
        assert (new.task, new.pair_features, new.facts) == (old.task, old.pair_features, old.facts)
        assert trees.checksum(new.head) == trees.checksum(old.head)
        assert trees.checksum(after.trees[new.tree]) == trees.checksum(before.trees[old.tree])
        assert after.configs[new.tree] == before.configs[old.tree]
    assert (after.pooling, after.max_length) == (before.pooling, before.max_length)
    code, shown = call("import", "peft", tmp_path / "sst", "--bank", again, "--as", "sst")
    assert (code, "has sst already" in shown) == (2, True)
    code, _ = call("import", "peft", tmp_path / "sst", "--bank", again, "--as", "sst", "--update")
    assert code == 0


def test_peft_reads_an_exported_task(three, tiny_base, tmp_path, call):
    peft = pytest.importorskip("peft")
    call("export", "peft", tmp_path / "sst", "--bank", three, "--task", "sst")
    plain = peft_oracle.bert(tiny_base)
    predictor = jaxlora.load(three)
    sentences = ["a very good film", "not good"]
    before = peft_oracle.vectors(plain, predictor.base.tokenizer, sentences, "mean")
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "sst").eval()
    after = peft_oracle.vectors(model, predictor.base.tokenizer, sentences, "mean")
    np.testing.assert_allclose(predictor.encode("sst", sentences), after, atol=1e-5)
    assert np.abs(after - before).max() > 1e-2
    text = (tmp_path / "sst" / export_merged.README).read_text()
    code = text.split("```python")[1].split("```")[0].replace('"."', repr(str(tmp_path / "sst")))
    defined = {}
    exec(code.replace(repr(tiny_base.name), repr(str(tiny_base))), defined)  # as a user would
    assert defined["predict"](sentences).tolist() == predictor.predict("sst", sentences).tolist()


def test_an_adapter_of_others_compares_texts(three, tiny_base, tmp_path, call):
    """peft made it; there is no head, so its task is the cosine of two vectors."""
    peft = pytest.importorskip("peft")
    import torch

    model = peft.get_peft_model(
        peft_oracle.bert(tiny_base), peft.LoraConfig(r=2, target_modules=["query", "value"])
    ).eval()
    for number, parameter in enumerate(peft_oracle.factors(model).values()):
        generator = torch.Generator().manual_seed(number)
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "theirs")
    flags = ("--bank", three, "--as", "alike")
    assert call("import", "peft", tmp_path / "theirs", *flags)[0] == 0
    predictor = jaxlora.load(three)
    u, v = peft_oracle.vectors(model, predictor.base.tokenizer, PAIR, "mean")
    expected = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    mixed = predictor([("sst", "not good"), ("alike", *PAIR)])
    assert mixed[1].value == pytest.approx(expected, abs=1e-5)
    fresh = ("--bank", tmp_path / "new", "--as", "alike", "--base", tiny_base)
    assert call("import", "peft", tmp_path / "theirs", *fresh)[0] == 0
    (alone,) = jaxlora.load(tmp_path / "new")([("alike", *PAIR)])
    assert alone.value == pytest.approx(expected, abs=1e-5)


def test_the_base_of_an_import(three, tiny, tiny_base, tmp_path, call, monkeypatch):
    """It is kept by its whole path, and its checksum is compared wherever it comes from."""
    assert call("export", "peft", tmp_path / "ours", "--bank", three, "--task", "sst")[0] == 0
    theirs = shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    (theirs / "jaxlora.json").unlink()
    (theirs / "head.safetensors").unlink()
    monkeypatch.chdir(tiny_base.parent)
    new = ("--bank", tmp_path / "new")
    flags = ("--base", tiny_base.name, "--base-sha256", tiny.fingerprint.weights)
    assert call("import", "peft", theirs, *new, "--as", "one", *flags)[0] == 0
    assert bank.load(tmp_path / "new").base == str(tiny_base)
    assert call("import", "peft", theirs, *new, "--as", "two", *flags)[0] == 0
    ours = ("import", "peft", tmp_path / "ours", "--bank", tmp_path / "ours-alone")
    assert call(*ours, "--as", "three", *flags) == (0, f"{tmp_path / 'ours-alone'}: added three\n")
    for number, folder in enumerate((theirs, tmp_path / "ours")):
        wrong = ("--as", f"no-{number}", "--base-sha256", "0" * 64)
        code, shown = call("import", "peft", folder, *new, *wrong)
        assert code == 2 and "--base-sha256 000" in shown


@pytest.mark.parametrize("task", ["sst", "sts"])
def test_a_merged_export_gives_the_banks_vectors(three, tmp_path, call, task):
    pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    code, _ = call("export", "merged", tmp_path / "m", "--bank", three, "--task", task)
    assert code == 0
    model = AutoModel.from_pretrained(tmp_path / "m", add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    batch = tokenizer(["a very good film"], return_tensors="pt")
    theirs = model(**batch).last_hidden_state.mean(1).detach().numpy()
    ours = jaxlora.load(three).encode(task, ["a very good film"])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_combined_in_a_bank(runs, three, call):
    assert call("combine", three, "--task", "sst", "sts", "--as", "both")[0] == 0
    weights = ("--weight", "2", "-0.5")
    assert call("combine", three, "--task", "sst", "sts", "--as", "low", *weights, "--rank", "3",
                "--head", "sts")[0] == 0  # fmt: skip
    kept = bank.load(three)
    assert kept.configs[kept.models["both"].tree].rank == 8
    assert kept.configs[kept.models["low"].tree].rank == 3
    assert kept.models["both"].task.classes and kept.models["low"].task.pair
    # Doubled and halved again it is the task itself.
    assert call("combine", three, "--task", "sst", "--weight", "1", "--as", "same")[0] == 0
    predictor = jaxlora.load(three)
    one, same = predictor([("sst", "a film"), ("same", "a film")])
    assert list(same.probabilities.values()) == pytest.approx(
        list(one.probabilities.values()), abs=1e-5
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("combine", "BANK", "--task", "sst", "stss", "--as", "x"), "did you mean sts?"),
        (("combine", "BANK", "--task", "sst", "sst", "--as", "x"), "names a task twice"),
        (("combine", "BANK", "--as", "x", "--task"), "--task: name at least one"),
        (("combine", "BANK", "--task", "sst", "--as", "sts"), "has sts already"),
        (("combine", "BANK", "--task", "sst", "--as", "../x"), "cannot be a name"),
        (
            ("combine", "BANK", "--task", "sst", "--weight", "1", "2", "--as", "x"),
            "2 weights for 1",
        ),
        (("combine", "BANK", "--task", "sst", "--rank", "0", "--as", "x"), "--rank must be"),
        (("export", "peft", "OUT", "--bank", "FROZEN", "--task", "sst"), "has no adapter"),
        (("export", "merged", "OUT", "--bank", "BANK", "--task", "x"), "no task 'x'"),
        (("export", "merged", "FULL", "--bank", "BANK", "--task", "sst"), "is not empty"),
        (("import", "peft", "OUT", "--bank", "BANK", "--as", "x"), "there is no such folder"),
        (("import", "peft", "BANK", "--bank", "BANK", "--as", "x" * 300), "cannot be a name"),
        (("import", "peft", "BANK", "--bank", "BANK", "--as", "x"), "adapter_config.json"),
    ],
)
def test_exchange_and_combination_refuse(runs, three, tmp_path, call, args, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    places = {
        "BANK": three, "OUT": tmp_path / "out", "FROZEN": runs / "baseline1",
        "FULL": tmp_path / "full",
    }  # fmt: skip
    before = hashes(three)
    code, shown = call(*(places.get(arg, arg) for arg in args))
    assert code == 2
    assert message in shown
    assert hashes(three) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a | {"fingerprint": NOBODYS}, "not the weights and config"),
        (lambda a: a | {"pooling": "max"}, "pooling: must be 'cls' or 'mean', not 'max'"),
        (lambda a: a | {"max_length": True}, "max_length: must be a whole number, not True"),
        (lambda a: a | {"facts": 3}, "changed by hand"),
        (
            lambda a: a | {"facts": {"dev": {"accuracy": "high"}}},
            "facts.dev.accuracy: must be a number, not 'high'",
        ),
        (
            lambda a: a | {"task": a["task"] | {"kind": "x"}},
            "task.kind: must be 'classification', 'binary'",
        ),
        (lambda a: a | {"task": {}}, "changed by hand"),
        (lambda a: a | {"more": 1}, "more: unknown field"),
        (lambda a: a | {"task": a["task"] | {"classes": ["a", "b"]}}, "head"),
    ],
)
def test_an_exported_task_changed_by_hand(three, tmp_path, call, edit, message):
    call("export", "peft", tmp_path / "sst", "--bank", three, "--task", "sst")
    path = tmp_path / "sst" / export_peft.ABOUT
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    code, shown = call("import", "peft", tmp_path / "sst", "--bank", three, "--as", "x")
    assert (code, message in shown) == (2, True), shown


HEADER = "id\ttask\tsentence1\tsentence2\n"


def test_a_table_is_answered_in_order_and_in_parts(three, call, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.serving.predict_table.PART", 3)
    source = tmp_path / "in.tsv"
    lines = [f"r{n}\t" + "\t".join([*REQUESTS[n % 4], ""][:3]) + "\n" for n in range(8)]
    source.write_text(HEADER + "".join(lines))
    expected = jaxlora.load(three)(REQUESTS) * 2
    code, shown = call(
        "predict", "--bank", three, "--input", source, "--output", tmp_path / "o.csv"
    )
    assert (code, "8 answers" in shown) == (0, True)
    with (tmp_path / "o.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"r{n}" for n in range(8)]
    for row, answer in zip(rows, expected, strict=True):
        assert float(row["prediction"]) == pytest.approx(answer.value, abs=1e-4)
        assert row["label"] == (answer.label or "")
    call("predict", "--bank", three, "--input", source, "--output", tmp_path / "o.jsonl")
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    for row, answer in zip(found, expected, strict=True):
        assert row["probabilities"] == (
            answer.probabilities and pytest.approx(answer.probabilities)
        )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(three, tmp_path, monkeypatch):
    """It is read and answered part by part."""
    monkeypatch.setattr("jaxlora.serving.predict_table.PART", 256)
    source, parts, memory = tmp_path / "in.tsv", 24, {}
    text = " ".join(["film"] * 40)  # cut to the bank's length: cheap to answer, costly to keep
    lines = [f"r{n}\tsst\t{n} {text}\t\n" for n in range(256 * parts)]
    source.write_text(HEADER + "".join(lines))

    def note(done):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        memory[done] = pages * resource.getpagesize()

    predictor = jaxlora.load(three)
    assert predict_file(predictor, source, tmp_path / "out.jsonl", None, note) == 256 * parts
    assert memory[256 * parts] - memory[256 * 8] < 3 * 2**20


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (HEADER + "a\tsst\tfilm\t\nb\tstt\tfilm\t\n", [":3", "'stt'", "sst, para, sts"]),
        ("id\ttask\tsentence1\na\tsts\tfilm\n", [":2", "pairs"]),
        (HEADER + "a\tsst\tfilm\tfilm\n", [":2", "single"]),
        (HEADER + "a\tsst\n", [":2", "2 fields"]),
        (HEADER + f"a\tsst\t{'x' * 10_000_000}\t\n", [":2", "field larger than"]),
        ('id,task,sentence1\na,sst,"x\n', [":2", "quote", "quoting none"]),
        ("id\ttask\n1\tsst\n", [":1", "no column sentence"]),
        (
            HEADER.replace("id", "sentence2", 1) + "a\tsst\tb\tc\n",
            [":1", "sentence2 occurs twice"],
        ),
        ("", ["in.tsv: is empty"]),
    ],
    ids=["task", "pair", "single", "short", "huge", "quote", "columns", "twice", "empty"],
)
def test_a_bad_table_leaves_no_half_answer(three, call, tmp_path, content, fragments):
    source, target = tmp_path / "in.tsv", tmp_path / "out.csv"
    source.write_text(content)
    target.write_text("old")
    code, shown = call("predict", "--bank", three, "--input", source, "--output", target)
    assert code == 2
    assert all(fragment in shown for fragment in fragments)
    assert target.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"bank", "in.tsv", "out.csv"}


def test_a_table_that_begins_with_a_blank_line(three, call, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("\nid,task,sentence\na,sst,film\n")
    assert call("predict", "--bank", three, "--input", source, "--output", target)[0] == 0
    assert target.read_text().splitlines()[1].startswith("a,sst,")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("in.tsv", "is the --input"),
        ("bank", "is a folder"),
        ("none/out.csv", "there is no folder"),
    ],
)
def test_where_answers_cannot_go(three, call, tmp_path, output, message):
    source = tmp_path / "in.tsv"
    source.write_text(HEADER + "a\tsst\tfilm\t\n")
    code, shown = call("predict", "--bank", three, "--input", source, "--output", tmp_path / output)
    assert (code, message in shown, "--output" in shown) == (2, True, True)
    assert source.read_text().startswith(HEADER)


def test_a_table_of_another_task_and_one_of_another_encoding(three, call, tmp_path):
    source, flags = tmp_path / "in.tsv", ("--output", tmp_path / "o.csv")
    source.write_text(HEADER + "a\tsst\tfilm\t\n")
    code, shown = call("predict", "--bank", three, "--task", "sts", "--input", source, *flags)
    assert (code, "is for 'sst'; leave out --task=sts" in shown) == (2, True)
    source.write_bytes(b"task,sentence1\nsst,caf\xe9\n")
    code, shown = call("predict", "--bank", three, "--input", source, *flags)
    assert (code, "UTF-8" in shown) == (2, True)


def test_names_with_markup_are_shown_as_they_are(runs, tmp_path, call):
    code, shown = call("bank", "add", tmp_path / "x[/y]", "--run", runs / "lora1")
    assert (code, "x[/y]: added sst, para, sts" in shown) == (0, True)


def test_truncated_texts_are_told(three, call, tmp_path):
    long = "film " * 40
    _, shown = call("predict", "--bank", three, "--task", "sst", long)
    assert "note: 1 text cut to 16 tokens" in shown
    table, out = tmp_path / "x.csv", tmp_path / "y.csv"
    table.write_text(f"sentence,label\n{long},1\na film,0\n{long},2\n")
    _, shown = call("predict", "--bank", three, "--task", "sst", "--input", table, "--output", out)
    assert "3 answers; 2 texts cut to 16 tokens" in shown
    _, shown = call("evaluate", three, "--task", "sst", "--input", table)
    assert "note: 2 texts cut to 16 tokens" in shown


def test_an_empty_table_has_no_answers(three, call, tmp_path):
    source = tmp_path / "in.tsv"
    source.write_text("sentence\n")
    code, _ = call(
        "predict",
        "--bank",
        three,
        "--task",
        "sst",
        "--input",
        source,
        "--output",
        tmp_path / "o.csv",
    )
    assert code == 0
    assert (tmp_path / "o.csv").read_text() == "id,task,prediction,label,probability,reason\n"

import copy
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import SHORT, Silent, leaves_equal, trained_trees

import jaxlora
from jaxlora.formats import huggingface
from jaxlora.serving import inference
from jaxlora.tasks.task import NAMES
from jaxlora.training import inputs as prepare
from jaxlora.training import loop, metrics_log, optimizer, run_folder, task_group
from jaxlora.training import run as train
from jaxlora.training.parameter_count import ParameterCount
from jaxlora.training.run import RunOptions
from jaxlora.training.sharding import make_mesh
from jaxlora.training.step import TrainStep
from jaxlora.utils.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("rate", "same"), [(0.0, True), (0.5, False)])
def test_encoder_dropout_reaches_the_encoder(make, rate, same):
    settings = make("lora2", encoder_dropout=rate)
    base = huggingface.load(settings.model.base)
    made = task_group.make_cohort(
        settings, base, prepare.load_data(settings, base), (("sts",),), make_mesh("data=1")
    )
    one, other = (
        made.train_step.adaptation.encode_tasks(made.train_step.encode, [1])(
            made.frozen, [made.states["sts"].trainable], made.batches[0].inputs, jax.random.key(n)
        )[0]
        for n in range(2)
    )
    assert bool((one == other).all()) == same


@pytest.mark.parametrize(("surgery", "sign"), [("pcgrad", -1), ("none", 1)])
def test_surgery_reaches_the_optimizer(make, surgery, sign):
    """The sum of these is (-2, 1), PCGrad's (0.1, 1.3); Adam's first step has the other sign."""
    settings = make("lora3", surgery=surgery)
    base = huggingface.load(settings.model.base)
    data = prepare.load_data(settings, base)
    made = task_group.make_cohort(settings, base, data, settings.groups, make_mesh("data=1"))
    (group,) = made.train_step.groups.values()
    params = {"kernel": jax.numpy.zeros(2)}
    gradients = {"kernel": jax.numpy.array([[1.0, 0.0], [-3.0, 1.0], [0.0, 0.0]])}
    state = group.tx.init(params)
    updates, _ = jax.jit(group.tx.update)(gradients, state, params)
    assert np.sign(updates["kernel"]).tolist() == [sign, -1]


def test_the_result_is_made_of_the_progress_and_leaves_it_as_it_is(make):
    done = loop.Progress(step=3, seconds=2.0, best_scores={"sst": 0.5}, untrained={"sst": 0.1})
    progress = {"sst+para+sts": dataclasses.asdict(done)}
    before = copy.deepcopy(progress)
    made = train.summarize_result(make("lora3"), ParameterCount(*range(5)), progress, {})
    assert progress == before
    assert (made["dev"], made["untrained"]) == ({"sst": 0.5}, {"sst": 0.1})
    assert made["groups"]["sst+para+sts"].keys() == {
        "step", "seconds", "best_step", "best_score", "best_seconds", "stale", "skipped", "done",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "groups"),
    [
        ("baseline1", None),
        pytest.param("lora1", None, marks=pytest.mark.slow),
        ("lora3", None),
        pytest.param("lora4", "sst|para,sts", marks=pytest.mark.slow),
        pytest.param("baseline3", None, marks=pytest.mark.slow),
    ],
)
def test_run_writes_everything(make, tmp_path, variant, groups):
    settings = make(variant, groups=groups)
    callback = Silent()
    result = train.run(settings, tmp_path / "run", callback)
    out = tmp_path / "run"
    for name in (
        "config.json",
        "metrics.jsonl",
        "result.json",
        "dev.html",
        "model",
        "tensorboard",
    ):
        assert (out / name).exists(), name
    assert json.loads((out / "result.json").read_text()) == result
    assert set(result["dev"]) == set(NAMES)
    page = (out / "dev.html").read_text()
    for name, score in result["dev"].items():
        row = f'<td>{settings.named[name].metric_name}</td>\n<td class="number">{score:.4f}</td>'
        assert row in page, name
    assert result["parameters"] == callback.summaries[0].storage._asdict()
    assert not (out / run_folder.STATES).exists()
    records = metrics_log.read_records(out)
    assert records == callback.records
    steps = callback.summaries[0].steps
    check_rates(settings, steps, [r for r in records if r["kind"] == "train"])
    # the best score that was seen is the one that is reported
    for name, progress in result["groups"].items():
        scores = [r["score"] for r in records if r["kind"] == "eval" and r["group"] == name]
        assert progress["best_score"] == max(scores)
        assert progress["step"] == callback.summaries[0].steps[name]


def test_a_run_without_jinja_has_no_page(make, tmp_path, monkeypatch):
    # What imports Jinja, which an earlier test of this process may have imported.
    for package, module in (("serving", "evaluation_page"), ("utils", "pages")):
        monkeypatch.delitem(sys.modules, f"jaxlora.{package}.{module}", raising=False)
        monkeypatch.delattr(f"jaxlora.{package}.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    callback = Silent()
    train.run(make("baseline1", max_steps=1, only=("sst",)), tmp_path / "run", callback)
    assert (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "dev.html").exists()
    (note,) = callback.notes
    assert "dev.html is not written: jinja2 is not installed" in note and "[serve]" in note


def check_rates(settings, steps, records):
    """Two steps of warm-up, then down to 0 in a line; norms beside them."""
    peaks = {"heads": settings.optimizer.head_learning_rate}
    if settings.adaptation.trains_encoder:
        peaks["encoder"] = settings.optimizer.learning_rate
    for record in records:
        taken, last = record["step"], steps[record["group"]]
        share = taken / 2 if taken <= 2 else 1 - (taken - 1 - 2) / (last - 2)
        wanted = {name: peak * share for name, peak in peaks.items()}
        assert record["learning_rate"] == pytest.approx(wanted, rel=1e-5)
        assert record["head_grad_norm"] > 0
        assert (record["grad_norm"] > 0) == ("encoder" in peaks)


def test_predictions_match_the_restored_model(finished_lora3, data_dir):
    model = jaxlora.load(finished_lora3)
    for task, file in (("sst", "ids-sst"), ("para", "quora"), ("sts", "sts")):
        with (data_dir / f"{file}-test-student.csv").open() as source:
            rows = list(csv.DictReader(source, delimiter="\t"))
        with (finished_lora3 / "predictions" / f"{task}-test.csv").open() as predicted:
            written = list(csv.DictReader(predicted))
        assert [r["id"] for r in written] == [r["id"] for r in rows]
        columns = ["sentence"] if task == "sst" else ["sentence1", "sentence2"]
        examples = [r[columns[0]] if task == "sst" else tuple(r[c] for c in columns) for r in rows]
        values = np.array([float(r["prediction"]) for r in written])
        np.testing.assert_allclose(model.predict(task, examples), values, atol=1e-4)
        low, high = {"sst": (0, 4), "para": (0, 1), "sts": (0, 5)}[task]
        assert values.min() >= low and values.max() <= high
        if task != "sts":
            assert all(r["prediction"] in set("01234") for r in written)


@pytest.mark.parametrize("variant", ["lora3", pytest.param("lora2", marks=pytest.mark.slow)])
def test_dev_predictions_stand_beside_their_labels(make, data_dir, tmp_path, variant):
    result = train.run(make(variant), tmp_path / "run", Silent())
    model = jaxlora.load(tmp_path / "run")
    records = metrics_log.read_records(tmp_path / "run")
    evaluations = [r for r in records if r["kind"] == "eval" and "sst" in r["dev"]]
    for task, file in (("sst", "ids-sst"), ("para", "quora"), ("sts", "sts")):
        with (data_dir / f"{file}-dev.csv").open() as source:
            given = list(csv.DictReader(source, delimiter="\t"))
        with (tmp_path / "run" / "predictions" / f"{task}-dev.csv").open() as predicted:
            written = list(csv.DictReader(predicted))
        classes = [f"p({name})" for name in model.tasks[task].classes] if task != "sts" else []
        names = ["predicted_class", "label_class", "confidence", *classes] if classes else []
        assert list(written[0]) == ["id", "prediction", "label", *names]
        assert [r["id"] for r in written] == [r["id"] for r in given]
        label = {"sst": "sentiment", "para": "is_duplicate", "sts": "similarity"}[task]
        labels = [float(r[label]) for r in given]
        np.testing.assert_allclose([float(r["label"]) for r in written], labels, rtol=1e-6)
        predictions = np.array([float(r["prediction"]) for r in written])
        score = model.tasks[task].score(predictions, np.array(labels, np.float32))
        assert score == pytest.approx(result["dev"][task], abs=1e-4)
        texts = [
            r["sentence"] if task == "sst" else (r["sentence1"], r["sentence2"]) for r in given
        ]
        asked = [(task, text) if task == "sst" else (task, *text) for text in texts]
        for answer, row in zip(model(asked), written, strict=True):
            if task != "sts":
                assert row["predicted_class"] == answer.label
                assert row["label_class"] == str(int(float(row["label"])))
                chosen = answer.probabilities[answer.label]
                assert float(row["confidence"]) == pytest.approx(chosen, abs=2e-4)
                shown = {name: float(row[f"p({name})"]) for name in answer.probabilities}
                assert shown == pytest.approx(answer.probabilities, abs=2e-4)
        if task == "sst":
            best = max(evaluations, key=lambda record: record["score"])
            chances = [
                a.probabilities[r["label_class"]]
                for a, r in zip(model(asked), written, strict=True)
            ]
            assert best["dev_loss"]["sst"] == pytest.approx(-np.mean(np.log(chances)), abs=1e-4)


def test_the_time_to_the_best_score():
    progress = loop.Progress()
    for step, seconds, score in ((2, 1.5, 0.3), (4, 3.0, 0.7), (6, 4.5, 0.5)):
        progress.step, progress.seconds = step, seconds
        progress.note(score, {}, 0)
    assert (progress.best_step, progress.best_seconds) == (4, 3.0)


def test_synthetic_pairs_are_trained_on_and_belong_to_the_inputs(make):
    plain, more = (make("lora4", synthetic_sts=added) for added in (False, True))
    base = huggingface.load(plain.model.base)
    without, added = (prepare.load_data(settings, base) for settings in (plain, more))
    own = without["sts"]["train"]
    assert len(added["sts"]["train"]) == len(own) + 2000
    assert added["sts"]["train"].ids[: len(own)].tolist() == own.ids.tolist()
    for task, split in (("sts", "dev"), ("sts", "test"), ("sst", "train"), ("para", "train")):
        assert len(added[task][split]) == len(without[task][split])
    prints = [prepare.fingerprints(base, data, 0) for data in (without, added)]
    differ = {name for name in prints[0] if prints[0][name] != prints[1][name]}
    assert differ == {"the data of sts", "the order of examples"}


def test_no_test_predictions_when_not_asked(make, tmp_path):
    train.run(make("baseline1"), tmp_path / "run", Silent(), RunOptions(predict_test=False))
    names = {p.name for p in (tmp_path / "run" / "predictions").iterdir()}
    assert names == {"sst-dev.csv", "para-dev.csv", "sts-dev.csv"}


@pytest.mark.parametrize(
    ("variant", "stop_at"),
    [("lora3", ("sst+para+sts", 2)), ("baseline1", ("sst", 2)),
     pytest.param("lora1", ("para", 4), marks=pytest.mark.slow),
     pytest.param("lora3", ("sst+para+sts", 6), marks=pytest.mark.slow),
     pytest.param("baseline2", ("sst+para+sts", 4), marks=pytest.mark.slow)],
)  # fmt: skip
def test_resume_equals_uninterrupted(make, tmp_path, variant, stop_at):
    settings = make(variant)
    whole = train.run(settings, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        train.run(settings, tmp_path / "parts", Silent(stop_at))
    assert not (tmp_path / "parts" / "result.json").exists()
    with pytest.raises(UserError, match="the run is not finished"):
        jaxlora.load(tmp_path / "parts")
    again = Silent()
    parts = train.run(settings, tmp_path / "parts", again, RunOptions(resume=True))
    banks = [trained_trees(tmp_path / name) for name in ("whole", "parts")]
    leaves_equal(*banks)
    assert parts["dev"] == whole["dev"]
    timeless = [
        [
            {k: v for k, v in r.items() if k != "steps_per_second"}
            for r in metrics_log.read_records(tmp_path / name)
        ]
        for name in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


def test_resume_goes_on_from_the_checkpoint_and_not_from_the_start(make, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train.run(make("lora3"), tmp_path / "run", Silent(("sst+para+sts", 6)))
    callback = Silent()
    train.run(make("lora3"), tmp_path / "run", callback, RunOptions(resume=True))
    assert callback.started == ("sst+para+sts", 4, 7)


def test_a_finished_run_is_not_trained_again(make, tmp_path):
    first = train.run(make("baseline1"), tmp_path / "run", Silent())
    callback = Silent()
    assert (
        train.run(make("baseline1"), tmp_path / "run", callback, RunOptions(resume=True)) == first
    )
    assert callback.records == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora3", "lora1"])
def test_killed_process_resumes_to_the_same_parameters(variant, tiny_base, data_dir, tmp_path):
    flags = [f"--base={tiny_base}", f"--data-dir={data_dir}", f"--variant={variant}"]
    flags += [f"--{k.replace('_', '-')}={v}" for k, v in (SHORT | {"epochs": 12}).items()]

    def start(out, *more):
        command = [sys.executable, str(ROOT / "experiments" / "run.py"), *flags, *more]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, f"--out={tmp_path / out}"], **quiet)

    process = start("killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"step": 12,' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    assert start("killed", "--resume").wait() == 0
    assert start("whole").wait() == 0
    leaves_equal(*(trained_trees(tmp_path / n) for n in ("killed", "whole")))


@pytest.mark.parametrize("variant", ["lora1", pytest.param("lora3", marks=pytest.mark.slow)])
def test_at_most_three_train_programs(make, tmp_path, monkeypatch, variant):
    """A step compiles once for each shape of its batches, also where groups train side by side."""
    shapes = []
    compile_step = TrainStep.compile

    def noting(self, shardings):
        compiled, seen = compile_step(self, shardings), set()
        shapes.append(seen)

        def step(states, frozen, batch):
            seen.add(tuple(x.shape for x in jax.tree.leaves(batch)))
            return compiled(states, frozen, batch)

        return step

    monkeypatch.setattr(TrainStep, "compile", noting)
    train.run(make(variant), tmp_path / "run", Silent())
    assert len(shapes) == 1 and 1 <= len(shapes[0]) <= 3


def test_patience_stops_a_group(make, tmp_path):
    settings = make("baseline1", patience=1, epochs=50, head_learning_rate=1e-12)
    result = train.run(settings, tmp_path / "run", Silent())
    # nothing is learnt, so the second evaluation is not better than the first
    assert {g["step"] for g in result["groups"].values()} == {4}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_says_so(make, tmp_path):
    settings = make("baseline2", learning_rate=1e30, warmup_steps=0, epochs=3)
    with pytest.raises(
        UserError, match=r"step \d of sst\+para\+sts: .* not finite; lower `learning_rate`"
    ):
        train.run(settings, tmp_path / "run", Silent())


def test_model_names_what_is_wrong_with_a_request(make, tmp_path):
    train.run(make("baseline1"), tmp_path / "run", Silent())
    model = jaxlora.load(tmp_path / "run")
    with pytest.raises(UserError, match="no task 'stss'"):
        model.predict("stss", ["a"])
    with pytest.raises(UserError, match="pairs of sentences; example 1"):
        model.predict("sts", [("a", "b"), "c"])
    with pytest.raises(UserError, match="single sentences"):
        model.predict("sst", [("a", "b")])
    with pytest.raises(UserError, match="not one string"):
        model.predict("sst", "a film")
    with pytest.raises(UserError, match="single sentences"):
        model.predict("sst", [3])
    with pytest.raises(UserError, match="blank"):
        model.predict("sts", [("a", " ")])
    assert model.predict("sst", []).shape == (0,)


def test_a_bank_names_no_device_so_that_it_loads_on_any(finished_lora3):
    """Orbax keeps the devices of `jax.Array`s in files of this name, as in a run's states."""
    assert not list((finished_lora3 / "model").rglob("_sharding"))


def test_a_score_that_is_no_number_is_never_the_best():
    progress = loop.Progress(step=2)
    assert not progress.note(float("nan"), {"a": float("nan")}, 0)
    assert progress.best_scores == {} and progress.stale == 1
    progress.step = 4
    assert progress.note(0.25, {"a": 0.25}, 0)
    progress.step = 6
    assert not progress.note(float("nan"), {"a": float("nan")}, 0)
    assert (progress.best_step, progress.best_score) == (4, 0.25)


def test_a_run_without_any_score_keeps_nothing(make, tmp_path, monkeypatch):
    decode = inference.decode
    monkeypatch.setattr(inference, "decode", lambda *args: decode(*args) * np.nan)
    for resume in (False, True):
        with pytest.raises(UserError, match=r"not finite \(NaN\) at every evaluation"):
            train.run(make("baseline1"), tmp_path / "run", Silent(), RunOptions(resume=resume))
    assert not (tmp_path / "run" / "model").exists()


def test_warm_up_wastes_no_step_and_the_rate_ends_at_nothing():
    rate = optimizer.schedule(0.8, 12, warmup=4, decay="linear")
    np.testing.assert_allclose([rate(k) for k in range(5)], [0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-6)
    assert rate(12) == 0
    for share in (0.3, 0.34):  # of 12 steps: 4
        by_share = optimizer.schedule(0.8, 12, warmup=share, decay="linear")
        assert [by_share(k) for k in range(13)] == [rate(k) for k in range(13)]
    constant = optimizer.schedule(0.8, 12, warmup=0, decay="constant")
    assert constant(0) == constant(11) == np.float32(0.8)


@pytest.mark.parametrize(
    "variant",
    [
        "lora3",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("baseline1", "baseline4", "lora2")),
    ],
)
def test_mixed_requests_are_answered_as_one_task_at_a_time(variant, make, tmp_path):
    fast = {} if variant == "baseline1" else {"learning_rate": 0.05}  # so that trees differ
    train.run(make(variant, **fast), tmp_path / "run", Silent())
    model = jaxlora.load(tmp_path / "run")
    pairs = [("the dog runs", "a cat runs in a film"), ("a bad film", "not a very good film")]
    requests = [
        ("sts", *pairs[0]), ("sst", "the film was not very good"), ("para", *pairs[0]),
        ("para", *pairs[1]), ("sst", "a dog"), ("sts", *pairs[1]), ("sst", "good"),
    ]  # fmt: skip
    answers = np.array([answer.value for answer in model(requests)])
    assert answers.shape == (7,)
    for task in ("sst", "para", "sts"):
        mine = [n for n, request in enumerate(requests) if request[0] == task]
        texts = [requests[n][1:] if task != "sst" else requests[n][1] for n in mine]
        np.testing.assert_allclose(answers[mine], model.predict(task, texts), atol=1e-5)
    assert model([]) == []
    with pytest.raises(UserError, match="no task 'stt'"):
        model([("stt", "a film")])
    for wrong, message in [
        ([("sst", "a film"), ("sts", "a film")], "sts takes pairs of sentences; request 1"),
        ([("sts", ("a dog", "a cat"))], "give .task, sentence. or"),
        ([()], "without a sentence"),
        ([None], "the request is None"),
        ("sst", "request 0 is 's'"),
        (("sst", "a film"), "request 0 is 'sst'"),
        ([("sst", " ")], "sst: the request has a blank sentence"),
    ]:
        with pytest.raises(UserError, match=message):
            model(wrong)
    every = (("sst", "a dog") for _ in range(2))  # any iterable will do
    assert [answer.value for answer in model(every)] == [answers[4]] * 2

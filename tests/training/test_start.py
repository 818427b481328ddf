"""Training goes on from the adapters and heads of a bank."""

import json
import shutil

import numpy as np
import pytest
from tiny import Silent, leaves_equal, trained_trees

from jaxlora.formats import huggingface
from jaxlora.serving import bank
from jaxlora.training import inputs, run, run_folder, task_group
from jaxlora.training.run import RunOptions
from jaxlora.training.sharding import make_mesh
from jaxlora.training.start import load_start
from jaxlora.utils.errors import UserError

FLAGS = {"only": ("sst",), "max_steps": 2, "learning_rate": 0.05, "head_learning_rate": 0.05}


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """A run of one task."""
    out = tmp_path_factory.mktemp("start") / "first"
    run.run(make("lora1", **FLAGS), out, Silent())
    return out


def test_the_first_state_is_what_the_bank_has(make, trained, tiny):
    settings = make("lora1", **FLAGS, start_from=str(trained), seed=5)
    start = load_start(settings, tiny)
    data, mesh = inputs.load_data(settings, tiny), make_mesh("data=1")
    cohorts = [
        task_group.make_cohort(settings, tiny, data, settings.groups, mesh, *more)
        for more in ((), (start,))
    ]
    fresh, begun = (cohort.states["sst"] for cohort in cohorts)
    found = bank.load(trained)
    leaves_equal(begun.trainable, found.trees[found.models["sst"].tree])
    leaves_equal(begun.heads["sst"], found.models["sst"].head)
    assert any(np.any(x != 0) for x in _factors(begun.trainable, "B"))
    assert not any(np.any(x != 0) for x in _factors(fresh.trainable, "B"))
    leaves_equal(begun.opt_state, fresh.opt_state)


def _factors(tree, name):
    if not isinstance(tree, dict):
        return []
    own = [tree[name]] if name in tree else []
    return own + [x for part in tree.values() for x in _factors(part, name)]


def test_a_run_records_its_start_and_is_resumed_with_it_alone(make, trained, tmp_path):
    settings = make("lora1", **FLAGS, start_from=f"{trained}:sst")
    run.run(settings, tmp_path / "run", Silent())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert len(config["inputs"]["the start of sst"]) == 64
    gone = make("lora1", **FLAGS, start_from=str(tmp_path / "gone"))
    for one in (settings, gone):  # it is finished
        assert run.run(one, tmp_path / "run", Silent(), RunOptions(resume=True))
    with pytest.raises(UserError, match=r"\n  `start_from`: a bank there, nothing here$"):
        run_folder.check(tmp_path / "run", make("lora1", **FLAGS).to_json(), resume=True)
    with pytest.raises(UserError, match="the start of sst changed since"):
        run_folder.check_same_inputs(tmp_path / "run", {"the start of sst": "other"})


class EndsAt(Silent):
    """Ends a run at an evaluation, before its state is saved."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def record(self, record):
        if (record["kind"], record["step"]) == ("eval", self.step):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_has_a_state_goes_on_without_its_start(make, trained, tmp_path):
    start = shutil.copytree(trained, tmp_path / "start")
    flags = FLAGS | {"max_steps": 6, "eval_every": 2, "start_from": str(start)}
    settings = make("lora1", **flags)
    run.run(settings, tmp_path / "whole", Silent())
    for name, step in (("parts", 4), ("early", 2)):
        with pytest.raises(KeyboardInterrupt):
            run.run(settings, tmp_path / name, EndsAt(step))
    shutil.rmtree(start)
    went_on = Silent()
    run.run(settings, tmp_path / "parts", went_on, RunOptions(resume=True))
    assert went_on.started[:2] == ("sst", 2)
    leaves_equal(*(trained_trees(tmp_path / name) for name in ("whole", "parts")))
    run.run(settings, tmp_path / "whole", Silent(), RunOptions(resume=True))  # it is finished
    with pytest.raises(UserError, match="neither a bank nor a finished run"):
        run.run(settings, tmp_path / "early", Silent(), RunOptions(resume=True))


def test_longer_training_of_a_finished_run_names_the_remedy(make, trained):
    longer = make("lora1", **FLAGS | {"max_steps": 4})
    with pytest.raises(UserError, match=r"it is finished; train on .* `start_from=.*first`"):
        run_folder.check(trained, longer.to_json(), resume=True)


BAD = {
    "rank": ({"rank": 3}, r"`rank` 3: .* has 4; take the same"),
    "modules": ({"target_modules": ("query",)}, r"`target_modules` query: .* has "),
    "pooling": ({"pooling": "cls"}, r"`pooling` cls: .* has mean"),
    "variant": (
        {"variant": "baseline1", "rank": None, "encoder_dropout": None},
        "`variant` baseline1",
    ),
    "task": ({"start": ":para"}, "no task 'para'; there are sst"),
    "several": (
        {"only": ("sst", "para"), "start": ":sst"},
        "names one task, but several are trained",
    ),
    "missing": ({"start": "-not-there"}, "neither a bank nor a finished run"),
}


@pytest.mark.parametrize(("change", "match"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_by_name(make, trained, tiny, change, match):
    change = {"variant": "lora1", "start": "", **FLAGS, **change}
    variant, place = change.pop("variant"), f"{trained}{change.pop('start')}"
    if variant == "baseline1":
        del change["learning_rate"]
    settings = inputs.fit_to_base(make(variant, **change, start_from=place))
    with pytest.raises(UserError, match=match):
        load_start(settings, tiny)


def test_another_base_is_refused(make, trained, minilm):
    settings = make("lora1", **FLAGS, start_from=str(trained))
    assert huggingface.MINILM
    with pytest.raises(UserError, match=r"`start_from` .*: has another weights"):
        load_start(settings, minilm)

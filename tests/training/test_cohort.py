"""Groups that train in one step end where each ends by itself."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from tiny import Silent, trained_trees

from jaxlora.formats import huggingface
from jaxlora.tasks.sharing import group_name
from jaxlora.training import adaptation, inputs, metrics_log, task_group
from jaxlora.training import run as train
from jaxlora.training.sharding import make_mesh

STEPS = 50


def batches_of(cohort):
    """Batches in which any group takes part."""
    return (batch for _, batch in cohort.prefetch(0))


def after(settings, base, data, groups, steps):
    """The states of some groups after so many steps."""
    cohort = task_group.make_cohort(settings, base, data, groups, make_mesh("data=1"))
    states, train_step = cohort.states, cohort.compile()
    for batch in itertools.islice(batches_of(cohort), steps):
        states, _ = train_step(states, cohort.frozen, batch)
    return states


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("groups", "more"),
    [
        ("sst|para|sts", {}),
        pytest.param("sst|para,sts", {"lora_plus_ratio": 4.0}, marks=pytest.mark.slow),
        pytest.param("sst,sts|para", {"lora_dropout": 0.0, "patience": 3}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("side_by_side", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_each_group_ends_where_it_ends_alone(make, groups, more, side_by_side, monkeypatch):
    """Sizes differ, so small groups take part in some steps alone; the heads have dropout."""
    monkeypatch.setattr(adaptation, "MOST_SIDE_BY_SIDE", 4 if side_by_side else 1)
    settings = make("lora1", groups=groups, encoder_dropout=0.0, epochs=8, **more)
    settings = dataclasses.replace(
        settings, lora=dataclasses.replace(settings.lora, rank_pattern={"value": 2})
    )
    base = huggingface.load(settings.model.base)
    data = inputs.load_data(settings, base)
    together = after(settings, base, data, settings.groups, STEPS)
    steps = {name: int(state.step) for name, state in together.items()}
    planned = inputs.count_steps(settings, data)
    for name, count in planned.items():
        assert abs(steps[name] - STEPS * count / max(planned.values())) < 1
    assert len(set(steps.values())) > 1
    for names in settings.groups:
        own = steps[group_name(names)]
        ((name, alone),) = after(settings, base, data, (names,), own).items()
        for part in ("trainable", "heads"):
            found, expected = getattr(together[name], part), getattr(alone, part)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), found, expected
            )


@pytest.mark.slow
def test_groups_end_at_their_own_time_and_say_why(make, tmp_path):
    """Rates of 0 stop para for want of a better score; the others take all their steps."""
    settings = make("lora1", encoder_dropout=0.0, epochs=3)
    own = (("learning_rate", 1e-30), ("head_learning_rate", 1e-30), ("patience", 2))
    specs = tuple(
        dataclasses.replace(spec, own=own) if spec.task.name == "para" else spec
        for spec in settings.tasks
    )
    settings, callback = dataclasses.replace(settings, tasks=specs), Silent()
    result = train.run(settings, tmp_path / "run", callback)
    assert callback.ends == {
        "sst": "all 15 steps taken",
        "para": "no better score in 2 evaluations",
        "sts": "all 12 steps taken",
    }
    assert {name: one["step"] for name, one in result["groups"].items()} == {
        "sst": 15, "para": 6, "sts": 12,
    }  # fmt: skip
    records = metrics_log.read_records(tmp_path / "run")
    for name, last in (("sst", 15), ("para", 6), ("sts", 12)):
        own = [r["step"] for r in records if r["group"] == name]
        assert own == sorted(own) and own[-1] == last
    # What has ended early is as if the others had not gone on.
    only = make("lora1", only=("para",), encoder_dropout=0.0, epochs=3)
    only = dataclasses.replace(only, tasks=tuple(s for s in specs if s.task.name == "para"))
    train.run(only, tmp_path / "alone", Silent())
    both = [trained_trees(tmp_path / n)["para"] for n in ("run", "alone")]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), *both)

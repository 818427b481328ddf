"""Groups that train in one step end where each ends by itself."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import Silent, trained_trees

from jaxlora.formats import huggingface
from jaxlora.training import inputs, metrics_log, task_group
from jaxlora.training import run as train
from jaxlora.training.sharding import make_mesh

STEPS = 50


@pytest.fixture(scope="module")
def quick_compilation():
    """These tests compile several small programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def after(settings, base, data, groups):
    """The states of some groups after `STEPS` steps, or their end."""
    cohort = task_group.make_cohort(settings, base, data, groups, make_mesh("data=1"))
    states, train_step = cohort.states, cohort.compile()
    for batch, _ in zip(cohort.prefetch(0), range(STEPS), strict=False):
        states, _ = train_step(states, cohort.frozen, batch)
    return states


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("groups", "more"),
    [
        ("sst|para|sts", {}),
        ("sst|para,sts", {"lora_plus_ratio": 4.0}),
        pytest.param("sst,sts|para", {"lora_dropout": 0.0, "patience": 3}, marks=pytest.mark.slow),
    ],
)
def test_each_group_ends_where_it_ends_alone(make, groups, more):
    """Sizes differ, so small groups end first; the heads have dropout."""
    settings = make("lora1", groups=groups, encoder_dropout=0.0, epochs=8, **more)
    settings = dataclasses.replace(
        settings, lora=dataclasses.replace(settings.lora, rank_pattern={"value": 2})
    )
    base = huggingface.load(settings.model.base)
    data = inputs.load_data(settings, base)
    together = after(settings, base, data, settings.groups)
    steps = {name: int(state.step) for name, state in together.items()}
    planned = inputs.count_steps(settings, data)
    assert steps == {name: min(STEPS, n) for name, n in planned.items()}
    assert len(set(steps.values())) > 1
    for names in settings.groups:
        ((name, alone),) = after(settings, base, data, (names,)).items()
        for part in ("trainable", "heads"):
            found, expected = getattr(together[name], part), getattr(alone, part)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), found, expected
            )


def test_groups_end_at_their_own_time_and_say_why(make, tmp_path):
    """sst has the fewest steps; para's rate is 0, so it is stopped for want of a better score."""
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

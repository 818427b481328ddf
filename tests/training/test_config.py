import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.lora import LoraConfig
from jaxlora.tasks.sharing import OWN, SEPARATE, SHARED, VARIANTS
from jaxlora.training.config import ModelConfig, Sections, Settings, flat_names
from jaxlora.training.presets import (
    EVALUATIONS,
    FEWEST_EPOCHS,
    FEWEST_STEPS,
    PRESETS,
    Preset,
    make_settings,
    pace,
)
from jaxlora.utils.errors import ConfigError, UserError


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_resolves_under_every_preset(name, preset):
    settings = make_settings(name, preset, data_dir=Path("x"))
    assert settings.groups == VARIANTS[name].groups
    assert Settings.from_json(settings.to_json()) == settings


def test_paper_preset_has_the_papers_settings():
    settings = make_settings("lora3", "paper")
    shown = (
        settings.model.base,
        settings.model.pooling,
        settings.model.pair_features,
        settings.lora.rank,
        settings.lora.alpha,
    )
    assert shown == ("bert-base-uncased", "cls", "concat", 15, 15)
    assert (settings.loop.batch_size, settings.optimizer.learning_rate, settings.data.source) == (
        8,
        1e-5,
        "official",
    )
    assert settings.model.encoder_dropout == 0.1
    assert make_settings("baseline1", "paper").optimizer.head_learning_rate == 1e-3


def test_flags_come_before_presets():
    settings = make_settings("lora3", rank=4, groups="sst|para,sts", learning_rate=0.5)
    assert (settings.lora.rank, settings.lora.alpha, settings.optimizer.learning_rate) == (
        4,
        4.0,
        0.5,
    )
    assert settings.groups == (("sst",), ("para", "sts"))
    assert make_settings("lora3", rank=4, alpha=8).lora.alpha == 8


def test_a_data_dir_means_cs224n():
    assert make_settings("lora3", data_dir=Path("x")).data.source == "cs224n"
    with pytest.raises(UserError, match="`data_dir`"):
        make_settings("lora3", data_dir=Path("x"), source="demo")
    with pytest.raises(UserError, match="`data_dir`: missing"):
        make_settings("lora3", "cs224n")


def test_table_one():
    kinds = {name: (v.adapt, v.groups is SHARED, v.sts_loss) for name, v in VARIANTS.items()}
    assert kinds == {
        "baseline1": ("frozen", False, "mse"),
        "baseline2": ("full", True, "mse"),
        "baseline3": ("full", True, "cosine"),
        "baseline4": ("full", False, "cosine"),
        "lora1": ("lora", False, "mse"),
        "lora2": ("lora", False, "cosine"),
        "lora3": ("lora", True, "mse"),
        "lora4": ("lora", True, "cosine"),
    }
    assert VARIANTS["lora1"].groups == SEPARATE


def test_adapter_flags_reach_the_adapter():
    ranks, alphas = (("query", 2), ("attention.output.dense", 8)), (("query", 6.0),)
    settings = make_settings(
            "lora3", rank=4, rslora=True, lora_dropout=0.25, lora_plus_ratio=8.0,
            rank_pattern=ranks, alpha_pattern=alphas,
        )  # fmt: skip
    assert settings.lora == LoraConfig(
        4, 4.0, rslora=True, rank_pattern=ranks, alpha_pattern=alphas, dropout=0.25
    )
    assert settings.optimizer.lora_plus_ratio == 8
    assert Settings.from_json(settings.to_json()) == settings
    assert make_settings("lora3").lora == LoraConfig()


@pytest.mark.parametrize(
    "values",
    [
        {"rslora": True},
        {"lora_dropout": 0.0},
        {"lora_plus_ratio": 2.0},
        {"rank_pattern": (("query", 2),)},
    ],
)
def test_adapter_flags_mean_nothing_without_adapters(values):
    for name in ("baseline1", "baseline3"):
        with pytest.raises(ConfigError, match=f"`{next(iter(values))}`: has no effect on {name}"):
            make_settings(name, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"lora_plus_ratio": 0.0},
        {"rank_pattern": (("query", 0),)},
        {"alpha_pattern": (("query", -1.0),)},
        {"weight_decay": float("inf")},
    ],
)
def test_adapter_flags_out_of_range(values):
    with pytest.raises(ConfigError, match="must be") as caught:
        make_settings("lora3", **values)
    assert caught.value.field in (*values, "dropout")


def test_some_module_is_adapted():
    with pytest.raises(UserError, match="`target_modules`: name at least one"):
        make_settings("lora3", target_modules=())


def test_surgery_is_for_tasks_that_share():
    assert make_settings("lora3").optimizer.surgery == "pcgrad"
    assert make_settings("lora1").optimizer.surgery == "pcgrad"
    assert make_settings("baseline2", surgery="none").optimizer.surgery == "none"
    assert make_settings("lora1", surgery="none", groups="sst|para,sts").optimizer.surgery == "none"
    for variant, more in (("lora1", {}), ("baseline1", {}), ("lora3", {"only": ("sst",)})):
        with pytest.raises(UserError, match="`surgery`: has no effect"):
            make_settings(variant, surgery="none", **more)


def test_synthetic_sts_goes_with_real_sts():
    data = Path("x")
    assert make_settings("lora3", data_dir=data, synthetic_sts=True).data.synthetic_sts
    assert make_settings("lora3", "paper", synthetic_sts=True).data.synthetic_sts
    for more in ({}, {"data_dir": data, "only": ("sst", "para")}):
        with pytest.raises(UserError, match="`synthetic_sts`"):
            make_settings("lora3", synthetic_sts=True, **more)


def test_only_some_of_the_tasks():
    settings = make_settings("lora3", only=("sts", "sst"))
    assert list(settings.named) == ["sst", "sts"]
    assert settings.groups == (("sst", "sts"),)
    assert make_settings("lora1", only=("para",)).groups == (("para",),)
    with pytest.raises(UserError, match=r"`only` stt: unknown task; there are sst, para, sts"):
        make_settings("lora3", only=("stt",))
    with pytest.raises(UserError, match="`only`: name at least one"):
        make_settings("lora3", only=())
    with pytest.raises(UserError, match="`groups`"):
        make_settings("lora3", only=("sst",), groups="sst|para,sts")


def test_made_up_data_is_named_in_what_a_run_writes_down():
    demo = make_settings("lora3")
    assert demo.title == "lora3, built-in made-up data"
    assert [task.title for task in demo.named.values()] == [
        "made-up sentiment", "made-up paraphrases", "made-up similarity",
    ]  # fmt: skip
    real = make_settings("lora3", source="official")
    assert real.title == "lora3"
    assert [task.title for task in real.named.values()] == ["SST-5", "Quora", "STS-B"]


def test_each_setting_has_a_name_of_its_own():
    """Flags have no section's name, so two fields of one name would be one flag."""
    sections = [getattr(Preset(), field.name) for field in dataclasses.fields(Preset)]
    assert len(flat_names(Preset)) == sum(len(dataclasses.fields(part)) for part in sections)


def test_change_reaches_every_section():
    asked = {"source": "official", "base": "x", "lora_dropout": 0.5, "clip": 2.0, "seed": 7}
    changed = Sections().change(**asked)
    assert {name: changed.flat()[name] for name in asked} == asked
    assert changed.lora.dropout == 0.5
    others = Sections().flat().keys() - asked.keys()
    assert all(changed.flat()[name] == Sections().flat()[name] for name in others)
    with pytest.raises(ConfigError, match="`rang`: no such setting"):
        Sections().change(rang=4)


def test_settings_that_are_changed_are_checked_again():
    settings = make_settings("lora3")
    for name, value in {"rank": 0, "batch_size": 0, "encoder_dropout": 1.0, "clip": 0.0}.items():
        with pytest.raises(ConfigError, match=f"`{name}` {value}: must be"):
            settings.change(**{name: value})


def test_a_learning_rate_that_no_number_is():
    with pytest.raises(ConfigError, match="`learning_rate`: must be a finite number, not nan"):
        make_settings("lora3", learning_rate=float("nan"))


def test_changed_settings_are_refused_when_they_are_read():
    plain = make_settings("lora3").to_json()
    for wrong in (
        {"rank": 0}, {"rank": "4"}, {"variant": "baseline1"}, {"new": 1}, {"groups": [["sst"]]},
        {"adapt": "full"},
    ):  # fmt: skip
        with pytest.raises(UserError, match="the settings were changed"):
            Settings.from_json(plain | wrong)


@given(rows=st.integers(1, 10**6), batch=st.integers(1, 64), most=st.none() | st.integers(1, 10**5))
def test_small_tables_get_enough_passes_and_each_run_a_few_evaluations(rows, batch, most):
    found = pace(rows, batch, max_steps=most)
    per_epoch = -(-rows // batch)
    steps = min(found["epochs"] * per_epoch, most or 10**9)
    assert found["epochs"] >= FEWEST_EPOCHS
    assert steps >= min(FEWEST_STEPS, most or FEWEST_STEPS)
    assert EVALUATIONS / 2 <= -(-steps // found["eval_every"]) <= EVALUATIONS or steps < EVALUATIONS


def test_patience_of_own_tasks_cannot_end_a_run_during_its_warm_up():
    """The learning rate has risen when the evaluations that patience allows are over."""
    start = PRESETS["own"](OWN)
    for rows in (20, 100, 5_000, 100_000):
        found = pace(rows, start.loop.batch_size)
        steps = found["epochs"] * -(-rows // start.loop.batch_size)
        warm = start.optimizer.warmup_steps * steps
        assert start.loop.patience * found["eval_every"] > 2 * warm


def write_task(folder, name, rows, *more):
    labels = ("yes", "no")
    lines = [f"text {n},{labels[n % 2]}" for n in range(rows)]
    (folder / f"{name}.csv").write_text("\n".join(["t,l", *lines]))
    keys = [f"[{name}]", 'text = "t"', 'label = "l"', f'train = "{name}.csv"', *more]
    (folder / f"{name}.toml").write_text("\n".join(keys))
    return str(folder / f"{name}.toml")


def test_own_tasks_need_neither_variant_nor_preset(tmp_path):
    settings = make_settings(tasks=(write_task(tmp_path, "a", 100), write_task(tmp_path, "b", 10)))
    assert (settings.variant, settings.preset, settings.adapt) == ("own", "own", "lora")
    assert settings.groups == (("a",), ("b",))
    assert settings.model.max_length == ModelConfig().max_length
    assert settings.of_group(("a",)).loop.epochs == pace(80, 16)["epochs"]
    assert settings.of_group(("b",)).loop.epochs == 300
    shared = make_settings("lora3", tasks=(write_task(tmp_path, "a", 100),))
    assert shared.preset == "own"
    with pytest.raises(ConfigError, match="`tasks`: name the files"):
        make_settings()


def test_what_is_asked_for_comes_before_the_pace_of_own_tasks(tmp_path):
    paths = write_task(tmp_path, "a", 100, "epochs = 9"), write_task(tmp_path, "b", 10)
    apart = make_settings(tasks=paths, epochs=5, eval_every=3)
    assert [apart.of_group((name,)).loop.epochs for name in "ab"] == [9, 5]
    assert [apart.of_group((name,)).loop.eval_every for name in "ab"] == [3, 3]
    together = make_settings(tasks=paths, groups="a,b").of_group(("a", "b")).loop
    assert (together.epochs, together.eval_every) == (9, pace(80, 16, 9)["eval_every"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("pooling", "max", "must be 'cls' or 'mean'"),
        ("pair_features", "sum", "must be"),
        ("dtype", "float16", "must be 'float32' or 'bfloat16'"),
        ("schedule", "cosine", "must be 'constant' or 'linear'"),
        ("surgery", "x", "must be"),
        ("source", "x", "must be"),
        ("preset", "cs224", "is none of demo, cs224n"),
        ("epochs", "3", "must be a whole number"),
        ("epochs", 2.5, "must be a whole number"),
        ("rank", "8", "must be a whole number"),
        ("alpha", "3", "must be a number"),
        ("rank_pattern", "x", "must map names"),
        ("learning_rate", "1e-3", "must be a number"),
        ("target_modules", "query", "must be a tuple of names"),
        ("base", 3, "must be a string"),
    ],
)
def test_a_value_of_another_type_or_that_is_no_choice_is_named(name, value, said):
    with pytest.raises(ConfigError, match=f"`{name}`.* {said}"):
        make_settings("lora3", **{name: value})

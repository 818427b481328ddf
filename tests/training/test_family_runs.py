"""A run on a base of each family: it learns, its task is served, exported and taken back."""

import random

import family_bases
import numpy as np
import pytest
from tiny import Silent

import jaxlora
from jaxlora.formats import huggingface
from jaxlora.serving import bank, export_peft
from jaxlora.training import cost, inputs
from jaxlora.training.presets import make_settings
from jaxlora.training.run import run


def write_task(folder):
    """32 examples with labels that follow no rule: only a model that can learn has them."""
    rng = random.Random(3)
    texts = {"".join(rng.choices("abcdefgh", k=5)) for _ in range(32)}
    rows = [f"{text},{rng.choice(('yes', 'no'))}" for text in sorted(texts)]
    assert len(rows) == 32
    table = "\n".join(["text,label", *rows]) + "\n"
    for split in ("train", "dev"):
        (folder / f"{split}.csv").write_text(table)
    return ("own.kind=classification", "own.classes=yes,no", "own.text=text", "own.label=label",
            f"own.train={folder}/train.csv", f"own.dev={folder}/dev.csv")  # fmt: skip


@pytest.fixture(params=family_bases.FAMILIES)
def base(request, tmp_path):
    """A family's tiny base."""
    family_bases.save(tmp_path / "base", request.param)
    return tmp_path / "base"


@pytest.mark.slow
def test_a_run_overfits_and_its_adapter_goes_to_peft_and_back(base, tmp_path):
    flags = {"batch_size": 16, "epochs": 60, "eval_every": 40, "max_length": 16, "rank": 4,
             "learning_rate": 1e-2, "head_learning_rate": 1e-2}  # fmt: skip
    settings = make_settings("lora1", tasks=write_task(tmp_path), base=str(base), **flags)
    result = run(settings, tmp_path / "run", Silent())
    print("\nFIGURE overfits", base, result["dev"])
    predictor = jaxlora.load(tmp_path / "run")
    lines = (tmp_path / "train.csv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split(",") for line in lines), strict=True)
    found = [answer.label for answer in predictor([("own", text) for text in texts])]
    assert np.mean([a == b for a, b in zip(found, labels, strict=True)]) >= 0.9

    bank.add(tmp_path / "bank", bank.load(tmp_path / "run"), ["own"])
    export_peft.save(tmp_path / "peft", bank.load(tmp_path / "bank"), "own")
    bank.add(tmp_path / "again", export_peft.load(tmp_path / "peft", "own"), ["own"])
    back = jaxlora.load(tmp_path / "again")
    np.testing.assert_array_equal(back.encode("own", texts), predictor.encode("own", texts))


def test_the_adapters_modules_are_named_as_the_base_has_them(base):
    """So that defaults, BERT's names and PEFT's can be given for any base."""
    settings = make_settings("lora4", base=str(base))
    named = inputs.fit_to_base(settings)
    loaded = huggingface.load(str(base))
    inputs.check_base(named, loaded)
    assert inputs.fit_to_base(named) == named
    assert (named == settings) == (loaded.config.model_type != "modernbert")
    if loaded.config.model_type == "distilbert":
        own = make_settings("lora4", base=str(base), target_modules=("q_lin", "ffn.lin1"))
        assert inputs.fit_to_base(own).lora.target_modules == (
            "attention.self.query", "intermediate.dense"
        )  # fmt: skip


def test_what_a_step_will_cost(base):
    config = huggingface.read_config(base / "config.json")
    for variant in ("lora4", "baseline2", "baseline1"):
        for work in cost.for_variant(variant, config, 8).values():
            found = cost.estimate(work)
            assert found.flops.total > 0 and found.memory.total > 0

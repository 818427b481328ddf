"""The calculator beside XLA's own analyses of the compiled step, and beside counts by hand."""

import dataclasses
import math

import jax
import pytest
from compiled import analyses, compile_step, shapes, wide
from releases import since
from rich.console import Console
from test_sharding import eight

from jaxlora.cli import cost as command
from jaxlora.cli import cost_table
from jaxlora.cli.main import main
from jaxlora.lora import LoraConfig
from jaxlora.nn import bert
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.tasks.task import paper_tasks
from jaxlora.training import cost, sharding
from jaxlora.training.presets import make_settings
from jaxlora.utils.errors import UserError

THREE = paper_tasks("mse")
NARROW = bert.BertConfig(
    vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=256, max_position_embeddings=64,
)  # fmt: skip
MINILM = cost.SIZES["minilm"]
WIDE = wide("lora", "data=1").config


def work(adapt, config=NARROW, tasks=THREE, dropout=0.0, **more):
    """A step of 24 rows: of all tasks together, or 8 of each."""
    rows = 24 if adapt == "lora" else 8
    asked = {"batch_size": 16, "rows": rows} | more
    return cost.Work(config.with_dropout(dropout), adapt, tasks, **asked)


def check(asked):
    """FLOPs and temporaries within a tenth of XLA's, arguments within a hundredth."""
    found, xla = cost.estimate(asked), analyses(compile_step(asked))
    assert found.flops.total == pytest.approx(xla["flops"], rel=0.1)
    unused = found.memory.frozen if asked.adapt == "frozen" else 0  # held, but no argument
    assert found.memory.arguments - unused == pytest.approx(xla["arguments"], rel=0.01)
    assert found.memory.temporary == pytest.approx(xla["temporary"], rel=0.1)


def test_the_heads_are_those_of_a_run_by_default():
    (step,) = cost.for_variant("lora3", MINILM, 8).values()
    assert step.pair_features == make_settings("lora3").model.pair_features


@pytest.mark.parametrize(
    "asked",
    [
        work("lora"),
        work("full", dropout=0.1),
        work("lora", WIDE, tasks=THREE[:1], rows=16),
        work("frozen", MINILM, THREE[1:2]),
        pytest.param(work("lora", groups=3), marks=pytest.mark.slow),
    ],
    ids=("lora", "full", "one task", "frozen", "an adapter each"),
)
@since("jax", 0, 10, reason="older XLA has other temporaries")
def test_what_xla_finds(asked):
    check(asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        work("lora", WIDE, rows=48, dropout=0.1),
        work("lora", WIDE, rows=48, dtype="bfloat16", dropout=0.1),
        work("lora", WIDE, tasks=THREE[:1], dtype="bfloat16"),
        work("full", WIDE, rows=16, dtype="bfloat16"),
        work("full", WIDE, tasks=THREE[:1], rows=16),
        work("lora", MINILM),
        work("lora", MINILM, groups=3),
        work("lora", MINILM, batch_size=32, rows=48, dtype="bfloat16"),
        work("full", MINILM),
        work("full", MINILM, tasks=THREE[1:2]),
    ],
    ids=lambda w: f"{w.adapt}-{w.config.hidden_size}-{len(w.tasks)}-{w.groups}-{w.rows}-{w.dtype}",
)
def test_what_xla_finds_of_larger_networks(asked):
    check(asked)


@pytest.mark.slow
@pytest.mark.parametrize(("adapt", "rows"), [("lora", 20), ("full", 4)])
def test_the_memory_of_a_loop(adapt, rows):
    """XLA counts a loop's FLOPs once, so those are not compared."""
    deep = work(adapt, dataclasses.replace(NARROW, num_hidden_layers=24), rows=rows)
    found, xla = cost.estimate(deep).memory, analyses(compile_step(deep))
    assert found.arguments == pytest.approx(xla["arguments"], rel=0.01)
    assert found.temporary == pytest.approx(xla["temporary"], rel=0.1)


def test_a_device_holds_the_parts_of_single_layers():
    """Of twelve stacked biases a device could hold a part, but the layers lie apart."""
    asked = work("lora", cost.SIZES["bert-base"], fsdp=8)
    _, frozen, _ = shapes(asked)
    held = sum(
        4 * x.size / (1 if sharding.split_axis(x.shape, 8) is None else 8)
        for x in jax.tree.leaves(frozen)
    )
    assert cost.estimate(asked).memory.frozen == pytest.approx(held, rel=1e-6)


MESHES = ("data=8,fsdp=1", "data=1,fsdp=8", "data=4,fsdp=2")


@pytest.fixture(scope="module")
def sharded():
    return eight("planned", *MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("adapt", ["full", "lora"])
def test_what_xla_finds_on_eight_devices(sharded, adapt, text):
    """The arguments of a device, and the arrays that it is sent."""
    asked = wide(adapt, text, rows=16 if adapt == "full" else 48, adapter=LoraConfig())
    found, xla = cost.estimate(asked), sharded[f"{adapt} {text}"]
    assert found.memory.arguments == pytest.approx(xla["arguments"], rel=0.01)
    assert found.flops.total / 8 == pytest.approx(xla["flops"], rel=0.1)
    traffic, sent = found.traffic, xla["collectives"]
    summed = traffic.all_reduce + traffic.reduce_scatter  # one operation to XLA on CPU
    assert summed == pytest.approx(sent["all-reduce"], rel=0.02)
    assert traffic.all_gather == pytest.approx(sent.get("all-gather", 0), rel=0.02)


def test_a_step_counted_by_hand():
    """One task, one row of two tokens, one layer with H = 4, F = 8, two heads; V = 16."""
    config = bert.BertConfig(16, 4, 1, 2, 8, 2)
    found = cost.estimate(cost.Work(config, "full", THREE[:1], 1, 1, 2))
    kernels = 4 * 4 * 4 + 2 * 4 * 8
    head = (4 * 4 + 4) + (4 * 5 + 5)
    forward = 2 * (2 * kernels + 4 * 2 * 4) + 2 * head
    assert found.flops.forward == forward and found.flops.backward == 2 * forward
    layer = kernels + 4 * 4 + 8 + 4 + 2 * 8
    params = (16 + 2 + 2) * 4 + 8 + layer
    assert found.memory.trained == 4 * (params + head)
    assert found.memory.moments == 2 * found.memory.trained
    assert found.memory.frozen == 0


@pytest.mark.parametrize(
    ("name", "millions"),
    [("minilm", 22.6), ("bert-base", 108.9), ("1b", 1067), ("3b", 2912), ("10b", 9794)],
)
def test_sizes_are_what_they_are_called(name, millions):
    asked = cost.Work(cost.SIZES[name], "full", THREE[:1], 1, 1)
    base = cost.estimate(dataclasses.replace(asked, adapt="frozen")).memory.frozen
    assert base / 4e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_has_one_step_but_one_for_each_whole_encoder(name):
    works = cost.for_variant(name, MINILM, 16, data=2)
    assert len(works) == (3 if name == "baseline4" else 1)
    assert sum(asked.groups for asked in works.values()) == len(VARIANTS[name].groups)
    for asked in works.values():
        assert asked.rows % 2 == 0
        frozen, full = (
            cost.estimate(dataclasses.replace(asked, adapt=kind)).memory.total
            for kind in ("frozen", "full")
        )
        assert frozen <= cost.estimate(asked).memory.total <= full


def test_full_fine_tuning_is_split_over_fsdp_and_adapters_send_less():
    heads, one, eight_parts = (
        cost.estimate(work(adapt, cost.SIZES["10b"], rows=8, fsdp=n)).memory.moments
        for adapt, n in (("frozen", 1), ("full", 1), ("full", 8))
    )
    assert (one - heads) / 8 == pytest.approx(eight_parts - heads, rel=0.01)
    full, lora = (
        cost.estimate(work(adapt, cost.SIZES["bert-base"], data=8)).traffic.wire(8)
        for adapt in ("full", "lora")
    )
    assert lora < full / 20
    assert cost.estimate(work("full")).traffic.wire(1) == 0


def test_time_is_work_and_traffic_one_after_the_other():
    found = cost.estimate(work("full", data=8))
    alone = found.flops.total / 8 / 1e9
    assert found.seconds(1e9) == pytest.approx(alone)
    sent = found.traffic.wire(8) / 1e6
    assert found.seconds(1e9, 1e6) == pytest.approx(alone + sent)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(command, "CONSOLE", Console(width=200))
    flags = ["--variant", "lora3", "--base=bert-base", "--batch-size=16"]
    assert main(["cost", *flags, "--mesh", "data=4,fsdp=2", "--flops=1e13", "--link=1e10"]) == 0
    said = capsys.readouterr().out
    assert "data=4,fsdp=2" in said and "seconds" in said


def test_a_folder_is_a_base(tiny_base, tiny):
    assert cost_table.find_base(str(tiny_base)) == tiny.config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variant=lora9"], "did you mean lora"),
        (["--variant=lora3", "--base=bert-huge"], "--base bert-huge: write minilm"),
        (["--variant=lora3", "--mesh=auto"], "--mesh auto: say how many"),
        (["--variant=lora3", "--mesh=data"], "write data=4,fsdp=2"),
        (["--variant=lora3", "--batch-size=0"], "--batch-size 0"),
        (["--variant=lora3", "--sentence-length=nan"], "--sentence-length nan"),
        (["--variant=lora3", "--sentence-length=1e308"], "must fit into a row"),
        (["--variant=lora3", "--sentence-length=65"], "--row-length=64"),
        (["--variant=lora3", "--row-length=5000"], "--row-length 5000: the base has 512"),
        (["--variant=lora3", "--base=minilm", "--rank=500"], "--rank 500: must be from 1 to"),
        (["--variant=lora3", "--rank=0"], "--rank 0: must be above 0"),
        (["--variant=lora3", "--link=1e9"], "--link goes with --flops"),
        (["--variant=lora3", "--flops=-1"], "rates above 0"),
    ],
)
def test_bad_flags(flags, message, capsys):
    assert main(["cost", *flags]) == 2
    said = capsys.readouterr()
    assert message in " ".join((said.out + said.err).split())


@pytest.mark.parametrize("lengths", [(0, 20.0, 64), (16, -1.0, 64), (16, 20.0, -64)])
def test_lengths_that_cannot_be(lengths):
    with pytest.raises(UserError, match="must be above 0"):
        cost.for_variant("lora3", MINILM, *lengths)


def test_rates():
    assert cost_table.check_rates(None, None) is None
    assert cost_table.check_rates(1.0, None) == (1.0, math.inf)
    with pytest.raises(UserError):
        cost_table.check_rates(None, 1.0)

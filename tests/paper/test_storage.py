"""Storage: bert-base by shapes alone, and the paper's Table 3 row by row."""

import pytest

from experiments import storage as weigh
from jaxlora.lora import LoraConfig
from jaxlora.nn.bert import BertConfig
from jaxlora.tasks.sharing import SEPARATE, SHARED, VARIANTS
from jaxlora.tasks.task import paper_tasks
from jaxlora.training import parameter_count
from jaxlora.training.adaptation import make_adaptation

HIDDEN = 768
BASE = 109_482_240  # with the pooler, as Hugging Face counts it
POOLER = HIDDEN * HIDDEN + HIDDEN
SST_HEAD = HIDDEN * HIDDEN + HIDDEN + HIDDEN * 5 + 5
PAIR_HEAD = 2 * HIDDEN * 384 + 384 + 384 + 1
HEADS = SST_HEAD + 2 * PAIR_HEAD
ADAPTER = 1_105_920
# What the paper adds up, in millions: BERT, one adapter, all heads.
PAPER_BERT, PAPER_ADAPTER, PAPER_HEADS = 110, 1.106, 1.78


def count(adapt, groups, sts_loss, adapter=None):
    return parameter_count.count(
        BertConfig(),
        make_adaptation(adapt, adapter or LoraConfig()),
        groups,
        paper_tasks(sts_loss),
        "concat",
    )


def test_parameter_counts_of_the_parts_of_bert_base():
    found = count("lora", SHARED, "mse")
    assert HEADS == 1_775_623
    assert found.heads == HEADS
    assert found.encoder == ADAPTER
    assert found.base == BASE - POOLER


def test_the_cosine_loss_has_no_sts_head():
    assert count("frozen", SEPARATE, "cosine").heads == HEADS - PAIR_HEAD


@pytest.mark.parametrize(
    ("adapt", "groups", "encoder", "incremental", "bundled"),
    [
        ("frozen", SEPARATE, 0, HEADS, BASE - POOLER + HEADS),
        ("lora", SHARED, ADAPTER, ADAPTER + HEADS, BASE - POOLER + ADAPTER + HEADS),
        ("lora", SEPARATE, 3 * ADAPTER, 3 * ADAPTER + HEADS, BASE - POOLER + 3 * ADAPTER + HEADS),
        ("full", SHARED, BASE - POOLER, BASE - POOLER + HEADS, BASE - POOLER + HEADS),
        ("full", SEPARATE, *[3 * (BASE - POOLER)], *[3 * (BASE - POOLER) + HEADS] * 2),
        ("lora", (("sst",), ("para", "sts")), 2 * ADAPTER, 2 * ADAPTER + HEADS,
         BASE - POOLER + 2 * ADAPTER + HEADS),
    ],
)  # fmt: skip
def test_trees_are_counted_by_group(adapt, groups, encoder, incremental, bundled):
    found = count(adapt, groups, "mse")
    assert (found.encoder, found.incremental, found.bundled) == (encoder, incremental, bundled)


@pytest.mark.parametrize("name", VARIANTS)
def test_table_3_follows_from_the_papers_parts(name):
    """The paper rounds BERT to 110M, an adapter to 1.106M, and counts an unused STS head."""
    variant = VARIANTS[name]
    trees = len(variant.groups)
    adapters, berts = (trees * (variant.adapt == kind) for kind in ("lora", "full"))
    incremental = berts * PAPER_BERT + adapters * PAPER_ADAPTER + PAPER_HEADS
    bundled = incremental + PAPER_BERT * (variant.adapt != "full")
    assert round(incremental, 2) == variant.paper.incremental
    assert round(bundled, 2) == variant.paper.bundled_recomputed

    ours = count(variant.adapt, variant.groups, variant.sts_loss)
    rounding = (
        berts * (PAPER_BERT * 1e6 - (BASE - POOLER))
        + adapters * (PAPER_ADAPTER * 1e6 - ADAPTER)
        + (PAPER_HEADS * 1e6 - HEADS)
    )
    unused_head = PAIR_HEAD if variant.sts_loss == "cosine" else 0
    assert ours.incremental + rounding + unused_head == pytest.approx(incremental * 1e6, abs=0.5)


def test_one_bundled_figure_does_not_follow_from_its_row():
    wrong = {
        n: v.paper for n, v in VARIANTS.items() if v.paper.bundled != v.paper.bundled_recomputed
    }
    assert list(wrong) == ["lora3"]
    assert (wrong["lora3"].bundled, wrong["lora3"].bundled_recomputed) == (115.10, 112.89)


def test_two_means_do_not_follow_from_their_rows():
    wrong = {n: v.paper for n, v in VARIANTS.items() if v.paper.mean != v.paper.mean_recomputed}
    assert {n: (p.mean, p.mean_recomputed) for n, p in wrong.items()} == {
        "baseline3": (63.32, 62.32),
        "lora2": (62.23, 62.41),
    }


def test_a_bank_weighs_what_its_parameters_do(tmp_path):
    """Random numbers hardly shrink, so bytes on disk are four a parameter, and some for names."""
    row = weigh.measure("MiniLM", 2, 15, tmp_path / "bank")
    parameters = 2 * (276_480 + 384 * 384 + 384 + 384 + 1)
    assert 0.88 < row.bank * 1e6 / (4 * parameters) < 1.15
    assert row.base_size == pytest.approx(4 * 22_565_376 / 1e6)
    assert row.full == 2 * row.base_size
    weigh.write([row], weigh.Flags(), tmp_path / "out")
    assert f"| MiniLM | 2 | {row.bank:,.1f} MB |" in (tmp_path / "out" / "storage.md").read_text()
    assert (tmp_path / "out" / "storage.png").stat().st_size > 1000

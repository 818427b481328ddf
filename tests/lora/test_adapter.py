"""LoRA: counts, exact merging, and gradients against Hugging Face's peft."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft_oracle
import pytest
from flax import traverse_util
from tiny import random_adapter

from jaxlora import lora
from jaxlora.data.packing import Shape, fill
from jaxlora.lora import PAPER_TARGETS, LoraConfig
from jaxlora.nn.bert import BertConfig, Dense, Encoder, param_shapes, pool
from jaxlora.nn.routes import ByTask
from jaxlora.utils import trees

SENTENCES = (
    "A film.",
    "The plot is thin, but the two leads carry it with charm and a good deal of wit.",
    "How do I learn to play the guitar?",
    "A man is slicing an onion in the kitchen.",
    "Nobody who saw it on the opening night could say afterwards what it had been about, or why.",
)
SHORT = (SENTENCES[0], *SENTENCES[2:4])  # tiny has 64 positions
DEFAULT = LoraConfig()


def packed(base, sentences=SENTENCES, rows=2):
    ids = [np.array(base.tokenizer.encode(s).ids) for s in sentences]
    return fill(ids, range(len(ids)), len(ids), Shape(rows, 64))


def encode(base, variables, rows, config=DEFAULT):
    return Encoder(base.config, lora=config).apply(variables, *rows[:3])


# ---- what is adapted


@pytest.mark.parametrize(
    ("targets", "rank", "expected"),
    [  # peft's counts for bert-base; the last is the paper's 1.11M
        (("query", "value"), 1, 36_864),
        (("query", "value"), 2, 73_728),
        (("query", "value"), 4, 147_456),
        (("query", "value"), 8, 294_912),
        (("query", "value"), 16, 589_824),
        (("query", "key", "value"), 8, 442_368),
        (PAPER_TARGETS, 15, 1_105_920),
    ],
)
def test_parameter_counts_on_bert_base_are_pefts(targets, rank, expected):
    shapes = param_shapes(BertConfig())
    config = LoraConfig(rank, 1.0, targets)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, config))
    assert lora.count_params(adapter) == expected
    assert lora.count_params({"sst": adapter, "sts": adapter}) == 2 * expected


def test_the_default_adapter_has_the_papers_size_and_scale():
    adapter = jax.eval_shape(
        lambda: lora.init(jax.random.key(0), param_shapes(BertConfig()), LoraConfig())
    )
    assert round(lora.count_params(adapter) / 1e6, 2) == 1.11
    assert LoraConfig().scale_of(()) == 1


def test_targets_match_complete_names(tiny):
    def chosen(*names):
        found = lora.targets(tiny.params, LoraConfig(4, 4.0, names))
        return {".".join(path) for path in found}

    assert chosen("query") == {"layers.attention.self.query"}
    assert chosen("attention.output.dense") == {"layers.attention.output.dense"}
    assert chosen("dense") == {  # every layer that ends so
        "layers.attention.output.dense", "layers.intermediate.dense", "layers.output.dense",
    }  # fmt: skip
    assert chosen("query", "self.query") == chosen("query")
    with pytest.raises(ValueError, match="`target_modules`: unknown module 'uery'"):
        chosen("uery")


def test_unknown_target_lists_the_modules(tiny):
    with pytest.raises(ValueError, match=r"'qury'.*mean query") as error:
        lora.targets(tiny.params, LoraConfig(target_modules=("key", "qury")))
    for name in ("self.query", "self.key", "intermediate.dense", "attention.output.dense"):
        assert f"layers.{name}" in str(error.value) or f"layers.attention.{name}" in str(
            error.value
        )


@pytest.mark.parametrize(
    ("name", "rank", "alpha"),
    [
        ("attention.self.query", 4, 8.0),  # no pattern
        ("attention.output.dense", 6, 3.0),  # the longer name
        ("output.dense", 2, 8.0),  # the shorter one
        ("intermediate.dense", 4, 5.0),
    ],
)
@pytest.mark.parametrize("turn", [1, -1])
def test_the_longest_matching_name_of_a_pattern_applies(name, rank, alpha, turn):
    ranks = (("output.dense", 2), ("attention.output.dense", 6))[::turn]
    alphas = (("attention.output.dense", 3.0), ("intermediate.dense", 5.0))[::turn]
    for rslora in (False, True):
        config = LoraConfig(4, 8.0, (), rslora, ranks, alphas)
        path = ("layers", *name.split("."))
        assert (config.rank_of(path), config.alpha_of(path)) == (rank, alpha)
        assert config.scale_of(path) == (alpha / rank**0.5 if rslora else alpha / rank)


def test_configurations_whose_patterns_differ_in_order_are_equal():
    given = (("query", 2), ("self.query", 3), ("value", 2))
    assert LoraConfig(rank_pattern=given) == LoraConfig(rank_pattern=given[::-1])


def test_ranks_follow_their_pattern(tiny):
    config = LoraConfig(4, 4.0, ("query", "output.dense"), rank_pattern=(("query", 7),))
    shapes = jax.tree.map(jnp.shape, lora.init(jax.random.key(0), tiny.params, config)["layers"])
    assert shapes["attention"]["self"]["query"] == {"A": (2, 32, 7), "B": (2, 7, 32)}
    assert shapes["output"]["dense"] == {"A": (2, 64, 4), "B": (2, 4, 32)}


def test_a_pattern_that_matches_no_adapted_module_is_refused(tiny):
    for pattern in ({"rank_pattern": (("qury", 2),)}, {"alpha_pattern": (("key", 2.0),)}):
        config = LoraConfig(4, 4.0, ("query",), **pattern)
        with pytest.raises(ValueError, match=r"matches no adapted module; they are .*query"):
            lora.targets(tiny.params, config)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_rate_out_of_range_is_refused(dropout):
    with pytest.raises(ValueError, match=r"`dropout` .*: must be from 0"):
        LoraConfig(dropout=dropout)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_not_positive_and_finite_is_refused(alpha):
    with pytest.raises(ValueError, match=r"`alpha` .*: must be a number above 0"):
        LoraConfig(alpha=alpha)
    with pytest.raises(ValueError, match=r"`alpha_pattern` key .*: must be a number above 0"):
        LoraConfig(alpha_pattern=(("key", alpha),))


def test_a_string_instead_of_a_tuple_of_modules_is_refused():
    with pytest.raises(ValueError, match=r"must be a tuple of names: \('query',\)"):
        LoraConfig(target_modules="query")


def test_lists_and_pefts_dicts_become_tuples():
    given = LoraConfig(4, 8.0, ["query"], False, {"query": 2}, [["query", 3.0]])
    assert given == LoraConfig(4, 8.0, ("query",), False, (("query", 2),), (("query", 3.0),))
    assert isinstance(hash(given), int)


def test_a_kernel_with_one_axis_is_refused():
    with pytest.raises(ValueError, match=r"query has a kernel of shape \(4,\)"):
        lora.init(
            jax.random.key(0), {"query": {"kernel": jnp.ones(4)}}, LoraConfig(1, 1.0, ("query",))
        )


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=f"`rank` {rank}: must be at least 1"):
        LoraConfig(rank, 1.0, ("query",))
    with pytest.raises(ValueError, match=f"`rank_pattern` key {rank}: must be at least 1"):
        LoraConfig(rank_pattern=(("key", rank),))


def test_a_rank_above_the_kernels_width_is_refused(tiny):
    with pytest.raises(ValueError, match="`rank` 33: must be from 1 to 32"):
        lora.init(jax.random.key(0), tiny.params, LoraConfig(33, 1.0, ("query",)))


def test_full_rank_is_allowed(tiny):
    adapter = lora.init(jax.random.key(0), tiny.params, LoraConfig(32, 1.0, ("query",)))
    assert jax.tree.map(jnp.shape, adapter["layers"]["attention"]["self"]["query"]) == {
        "A": (2, 32, 32), "B": (2, 32, 32),
    }  # fmt: skip


def test_init_draws_a_within_its_bound_and_sets_b_to_zero(tiny):
    adapter = lora.init(jax.random.key(0), tiny.params, LoraConfig(4, 4.0))
    flat = traverse_util.flatten_dict(adapter)
    assert len(flat) == 8
    for path, x in flat.items():
        if path[-1] == "B":
            assert not x.any()
        else:
            limit = 32**-0.5
            assert 0.9 * limit < jnp.abs(x).max() <= limit
            assert (x[0] != x[1]).any()  # each layer has its own
    q, k = (adapter["layers"]["attention"]["self"][n]["A"] for n in ("query", "key"))
    assert (q != k).any()


# ---- what it does


def test_an_initialized_adapter_does_not_change_the_base_bit_for_bit(tiny):
    rng = np.random.default_rng(0)
    rows = fill([rng.integers(5, 200, n) for n in (9, 30, 4)], range(3), 3, Shape(2, 32))
    config = LoraConfig(4, 8.0)
    adapter = lora.init(jax.random.key(0), tiny.params, config)
    both = {"params": tiny.params}, {"params": tiny.params, "lora": adapter}
    with jax.disable_jit():  # op by op; a compiled program may sum in another order
        base, adapted = (encode(tiny, variables, rows, config) for variables in both)
    np.testing.assert_array_equal(adapted, base)
    base, adapted = (encode(tiny, variables, rows, config) for variables in both)
    np.testing.assert_allclose(adapted, base, rtol=0, atol=2e-6)


def test_a_dense_layer_adds_alpha_over_rank_times_x_a_b():
    variables = {
        "params": {"kernel": jnp.array([[1.0], [0.0]]), "bias": jnp.array([0.5])},
        "lora": {"A": jnp.array([[2.0], [1.0]]), "B": jnp.array([[3.0]])},
    }
    x = jnp.array([[1.0, 1.0]])
    for alpha, expected in ((2.0, 1.5 + 9.0), (0.5, 1.5 + 2.25)):  # x A B = 9, alpha / 2 of it
        config = LoraConfig(rank=2, alpha=alpha)
        assert Dense(1, lora=config).apply(variables, x).item() == expected


@pytest.mark.parametrize(("rank", "alpha"), [(1, 0.5), (2, 8.0)])
def test_merge_and_unmerge_use_alpha_over_rank(rank, alpha):
    params = {"query": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    adapter = {"query": {"A": jnp.ones((3, rank)), "B": 2 * jnp.ones((rank, 2))}}
    config = LoraConfig(rank, alpha, ("query",))
    merged = lora.merge(params, adapter, config)
    # A B = 2 · rank everywhere, so the change is alpha / rank · 2 · rank.
    np.testing.assert_array_equal(merged["query"]["kernel"], np.full((3, 2), 1 + 2 * alpha))
    np.testing.assert_array_equal(merged["query"]["bias"], params["query"]["bias"])
    assert (params["query"]["kernel"] == 1).all()  # the base is not changed
    back = lora.unmerge(merged, adapter, config)
    np.testing.assert_array_equal(back["query"]["kernel"], params["query"]["kernel"])


def test_merged_equals_unmerged_on_real_weights(minilm):
    config = LoraConfig(15, 30.0)
    adapter, rows = random_adapter(minilm.params, config, 0.05), packed(minilm)
    base = encode(minilm, {"params": minilm.params}, rows)
    apart = encode(minilm, {"params": minilm.params, "lora": adapter}, rows, config)
    merged = lora.merge(minilm.params, adapter, config)
    real = rows.segment_ids > 0
    assert jnp.abs(apart - base)[real].max() > 0.1
    np.testing.assert_allclose(
        encode(minilm, {"params": merged}, rows)[real], apart[real], atol=1e-5
    )
    back = lora.unmerge(merged, adapter, config)
    assert trees.names(back) == trees.names(minilm.params)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(minilm.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_merging_an_adapter_of_another_base_raises(tiny):
    factors = {"A": jnp.ones((2, 32, 1)), "B": jnp.ones((2, 1, 32))}
    alien = {"layers": {"attention": {"self": {"values": factors}}}}
    for fold in (lora.merge, lora.unmerge):
        with pytest.raises(ValueError, match=r"layers\.attention\.self\.values"):
            fold(tiny.params, alien, LoraConfig(1, 1.0))


@pytest.mark.parametrize(
    ("kernel", "a", "b", "rank", "said"),
    [
        ((4, 4), (3, 4, 2), (3, 2, 4), 2, r"query has A \(3, 4, 2\)"),  # would be three kernels
        ((3, 4, 4), (4, 2), (2, 4), 2, r"want \(3, 4, 2\) and \(3, 2, 4\)"),  # one for three
        ((4, 4), (4, 2), (2, 4), 8, "configuration with rank 8"),  # another scale
        ((4, 4), (4, 2), (2, 1), 2, r"B \(2, 1\)"),
        ((4, 4), (4, 2), None, 2, "query lacks B"),
        ((4, 4), None, (2, 4), 2, "query lacks A"),
    ],
)
def test_merging_factors_that_do_not_fit_raises(kernel, a, b, rank, said):
    params = {"query": {"kernel": jnp.ones(kernel)}}
    shapes = {"A": a, "B": b}
    adapter = {"query": {name: jnp.ones(s) for name, s in shapes.items() if s is not None}}
    for fold in (lora.merge, lora.unmerge):
        with pytest.raises(ValueError, match=said):
            fold(params, adapter, LoraConfig(rank, 2.0, ("query",)))


def test_merging_keeps_empty_parts_of_the_tree():
    params = {"query": {"kernel": jnp.ones((3, 2))}, "none": {}}
    assert lora.merge(params, {}, LoraConfig()).keys() == params.keys()


def test_merging_uses_the_alpha_pattern_and_rslora():
    params = {n: {"kernel": jnp.zeros((3, 2))} for n in ("query", "key")}
    adapter = {n: {"A": jnp.ones((3, 4)), "B": jnp.ones((4, 2))} for n in ("query", "key")}
    config = LoraConfig(4, 8.0, ("query", "key"), True, alpha_pattern=(("key", 3.0),))
    merged = lora.merge(params, adapter, config)
    # A B = 4 everywhere; the scale is alpha / √4.
    np.testing.assert_array_equal(merged["query"]["kernel"], np.full((3, 2), 16.0))
    np.testing.assert_array_equal(merged["key"]["kernel"], np.full((3, 2), 6.0))


# ---- dropout of the adapter's input


def test_dropout_applies_to_the_adapter_only_and_keeps_the_mean():
    size, keys = 64, jax.random.split(jax.random.key(5), 2000)
    params = {"kernel": jnp.eye(size), "bias": jnp.zeros(size)}
    variables = {"params": params, "lora": {"A": jnp.eye(size), "B": jnp.eye(size)}}
    dense = Dense(size, lora=LoraConfig(size, float(size), dropout=0.25))
    x = 1 + np.arange(size, dtype=np.float32)

    def trained(key):
        return dense.apply(variables, x, train=True, rngs={"dropout": key})

    outputs = np.asarray(jax.vmap(trained)(keys))
    adapter = outputs / x - 1  # the base adds x itself, whatever is dropped
    values = np.unique(np.round(adapter, 3))
    np.testing.assert_allclose(values, [0, 4 / 3], atol=1e-3)
    # 128,000 draws with a deviation of √(1/3) each: 0.01 is six standard errors.
    assert abs(adapter.mean() - 1) < 0.01
    np.testing.assert_array_equal(dense.apply(variables, x), 2 * x)  # none in evaluation


def test_copies_of_an_adapter_have_the_dropout_mask_of_a_single_one(tiny):
    config = LoraConfig(4, 8.0, dropout=0.5)
    plain = dataclasses.replace(config, dropout=0.0)
    rng = np.random.default_rng(0)
    rows = fill([rng.integers(5, 200, n) for n in (9, 30, 4)], range(3), 3, Shape(2, 32))
    pair = [random_adapter(tiny.params, config, size) for size in (0.05, 0.2)]
    frozen = tiny.config.with_dropout(0.0)

    def run(config, adapter, route=None):
        encoder = Encoder(frozen, lora=config)
        variables = {"params": tiny.params, "lora": adapter}
        rngs = {"dropout": jax.random.key(3)}
        return encoder.apply(variables, *rows[:3], train=True, route=route, rngs=rngs)

    number = jnp.arange(rows.tokens.size).reshape(rows.tokens.shape)
    route = ByTask(jax.nn.one_hot(number % 2, 2, dtype=bool), (0, 0))
    for adapter in pair:
        alone = run(config, adapter)
        stack = jax.tree.map(lambda x: jnp.stack([x, x], 1), adapter)
        np.testing.assert_allclose(run(config, stack, route), alone, rtol=0, atol=1e-5)
        assert jnp.abs(alone - run(plain, adapter)).max() > 0.01


# ---- against peft


CASES = {
    "rslora": LoraConfig(4, 6.0, rslora=True),
    "feed-forward": LoraConfig(3, 6.0, ("intermediate.dense", "output.dense")),
    "every dense": LoraConfig(3, 6.0, ("query", "dense")),
    "patterns": LoraConfig(
        4, 6.0, ("query", "value", "output.dense"),
        rank_pattern=(("output.dense", 2), ("attention.output.dense", 6)),
        alpha_pattern=(("query", 9.0), ("output.dense", 1.5)),
    ),
    "patterns and rslora": LoraConfig(
        4, 6.0, ("key", "intermediate.dense"), True, (("key", 8),), (("dense", 3.0),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_outputs_equal_pefts(tiny, tiny_base, config):
    model = peft_oracle.adapt(peft_oracle.bert(tiny_base), config)
    adapter, rows = random_adapter(tiny.params, config, 0.2), packed(tiny, SHORT)
    base = peft_oracle.vectors(model, tiny.tokenizer, SHORT)
    peft_oracle.copy_into(model, adapter)
    theirs = peft_oracle.vectors(model, tiny.tokenizer, SHORT)
    ours = encode(tiny, {"params": tiny.params, "lora": adapter}, rows, config)
    ours = pool(ours, rows.segment_ids, rows.cls_index, "cls")
    assert np.abs(theirs - base).max() > 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


PEFT_CONFIG = LoraConfig(8, 12.0)


def peft_gradients(minilm, adapter, target):
    """peft's gradients under our names, for mean((cls - target)²)."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import BertModel

    from jaxlora.formats import huggingface

    model = BertModel.from_pretrained(
        huggingface.find("minilm"), attn_implementation="eager", dtype=torch.float32
    )
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=PEFT_CONFIG.rank, lora_alpha=PEFT_CONFIG.alpha, lora_dropout=0.0,
            target_modules=list(PEFT_CONFIG.target_modules),
        ),
    ).eval()  # fmt: skip
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n}

    def name(path, layer):
        middle = ".".join(path[1:-1])
        return f"base_model.model.encoder.layer.{layer}.{middle}.lora_{path[-1]}.default.weight"

    flat = traverse_util.flatten_dict(adapter)
    layers = range(minilm.config.num_hidden_layers)
    assert {name(path, i) for path in flat for i in layers} == factors.keys()
    with torch.no_grad():
        for path, value in flat.items():
            for i in layers:
                factors[name(path, i)].copy_(torch.tensor(np.asarray(value[i]).T))
    encodings = [minilm.tokenizer.encode(s).ids for s in SENTENCES]
    longest = max(map(len, encodings))
    ids = torch.tensor([e + [0] * (longest - len(e)) for e in encodings])
    mask = torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in encodings])
    cls = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    ((cls - torch.tensor(np.asarray(target))) ** 2).mean().backward()
    return {p: np.stack([factors[name(p, i)].grad.numpy().T for i in layers]) for p in flat}


@pytest.mark.slow
def test_gradients_equal_pefts(minilm):
    adapter = random_adapter(minilm.params, PEFT_CONFIG, 0.05)
    target = jax.random.normal(jax.random.key(3), (len(SENTENCES), minilm.config.hidden_size))
    rows = packed(minilm)

    def loss(adapter):
        variables = {"params": minilm.params, "lora": adapter}
        hidden = encode(minilm, variables, rows, PEFT_CONFIG)
        cls = pool(hidden, rows.segment_ids, rows.cls_index, "cls")
        return jnp.mean((cls - target) ** 2)

    expected = peft_gradients(minilm, adapter, target)
    found = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(adapter))
    assert found.keys() == expected.keys() and len(found) == 8
    for path, theirs in expected.items():
        for layer, g in enumerate(theirs):
            error = np.linalg.norm(found[path][layer] - g) / np.linalg.norm(g)
            assert error <= 1e-4, (path, layer, error)

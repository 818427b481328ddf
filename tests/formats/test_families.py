"""Every family against transformers' own classes, on random weights that transformers saved."""

import dataclasses
import json
import shutil

import family_bases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_bases import FAMILIES
from releases import since
from safetensors.numpy import load_file, save_file

from jaxlora import lora
from jaxlora.formats import families, huggingface
from jaxlora.formats import peft as peft_files
from jaxlora.lora import LoraConfig
from jaxlora.nn import ops
from jaxlora.nn.bert import param_shapes, unstack_layers
from jaxlora.nn.encode import encoder, make_encode, make_mixed_encode
from jaxlora.utils.errors import UserError
from jaxlora.utils.trees import flatten as lora_leaves

every = pytest.mark.parametrize("family", FAMILIES)
# One of each kind of network; the others are slow tests.
KINDS = ("bert", "roberta", "mpnet", "modernbert")
quick = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in KINDS else pytest.mark.slow) for f in FAMILIES]
)
IDS = family_bases.sentences()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family → its folder and its torch model, made when first asked for."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, family_bases.save(folder, family)
        return made[family]

    return get


@pytest.fixture
def folder(saved, tmp_path):
    """Copy a family's folder, so that a test may damage it."""
    return lambda family: shutil.copytree(saved(family)[0], tmp_path / family)


def hidden(base, rows):
    run = jax.jit(base.config.network().apply)
    return np.asarray(run({"params": base.params}, *rows[:3]))


def error(base, model, ids):
    rows = family_bases.packed(ids)
    found = hidden(base, rows)
    wanted = family_bases.torch_hidden(model, ids)
    return max(np.abs(found[rows.segment_ids == n + 1] - one).max() for n, one in enumerate(wanted))


@every
def test_equals_torch(family, saved):
    folder, model = saved(family)
    base = huggingface.load(str(folder))
    assert max(np.abs(x).max() for x in family_bases.torch_hidden(model, IDS)) > 1
    found = error(base, model, IDS)
    print(f"\nFIGURE torch {family} {found:.1e}")
    assert found <= 5e-5
    assert base.left_out == ()


@every
def test_packed_equals_one_sentence_a_row(family, saved):
    base = huggingface.load(str(saved(family)[0]))
    packed, apart = family_bases.packed(IDS), family_bases.apart(IDS)
    assert len(packed.tokens) < len(IDS)
    together, alone = hidden(base, packed), hidden(base, apart)
    worst = max(
        np.abs(together[packed.segment_ids == n + 1] - alone[n][: len(ids)]).max()
        for n, ids in enumerate(IDS)
    )
    print(f"\nFIGURE packed {family} {worst:.1e}")
    assert worst <= 1e-5


# Fields that change what is computed, beside those of the tiny models. The last is a token in the
# middle of a sentence that the model takes for padding.
ONE_LAYER = since("transformers", 5, 23, reason="older ones refuse global attention alone")
CHANGES = [
    ("bert", {"hidden_act": "relu", "pad_token_id": 7, "type_vocab_size": 1}),
    ("roberta", {"pad_token_id": 0}),
    ("roberta", {"pad_token_id": 7, "type_vocab_size": 3}),
    ("xlm-roberta", {"hidden_act": "gelu_new"}),
    ("camembert", {"layer_norm_eps": 0.01}),
    ("electra", {"embedding_size": 32}),
    ("electra", {"embedding_size": 48, "type_vocab_size": 3, "pad_token_id": 5}),
    ("distilbert", {"activation": "relu", "sinusoidal_pos_embds": True}),
    ("distilbert", {"n_heads": 8, "pad_token_id": 9}),
    ("mpnet", {"pad_token_id": 5}),
    ("mpnet", {"num_attention_heads": 2, "layer_norm_eps": 0.01}),
    ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    ("modernbert", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("modernbert", {"global_attn_every_n_layers": 2, "local_attention": 4}),
    ("modernbert", {"local_attention": 5, "hidden_activation": "gelu_pytorch_tanh"}),
    ("modernbert", {"global_rope_theta": 100.0, "local_rope_theta": 7.0, "norm_eps": 0.01}),
    pytest.param("modernbert", {"num_hidden_layers": 1}, marks=ONE_LAYER),
    ("modernbert", {"num_hidden_layers": 14}),  # more than are unrolled
]


@pytest.mark.parametrize(("family", "changes"), CHANGES, ids=str)
def test_each_field_is_honoured(family, changes, tmp_path):
    model = family_bases.save(tmp_path, family, **changes)
    base = huggingface.load(str(tmp_path))
    found = error(base, model, IDS)
    assert found <= 5e-5


@pytest.mark.parametrize(("family", "padding"), [("roberta", 1), ("roberta", 7), ("mpnet", 1)])
def test_a_padding_token_inside_a_sentence_takes_no_position(family, padding, tmp_path):
    changes = {"pad_token_id": padding} if family == "roberta" else {}
    model = family_bases.save(tmp_path, family, **changes)
    ids = [np.insert(x, [1, 2, 2], padding) for x in IDS[:4]] + [np.array([padding, 9, 12])]
    assert error(huggingface.load(str(tmp_path)), model, ids) <= 5e-5


@pytest.mark.parametrize(
    ("family", "longest"), [("bert", 66), ("roberta", 64), ("mpnet", 148), ("distilbert", 66)]
)
def test_the_longest_sentence(family, longest, saved):
    """Positions after the padding token's leave fewer for a sentence."""
    folder, model = saved(family)
    base = huggingface.load(str(folder))
    assert base.config.max_length == longest
    ids = np.random.default_rng(0).integers(5, 100, longest).astype(np.int32)
    found = hidden(base, family_bases.packed([ids], longest))[0]
    np.testing.assert_allclose(found, family_bases.torch_hidden(model, [ids])[0], atol=5e-5)


def test_buckets_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    places = torch.arange(600)
    theirs = MPNetEncoder.relative_position_bucket(places[None] - places[:, None])
    np.testing.assert_array_equal(ops.relative_buckets(600), theirs.numpy())
    assert len(np.unique(theirs)) == 31  # no distance is 0 and ahead


# ---- the conversion

KINDS = {
    "bert": {"ForPreTraining": ("cls",)},
    "roberta": {
        "ForMaskedLM": ("lm_head",), "ForSequenceClassification": ("classifier",),
        "ForQuestionAnswering": ("qa_outputs",),
    },
    "xlm-roberta": {"ForTokenClassification": ("classifier",)},
    "camembert": {"ForMaskedLM": ("lm_head",)},
    "distilbert": {
        "ForMaskedLM": ("vocab_layer_norm", "vocab_projector", "vocab_transform"),
        "ForSequenceClassification": ("classifier", "pre_classifier"),
    },
    "electra": {
        "ForPreTraining": ("discriminator_predictions",),
        "ForMaskedLM": ("generator_lm_head", "generator_predictions"),
        "ForMultipleChoice": ("classifier", "sequence_summary"),
    },
    "mpnet": {"ForMaskedLM": ("lm_head",), "ForSequenceClassification": ("classifier",)},
    "modernbert": {
        "ForMaskedLM": ("decoder", "head"), "ForSequenceClassification": ("classifier", "head"),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for family, kinds in KINDS.items() for kind in kinds]
)
def test_a_base_with_a_task_head(family, kind, tmp_path):
    model = family_bases.save(tmp_path, family, kind)
    base = huggingface.load(str(tmp_path))
    # A head that is tied to the embeddings may not be stored.
    assert base.left_out and set(base.left_out) <= set(KINDS[family][kind])
    encoder = getattr(model, families.FAMILIES[family].prefix)
    assert error(base, encoder, IDS[:3]) <= 5e-5


@every
def test_export_is_the_inverse_of_convert(family, saved):
    folder, model = saved(family)
    base = huggingface.load(str(folder))
    exported = huggingface.export(base.params, base.config)
    theirs = {n: x for n, x in model.state_dict().items() if not n.startswith("pooler.")}
    assert exported.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(exported[name], tensor.numpy())
    shapes = jax.tree.map(lambda x: x.shape, param_shapes(base.config))
    assert jax.tree.map(np.shape, base.params) == shapes


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@every
def test_tensors_that_do_not_fit_are_named(family, folder):
    copy = folder(family)
    last = list(families.linears(huggingface.read_config(copy / "config.json")))[-1]
    names = load_file(copy / "model.safetensors")
    name = next(n for n in names if n.endswith(f"{last}.weight"))
    shape = names[name].shape

    def missing(tensors):
        del tensors[name]

    def wrong(tensors):
        tensors[name] = np.zeros((shape[0], shape[1] + 1), np.float32)

    def unknown(tensors):
        tensors[name] = names[name]
        tensors[name.replace(last, "nothing")] = names[name]

    for change, said in (
        (missing, f"missing tensor '{last}.weight'"),
        (wrong, f"'{last}.weight' has shape .*, the config wants"),
        (unknown, "unknown tensor 'nothing"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            huggingface.load(edit(copy, change))
        assert str(caught.value).startswith(str(copy)) and "\n" not in str(caught.value)


# ---- config.json


@every
def test_every_field_of_transformers_is_known(family):
    """Of its config class and what it inherits: a new one must be looked at before it passes."""
    transformers = pytest.importorskip("transformers")
    config, entry = family_bases.config(family), families.FAMILIES[family]
    theirs = {field.name for field in dataclasses.fields(config)} | config.to_dict().keys()
    theirs |= {"torch_dtype", "num_labels", "name_or_path", "output_attentions"}
    theirs |= {"per_layer_config", "attn_implementation", "experts_implementation"}
    theirs |= transformers.GenerationConfig._get_default_generation_params().keys()
    known = huggingface.known_fields(entry)
    assert theirs - known - huggingface.HARMLESS - entry.harmless == set()
    assert not entry.harmless & known
    assert known & huggingface.HARMLESS <= {"pad_token_id"}  # RoBERTa's positions


def set_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


# Each changes what the model computes, or could; the message names the file and the field.
REFUSED = {
    "roberta": {
        "pad_token_id": [None, -1, 65, 1.5], "is_decoder": [True],
        "hidden_act": ["gelu_fast", None], "position_embedding_type": ["relative_key"],
        "embedding_size": [16], "num_attention_heads": [5],
    },
    "xlm-roberta": {"add_cross_attention": [True]},
    "camembert": {"type_vocab_size": [0, "1"]},
    "distilbert": {
        "activation": ["gelu_fast", None], "n_heads": [5, 0], "dim": ["32"], "hidden_size": [32],
        "n_layers": [0, 10**6], "attention_dropout": [1.0], "pruned_heads": [{"0": [1]}],
        "layer_norm_eps": [1e-5],
    },
    "electra": {"embedding_size": [0, "16"], "is_decoder": [True], "rotary_dim": [8]},
    "mpnet": {"relative_attention_num_buckets": [16, 64, None], "relative_max_distance": [64]},
    "modernbert": {
        "hidden_activation": ["gelu_fast"], "norm_eps": [0], "rope_scaling": [{"type": "linear"}],
        "layer_types": [["full_attention"], "full_attention", ["a", "b", "c"], [1, 2, 3]],
        "rope_parameters": [
            [], 3, {"full_attention": 3}, {"full_attention": {"rope_type": "yarn"}},
            {"sliding_attention": {"partial_rotary_factor": 0.5}}, {"rope_theta": 3.0},
            {"full_attention": {"rope_theta": "a"}},
        ],
        "global_attn_every_n_layers": [0, 1.5], "local_attention": [0], "hidden_size": [36],
        "num_hidden_layers": [10**6, "3"], "head_dim": [8], "norm_bias": ["no"],
        "num_attention_heads": [0],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [(f, field, v) for f, fields in REFUSED.items() for field, vs in fields.items() for v in vs],
)
def test_configs_we_cannot_honour_are_refused(family, field, value, folder):
    path = set_config(folder(family), **{field: value})
    named = {"global_rope_theta", "local_rope_theta"} if field == "rope_parameters" else set()
    with pytest.raises(UserError) as caught:
        huggingface.read_config(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and any(n in said for n in (field, *named))
    assert "\n" not in said


@every
def test_a_config_without_its_sizes(family, folder):
    path = folder(family) / "config.json"
    path.write_text(json.dumps({"model_type": family}))
    size = families.FAMILIES[family].fields.get("hidden_size", "hidden_size")
    with pytest.raises(UserError, match=f"has no .*{size}"):
        huggingface.read_config(path)


# What stood in config.json files of earlier transformers.
OLD = {
    "roberta": {"output_past": True, "position_embedding_type": "absolute"},
    "distilbert": {"tie_weights_": True, "qa_dropout": 0.1},
    "electra": {"summary_type": "first", "position_embedding_type": "absolute"},
    "modernbert": {
        "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 1e4,
        "layer_types": None, "rope_parameters": None, "layer_norm_eps": 1e-5,
        "position_embedding_type": "absolute", "reference_compile": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", OLD)
def test_configs_of_earlier_versions_mean_the_same(family, folder):
    copy = folder(family)
    before = huggingface.read_config(copy / "config.json")
    assert huggingface.read_config(set_config(copy, **OLD[family])) == before


def test_the_fingerprint_of_a_bert_is_that_of_earlier_versions(minilm):
    """Banks and runs know their base by it."""
    assert minilm.fingerprint.config.startswith("d6eadc1fbeb9a2fc")


@every
def test_the_fingerprint_tells_families_apart(family, saved):
    found = huggingface.load(str(saved(family)[0])).fingerprint
    assert found.model_type == family
    back = type(found).from_inputs(found.to_inputs())
    assert back == found


# ---- adapters


@every
def test_localised_names(family, saved):
    """`LoraConfig`'s defaults, BERT's names and the family's own mean modules of each family."""
    base = huggingface.load(str(saved(family)[0]))
    for names in (lora.PAPER_TARGETS, lora.ALL_TARGETS, PEFT_TARGETS[family]):
        config = families.localise(LoraConfig(2, 2.0, tuple(names)), base.config)
        chosen = lora.targets(base.params, config)
        assert chosen and families.localise(config, base.config) == config
    with pytest.raises(ValueError, match="unknown module 'no_such'"):
        lora.targets(base.params, families.localise(LoraConfig(2, 2.0, ("no_such",)), base.config))


# By PEFT's names.
PEFT_TARGETS = {
    "bert": ["query", "output.dense"],
    "roberta": ["query", "value", "intermediate.dense"],
    "xlm-roberta": ["key", "attention.output.dense"],
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin", "lin2"],
    "electra": ["embeddings_project", "query", "output.dense"],
    "mpnet": ["attn.q", "attn.o", "intermediate.dense"],
    "modernbert": ["Wqkv", "mlp.Wo"],
}


@pytest.fixture(scope="module")
def adapted(saved, tmp_path_factory):
    """A family's torch model with a random PEFT adapter, and the folder PEFT saved it to."""
    made = {}

    def get(family, **more):
        key = family, json.dumps(more)
        if key not in made:
            peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
            folder = tmp_path_factory.mktemp(f"{family}-peft")
            torch.manual_seed(1)
            values = {"r": 3, "lora_alpha": 6, "target_modules": PEFT_TARGETS[family]} | more
            model = family_bases.torch_model(family)
            model = peft.get_peft_model(model, peft.LoraConfig(**values)).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(0.2 * torch.randn_like(parameter))
            model.save_pretrained(folder)
            made[key] = folder, model
        return made[key]

    return get


def adapted_hidden(base, adapter, config, rows):
    run = base.config.network(jnp.float32, config).apply
    return jax.jit(run)({"params": base.params, "lora": adapter}, *rows[:3])


MORE = [
    ("electra", {"target_modules": "all-linear"}),
    ("distilbert", {"target_modules": "all-linear", "use_rslora": True}),
    ("mpnet", {"target_modules": ["o", "output.dense"], "rank_pattern": {"output.dense": 5}}),
    ("modernbert", {"alpha_pattern": {r"layers\.1\.attn\.Wqkv": 11}}),
    ("roberta", {"rank_pattern": {"encoder.layer.0.attention.self.query": 5}}),
]


@pytest.mark.parametrize(
    ("family", "more"),
    [
        *(pytest.param(f, {}, marks=() if f in KINDS else pytest.mark.slow) for f in FAMILIES),
        *MORE,
    ],
    ids=str,
)
def test_we_read_pefts_and_peft_reads_ours(family, more, saved, adapted, tmp_path):
    peft = pytest.importorskip("peft")
    base = huggingface.load(str(saved(family)[0]))
    folder, model = adapted(family, **more)
    adapter, config = peft_files.load(folder, base.config)
    rows, wanted = family_bases.packed(IDS), family_bases.torch_hidden(model, IDS)
    found = np.asarray(adapted_hidden(base, adapter, config, rows))
    plain = hidden(base, rows)
    ours = [found[rows.segment_ids == n + 1] for n in range(len(IDS))]
    assert np.abs(found - plain)[rows.segment_ids > 0].max() > 0.05
    worst = max(np.abs(a - b).max() for a, b in zip(ours, wanted, strict=True))
    print(f"\nFIGURE reads {family} {worst:.1e}")
    assert worst <= 2e-5

    peft_files.save(tmp_path / "ours", adapter, config, base.name, base.config)
    again = peft.PeftModel.from_pretrained(family_bases.torch_model(family), tmp_path / "ours")
    written = load_file(tmp_path / "ours" / peft_files.TENSORS)
    assert written.keys() == peft.get_peft_model_state_dict(again).keys()
    theirs = family_bases.torch_hidden(again.eval(), IDS)
    worst = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    print(f"\nFIGURE writes {family} {worst:.1e}")
    assert worst <= 2e-5
    back, back_config = peft_files.load(tmp_path / "ours", base.config)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)
    assert lora.targets(base.params, back_config).keys() == lora.targets(base.params, config).keys()


@quick
def test_lora_gradient_equals_pefts(family, saved, adapted):
    torch = pytest.importorskip("torch")
    base = huggingface.load(str(saved(family)[0]))
    folder, model = adapted(family)
    adapter, config = peft_files.load(folder, base.config)
    rows = family_bases.packed(IDS)
    weights = np.random.default_rng(3).normal(size=base.config.hidden_size).astype(np.float32)

    def loss(adapter):
        found = adapted_hidden(base, adapter, config, rows)
        return jnp.sum(jnp.tanh(found @ weights) * (rows.segment_ids > 0))

    ours = jax.grad(loss)(adapter)
    model.zero_grad()
    for ids in IDS:
        out = model(input_ids=torch.tensor(ids[None]).long()).last_hidden_state
        torch.tanh(out @ torch.tensor(weights)).sum().backward()
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters() if "lora_" in n}
    worst, used = 0.0, set()
    for path, leaf in lora_leaves(ours).items():
        parts = np.asarray(leaf) if path[0] == "layers" else np.asarray(leaf)[None]
        for module, part in zip(families.module_names(path[:-1], base.config), parts, strict=True):
            name = f"base_model.model.{module}.lora_{path[-1]}.default.weight"
            wanted = theirs[name].T
            worst = max(worst, np.abs(part - wanted).max() / max(1.0, np.abs(wanted).max()))
            used.add(name)
    print(f"\nFIGURE gradient {family} {worst:.1e}")
    assert used == theirs.keys() and worst <= 1e-4


@quick
def test_each_sentence_uses_its_own_adapter(family, saved, adapted):
    base = huggingface.load(str(saved(family)[0]))
    adapter, config = peft_files.load(adapted(family)[0], base.config)
    other = jax.tree.map(lambda x: -x[..., ::-1, :], adapter)
    encode = encoder(base.config, jnp.float32, config, "mean")
    rows, owner = family_bases.packed(IDS), np.arange(len(IDS)) % 2
    frozen = {"params": base.params}
    both = (unstack_layers(x) for x in (adapter, other))
    stack = jax.tree.map(lambda *x: jnp.stack(x), *both)
    of_token = np.where(rows.segment_ids > 0, owner[rows.segment_ids - 1], 0)
    mixed = make_mixed_encode(encode)(frozen, stack, rows, jnp.array(of_token))
    alone = [make_encode(encode)(frozen, {"lora": x}, rows) for x in (adapter, other)]
    wanted = np.where(owner[:, None] == 0, *alone)
    np.testing.assert_allclose(mixed, wanted, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.01

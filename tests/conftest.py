"""Strict JAX, no network, no user cache, and the two base models that tests share."""

import atexit
import json
import os
import tempfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

_CACHE = tempfile.TemporaryDirectory(prefix="jaxlora-tests-")
atexit.register(_CACHE.cleanup)
# Before jaxlora or huggingface_hub is imported, and whatever they were: tests never touch the
# user's cache or the network.
os.environ["JAXLORA_CACHE"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"

jax.config.update("jax_numpy_rank_promotion", "raise")
# The same small programs are compiled by many tests, in pytest-xdist's workers and in processes
# that tests start: all use the cache of the first process.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_CACHE.name}/xla"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _jax_environment():
    return {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))}


_JAX_ENVIRONMENT = _jax_environment()


@pytest.fixture(scope="session", autouse=True)
def imports_leave_the_environment_alone():
    """Refuse test modules that change JAX's settings when imported: processes inherit them."""
    assert _jax_environment() == _JAX_ENVIRONMENT


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(
    a + b
    for a in "bcdfglmnpr"
    for b in ["a", "e", "i", "o", "u", "an", "en", "in", "on", "un", "ar", "er", "ir", "or", "ur"]
)
TINY = {
    "model_type": "bert",
    "vocab_size": len(SPECIAL) + len(WORDS) + 45,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def _linear(name, fan_in, fan_out):
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def _norm(name, size):
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _hugging_face_shapes(c):
    hidden, wide = c["hidden_size"], c["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (c["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (c["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (c["type_vocab_size"], hidden),
        **_norm("embeddings.LayerNorm", hidden),
        **_linear("pooler.dense", hidden, hidden),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            shapes |= _linear(f"{layer}.attention.self.{name}", hidden, hidden)
        shapes |= _linear(f"{layer}.attention.output.dense", hidden, hidden)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", hidden)
        shapes |= _linear(f"{layer}.intermediate.dense", hidden, wide)
        shapes |= _linear(f"{layer}.output.dense", wide, hidden)
        shapes |= _norm(f"{layer}.output.LayerNorm", hidden)
    return shapes


def _tiny_tensors():
    rng = np.random.default_rng(0)
    return {
        name: (rng.normal(0, 0.1, shape) + ("LayerNorm.weight" in name)).astype(np.float32)
        for name, shape in _hugging_face_shapes(TINY).items()
    }


def _tiny_tokenizer():
    letters = [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"] + list("acehijkoqstuvwxyz.?")
    words = [*SPECIAL, *WORDS, *letters]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    return tokenizer


@pytest.fixture(scope="session")
def minilm():
    """The packaged MiniLM (six layers, 384 wide), the real weights of these tests."""
    from jaxlora.formats import huggingface

    return huggingface.load("minilm")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A Hugging Face folder with a tiny random BERT; its words are two or three letters."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    (folder / "config.json").write_text(json.dumps(TINY))
    save_file(_tiny_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    _tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_base):
    """`tiny_base`, loaded."""
    from jaxlora.formats import huggingface

    return huggingface.load(str(tiny_base))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A small folder of data in the CS224N format."""
    from tiny import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def make(tiny_base, data_dir):
    """Settings of a short run of a variant on that data."""
    from tiny import short

    from jaxlora.training.presets import make_settings

    def settings(variant, **more):
        flags = short(variant, **more)
        return make_settings(variant, base=str(tiny_base), data_dir=data_dir, **flags)

    return settings


@pytest.fixture(scope="session")
def finished_lora3(make, tmp_path_factory):
    """A finished run of `make("lora3")`. Copy it before changing it."""
    from tiny import Silent

    from jaxlora.training import run

    out = tmp_path_factory.mktemp("finished") / "lora3"
    run.run(make("lora3"), out, Silent())
    return out


@pytest.fixture
def call(capsys):
    """Run a command of `jaxlora`; returns its exit code and what it printed."""
    from jaxlora.cli.main import main

    def run(*args):
        code = main(list(map(str, args)))
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs of these tests are compiled without optimizations, since each runs a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def reads(monkeypatch):
    """The trees that are read from now on."""
    from jaxlora.serving import tree_files

    real, seen = tree_files.load, []
    monkeypatch.setattr(tree_files, "load", lambda path: seen.append(path.name) or real(path))
    return seen

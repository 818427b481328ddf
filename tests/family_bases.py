"""Tiny random encoders of every family, made and saved by transformers itself, with tokenizers."""

import string

import numpy as np
import pytest

from jaxlora.data.packing import Shape, fill

FAMILIES = (
    "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet", "modernbert",
)  # fmt: skip
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 66,
}  # fmt: skip
ROBERTA = {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
CONFIGS = {
    "bert": ("BertConfig", SIZES),
    "roberta": ("RobertaConfig", SIZES | ROBERTA),
    "xlm-roberta": ("XLMRobertaConfig", SIZES | ROBERTA),
    "camembert": ("CamembertConfig", SIZES | ROBERTA),
    "distilbert": (
        "DistilBertConfig",
        {
            "vocab_size": 300, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48,
            "max_position_embeddings": 66,
        },
    ),
    "electra": ("ElectraConfig", SIZES | {"embedding_size": 16}),
    "mpnet": ("MPNetConfig", SIZES | {"layer_norm_eps": 1e-5, "max_position_embeddings": 150}),
    "modernbert": ("ModernBertConfig", SIZES | {"local_attention": 8, "pad_token_id": 0}
                   | {f"{name}_token_id": n for n, name in ((2, "cls"), (3, "sep"), (2, "bos"),
                                                            (3, "eos"))}),
}  # fmt: skip
WORDS = ("film", "dog", "the", "run", "##ning", "##s", "a", "not", "café")
TEXTS = (
    "a film", "the dog runs, not running.", "Café  the", "", "a film ", "  a", "x" * 9,
    "the dog " * 6, "日本 😀", "film\n",
)  # fmt: skip


def config(family, **changes):
    """transformers' configuration of a tiny encoder."""
    transformers = pytest.importorskip("transformers")
    name, sizes = CONFIGS[family]
    return getattr(transformers, name)(**sizes | changes)


def torch_model(family, kind="Model", **changes):
    """A random model of a family: large weights, so that errors show; biases are not zero."""
    torch = pytest.importorskip("torch")
    import transformers

    name = CONFIGS[family][0].removesuffix("Config") + kind
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.12 * torch.randn_like(parameter))
    model.set_attn_implementation("eager")
    return model.eval()


def word_pieces(special):
    letters = [*string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), *".,?"]
    return {word: n for n, word in enumerate([*special, *WORDS, *letters])}


def byte_pairs(special):
    """A vocabulary of bytes and a few merges, for GPT-2's kind of tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = [
        ("Ġ", "a"),
        ("f", "i"),
        ("l", "m"),
        ("fi", "lm"),
        ("d", "o"),
        ("Ġ", "film"),
        ("r", "u"),
    ]
    words = [*special, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    return {word: n for n, word in enumerate(words)}, merges


def pieces(special):
    """A vocabulary with scores, for SentencePiece's kind of tokenizer."""
    words = [
        ("▁film", -3.0),
        ("▁", -5.0),
        ("▁a", -4.0),
        *((c, -8.0) for c in string.printable[:94]),
    ]
    return [*((mark, 0.0) for mark in special), *words, ("<mask>", 0.0)]


def tokenizer(family):
    """A small tokenizer of the class that the family's models have."""
    transformers = pytest.importorskip("transformers")
    marks, brackets = (
        ("<s>", "<pad>", "</s>", "<unk>"),
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    )
    match family:
        case "bert" | "distilbert" | "electra":
            kind = {"bert": "Bert", "distilbert": "DistilBert", "electra": "Electra"}[family]
            return getattr(transformers, f"{kind}Tokenizer")(vocab=word_pieces(brackets))
        case "mpnet":
            vocabulary = word_pieces((*marks[:3], "[UNK]", "<mask>"))
            return transformers.MPNetTokenizer(vocab=vocabulary)
        case "roberta":
            vocabulary, merges = byte_pairs((*marks, "<mask>"))
            return transformers.RobertaTokenizer(vocab=vocabulary, merges=merges)
        case "xlm-roberta":
            return transformers.XLMRobertaTokenizer(vocab=pieces(marks))
        case "camembert":
            special = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>")
            return transformers.CamembertTokenizer(vocab=pieces(special))
    return modern_tokenizer(brackets)


def modern_tokenizer(brackets):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary, merges = byte_pairs(brackets)
    built = Tokenizer(models.BPE(vocabulary, merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    named = {f"{mark.strip('[]').lower()}_token": mark for mark in brackets}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, **named)


def save(folder, family, kind="Model", **changes):
    """A folder with a random model and a tokenizer; the model."""
    model = torch_model(family, kind, **changes)
    model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return model


def sentences(low=5, high=100, lengths=(9, 3, 14, 30, 6, 2, 21)):
    """Random token ids of sentences of several lengths, without special tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(low, high, n).astype(np.int32) for n in lengths]


def packed(ids, length=40):
    """Sentences, several to a row."""
    return fill(ids, range(len(ids)), len(ids), Shape(-(-sum(map(len, ids)) // length) + 1, length))


def apart(ids, length=40):
    """Sentences, one to a row."""
    rows = [fill([s], [0], 1, Shape(1, length)) for s in ids]
    return [np.concatenate(part) for part in zip(*(r[:3] for r in rows), strict=True)]


def torch_hidden(model, ids):
    """The last layer's vectors of each sentence, each encoded alone and without padding."""
    import torch

    with torch.no_grad():
        return [
            model(input_ids=torch.tensor(s[None]).long()).last_hidden_state[0].numpy() for s in ids
        ]

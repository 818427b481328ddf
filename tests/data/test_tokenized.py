"""Tokenising, truncation and the token cache."""

import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from jaxlora.data import sources, tokenized
from jaxlora.data.raw_examples import TextExample
from jaxlora.data.tokenized import load_examples, tokenize, truncating
from jaxlora.tasks.task import PARA, SST

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "good", "bad", "film", "##s"]
CLS, SEP = WORDS.index("[CLS]"), WORDS.index("[SEP]")


@pytest.fixture
def tokenizer():
    """A WordPiece tokenizer of a dozen words, set up as BERT's is."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    built = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return built


ROWS = {
    "train": [
        TextExample("x", "a b c", "d e", 1.0),
        TextExample("y", "good films", "bad film a b c d", 0.0),
    ],
    "dev": [TextExample("z", "a", "b", 1.0)],
    "test": [TextExample("w", "a a", "b b b b b b b b", float("nan"))],
}


@pytest.fixture
def source(monkeypatch):
    """Rows without files or TFDS; the list says which calls reached the source."""
    calls = []

    def load_rows(task, name, data_dir, cache):
        calls.append(name)
        single = {s: [r._replace(sentence2="") for r in rows] for s, rows in ROWS.items()}
        return (ROWS if task.pair else single), "fake"

    monkeypatch.setattr(sources, "load_rows", load_rows)
    monkeypatch.setattr(sources, "fingerprint", lambda task, name, data_dir: f"fake-{data_dir}")
    return calls


def load(tokenizer, cache, *, task=PARA, data_dir=None, key="k", max_length=6):
    return load_examples(task, "demo", data_dir, tokenizer, key, max_length, cache)


def words_of(split, number):
    return [WORDS[token] for token in split.sentence(number)]


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for split in first:
        for name, value in vars(first[split]).items():
            np.testing.assert_array_equal(value, vars(second[split])[name])


def test_tokenize_cuts_long_sentences_and_counts_them(tokenizer):
    tokens, offsets, truncated, *_ = tokenize(
        truncating(tokenizer, 5), ["a b", "a b c d e", "good films"]
    )
    assert tokens.dtype == np.int32
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [0, 4, 9, 14]
    assert [WORDS[t] for t in tokens[4:9]] == ["[CLS]", "a", "b", "c", "[SEP]"]
    assert [WORDS[t] for t in tokens[9:]] == ["[CLS]", "good", "film", "##s", "[SEP]"]
    assert truncated == 1


def test_tokenize_nothing(tokenizer):
    tokens, offsets, truncated, *_ = tokenize(truncating(tokenizer, 8), [])
    assert tokens.dtype == np.int32
    assert (len(tokens), offsets.tolist(), truncated) == (0, [0], 0)


@pytest.mark.parametrize("template", ["[CLS] $A [SEP]", "$A [SEP]", "[CLS] $A", None])
def test_texts_without_tokens_are_found_by_the_tokenizers_own_template(tokenizer, template):
    special = [("[CLS]", CLS), ("[SEP]", SEP)]
    tokenizer.post_processor = processors.ByteLevel()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    assert tokenize(truncating(tokenizer, 8), ["a", "", "good film", "\x00"]).empty == [1, 3]


def test_tokenize_in_chunks_gives_the_same(tokenizer, monkeypatch):
    texts = ["a", "b c", "d e a", "good film", "bad"]
    whole = tokenize(truncating(tokenizer, 4), texts)
    monkeypatch.setattr(tokenized, "_CHUNK", 2)
    for a, b in zip(whole, tokenize(truncating(tokenizer, 4), texts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tokenize_leaves_the_tokenizer_alone(tokenizer):
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    before = tokenizer.to_str()
    tokens, _, truncated, *_ = tokenize(truncating(tokenizer, 8), ["a b c", "a"])
    assert tokenizer.to_str() == before
    assert (len(tokens), truncated) == (8, 0)


def test_sentences_of_a_pair_stand_side_by_side(tokenizer, source, tmp_path):
    train = load(tokenizer, tmp_path)["train"]
    assert train.sentences == 2
    assert train.ids.tolist() == ["x", "y"]
    assert train.labels.dtype == np.float32
    assert words_of(train, 1) == ["[CLS]", "d", "e", "[SEP]"]
    assert words_of(train, 3) == ["[CLS]", "bad", "film", "a", "b", "[SEP]"]
    assert train.lengths.tolist() == [5, 4, 5, 6]
    assert train.truncated == 1


def test_single_sentences_and_missing_labels(tokenizer, source, tmp_path):
    splits = load(tokenizer, tmp_path, task=SST)
    assert list(splits) == ["train", "dev", "test"]
    assert len(splits["train"].lengths) == 2
    assert splits["train"].labelled
    assert not splits["test"].labelled


def test_the_second_time_comes_from_the_cache(tokenizer, source, tmp_path):
    first = load(tokenizer, tmp_path)
    second = load(tokenizer, tmp_path)
    assert source == ["demo"]
    assert_equal(first, second)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".npz"]


@pytest.mark.parametrize(
    "changed",
    [{"key": "other"}, {"max_length": 7}, {"data_dir": "elsewhere"}, {"task": SST}],
    ids=lambda c: next(iter(c)),
)
def test_the_cache_is_keyed_by_all_that_decides_the_tokens(tokenizer, source, tmp_path, changed):
    load(tokenizer, tmp_path)
    load(tokenizer, tmp_path, **changed)
    assert len(source) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda raw: b"", lambda raw: b"not a zip", lambda raw: raw[: len(raw) // 2],
     lambda raw: raw.replace(raw[200:300], bytes(100)),
     lambda raw: raw.replace(b"PK\1\2-\3-", b"PK\1\2-\3\xff")],
    ids=["empty", "text", "half", "bits", "version"],
)  # fmt: skip
def test_a_damaged_cache_file_is_rebuilt(tokenizer, source, tmp_path, damage):
    first = load(tokenizer, tmp_path)
    (path,) = (tmp_path / "tokens").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert_equal(first, load(tokenizer, tmp_path))
    assert len(source) == 2
    load(tokenizer, tmp_path)
    assert len(source) == 2


def test_examples_are_joined(tokenizer, source, tmp_path):
    splits = load(tokenizer, tmp_path)
    joined = splits["train"].join(splits["dev"])
    assert joined.ids.tolist() == ["x", "y", "z"] and joined.labels.tolist() == [1, 0, 1]
    assert words_of(joined, 4) == ["[CLS]", "a", "[SEP]"]
    assert words_of(joined, 5) == ["[CLS]", "b", "[SEP]"]
    for number in range(4):
        assert words_of(joined, number) == words_of(splits["train"], number)
    assert joined.offsets[-1] == len(joined.tokens) and len(joined.lengths) == 6
    with pytest.raises(ValueError, match="sentences: 2 and 1"):
        joined.join(load(tokenizer, tmp_path, task=SST)["train"])


def test_a_cache_file_cannot_run_code(tokenizer, source, tmp_path):
    load(tokenizer, tmp_path)
    (path,) = (tmp_path / "tokens").iterdir()
    np.savez(path, **{"train.ids": np.array([object()], dtype=object)})
    assert len(load(tokenizer, tmp_path)["train"]) == 2
    assert len(source) == 2


def test_a_failed_write_ends_no_run_and_leaves_nothing_behind(
    tokenizer, source, tmp_path, monkeypatch, capsys
):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    found = load(tokenizer, tmp_path)
    assert len(found["train"]) and "is not cached (no space left)" in capsys.readouterr().err
    assert not list((tmp_path / "tokens").iterdir())


WARM = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
from jaxlora.data.tokenized import load_examples
from jaxlora.tasks.task import SST
tokenizer = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json")
splits = load_examples(SST, "demo", None, tokenizer, "k", 32, Path(sys.argv[1]))
print(len(splits["train"]), "tensorflow_datasets" in sys.modules, "tensorflow" in sys.modules)
"""


def test_a_warm_cache_does_without_tfds(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    said = [
        subprocess.run(
            [sys.executable, "-c", WARM, str(tmp_path)], capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert [run.stdout.split() for run in said] == [
        ["2000", "True", "False"],
        ["2000", "False", "False"],
    ]
    assert "Generating" not in said[0].stderr
    assert "WARNING" not in said[0].stderr

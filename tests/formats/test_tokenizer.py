"""The ids are those of transformers' AutoTokenizer, for every folder, or the folder is refused."""

import itertools
import json
import random
import shutil
import subprocess
import sys

import family_bases
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from jaxlora.data.tokenized import tokenize, truncating
from jaxlora.formats import tokenizer as base_tokenizer
from jaxlora.utils.errors import UserError

transformers = pytest.importorskip("transformers")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("a", "dog", "Dog", "cafe", "café", "run", "##s", "##ning", "un", "##é", "日", "本", "##本",
         "日本", ".", ",", "#", "!", "😀", "[", "]", "mask", "cl", "new", "token", "##en", "I", "i",
         "ı", "ss", "ß", "fi", "<", ">", "pad", "unk")  # fmt: skip
VOCABULARY = {word: number for number, word in enumerate(SPECIAL + WORDS)}
MORE = ("[unused0]", "[NEW]", "<s>", "</s>", "<unk>", "<pad>", "newtoken", "Zürich")
ROOM = len(VOCABULARY) + len(MORE)  # embeddings

TEXTS = (
    "", " ", "A dog", "the Dog runs.", "café CAFÉ cafe\u0301", "日本 日本語本",
    "[MASK] dog [CLS] [SEP]", "a[MASK]dog", "[mask]", "😀 dog😀 \U0001f469\u200d\U0001f467",
    "a\tdog\n\r\x00run\x07s\u200b", "dog" * 60, "#!.,a,dog", "newtoken newtokens NEWTOKEN",
    "Zürich zurich ZÜRICH", "[NEW]dog [NEW] [new]", "İI ıi ß ﬁ", "<s>dog</s> <unk> <pad>",
    "\ufeffdog \ufffd", "run running unrun", "dog " * 40, "[unused0] a", "a\u00a0dog\u3000日",
    "e\u0301 é", "[PAD] [UNK]",
)  # fmt: skip


def random_texts(count=60):
    rng = random.Random(5)
    parts = [*VOCABULARY, *MORE, " ", "\n", "Ä", "é", "x", "日", "##", "\u0301", "\x00", "😀"]
    return ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(count)]


def fast(lowercase=True, unk="[UNK]", cls="[CLS]", sep="[SEP]", vocabulary=VOCABULARY):
    built = Tokenizer(models.WordPiece(vocabulary, unk_token=unk))
    built.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = ((sep, vocabulary[sep]), (cls, vocabulary[cls]))
    built.post_processor = processors.BertProcessing(*ends)
    return built


def added(name, number, **more):
    kept = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {str(number): kept | {"content": name, "special": True} | more}


def renamed(**names):
    """The vocabulary with other special tokens, as HerBERT's."""
    return {names.get(word.strip("[]").lower(), word): n for word, n in VOCABULARY.items()}


N = len(VOCABULARY)
FIRST = added("[NEW]", N)
LOWER = added("newtoken", N, special=False, normalized=True)
ROBERTA = renamed(cls="<s>", sep="</s>", unk="<unk>", pad="<pad>", mask="<mask>")
NAMES = {"cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
NAMES |= {"mask_token": "<mask>"}
TXT = "".join(f"{word}\n" for word in VOCABULARY)
CUT = fast()
CUT.enable_truncation(7)
CUT.enable_padding(length=9)
WITH_ADDED = fast()
WITH_ADDED.add_tokens(["newtoken", "Zürich"])
WITH_ADDED.add_special_tokens(["[NEW]"])
TYPED = fast()
TYPED.post_processor = processors.TemplateProcessing(
    single="[CLS]:1 $A:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)

# Name → files; objects are written as JSON, None: what must be refused is said below.
JSON, CONFIG, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
VOCAB, ADDED = "vocab.txt", "added_tokens.json"
FOLDERS = {
    "json": {JSON: fast()},
    "json cased": {JSON: fast(lowercase=False)},
    "json, class": {JSON: fast(lowercase=False), CONFIG: {"tokenizer_class": "BertTokenizer"}},
    "json, fast class": {
        JSON: fast(lowercase=False), CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "json, bare slow class": {JSON: fast(), CONFIG: {"tokenizer_class": "PreTrainedTokenizer"}},
    "json, unknown class": {JSON: fast(), CONFIG: {"tokenizer_class": "NobodysTokenizer"}},
    "json, DistilBERT": {JSON: fast(), CONFIG: {"tokenizer_class": "DistilBertTokenizerFast"}},
    "json, config": {JSON: fast(), "config.json": {"tokenizer_class": "BertTokenizerFast"}},
    "json, config cased": {JSON: fast(), CONFIG: {"do_lower_case": False}},
    "json, accents kept": {JSON: fast(), CONFIG: {"strip_accents": False}},
    "json, accents dropped": {
        JSON: fast(lowercase=False), CONFIG: {"strip_accents": True, "do_lower_case": False},
    },
    "json, Chinese whole": {JSON: fast(), CONFIG: {"tokenize_chinese_chars": False}},
    "json with truncation": {JSON: CUT},
    "json with added tokens": {JSON: WITH_ADDED},
    "json with added tokens, fast class": {
        JSON: WITH_ADDED, CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "json, other specials": {
        JSON: fast(unk="<unk>", cls="<s>", sep="</s>", vocabulary=ROBERTA),
        CONFIG: NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "json, other specials, map": {
        JSON: fast(unk="<unk>", cls="<s>", sep="</s>", vocabulary=ROBERTA), MAP: NAMES,
    },
    "vocab": {VOCAB: TXT},
    "vocab, CRLF": {VOCAB: TXT.replace("\n", "\r\n")},
    "vocab cased": {
        VOCAB: TXT, CONFIG: {"do_lower_case": False, "tokenizer_class": "BertTokenizer"},
    },
    "vocab, accents": {VOCAB: TXT, CONFIG: {"do_lower_case": False, "strip_accents": True}},
    "vocab, Chinese": {VOCAB: TXT, CONFIG: {"tokenize_chinese_chars": False}},
    "vocab, other specials": {VOCAB: "".join(f"{w}\n" for w in ROBERTA), CONFIG: NAMES},
    "vocab, specials in the map": {VOCAB: "".join(f"{w}\n" for w in ROBERTA), MAP: NAMES},
    "vocab, added": {VOCAB: TXT, ADDED: {"[NEW]": N, "newtoken": N + 1, "Zürich": N + 2}},
    "vocab, added, special": {
        VOCAB: TXT, ADDED: {"[NEW]": N}, MAP: {"additional_special_tokens": ["[NEW]"]},
    },
    "vocab, decoder": {VOCAB: TXT, CONFIG: {"added_tokens_decoder": FIRST}},
    "vocab, normalised decoder": {VOCAB: TXT, CONFIG: {"added_tokens_decoder": LOWER}},
    "vocab, stripping": {
        VOCAB: TXT, CONFIG: {"added_tokens_decoder": added("[NEW]", N, lstrip=True, rstrip=True)},
    },
    "vocab, extra": {VOCAB: TXT, CONFIG: {"extra_special_tokens": ["[NEW]", "<s>"]}},
    "vocab, mask": {
        VOCAB: TXT,
        CONFIG: {"mask_token": {"__type": "AddedToken", "content": "[MASK]", "lstrip": True}},
    },
    "vocab, lengths": {VOCAB: TXT, CONFIG: {"model_max_length": 5, "padding_side": "left"}},
    "vocab, old fields": {
        VOCAB: TXT, CONFIG: {"never_split": ["dog"], "do_basic_tokenize": False},
    },
    "both": {JSON: fast(lowercase=False), VOCAB: TXT, CONFIG: {"do_lower_case": True}},
    "versions": {
        JSON: fast(), "tokenizer.4.0.0.json": fast(lowercase=False),
        CONFIG: {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json"],
                 "tokenizer_class": "PreTrainedTokenizerFast"},
    },
}  # fmt: skip

REFUSED = {
    "Japanese": (
        {VOCAB: TXT, CONFIG: {"tokenizer_class": "BertJapaneseTokenizer"}}, "BertJapaneseTokenizer",
    ),
    "Japanese in config": (
        {VOCAB: TXT, "config.json": {"tokenizer_class": "BertJapaneseTokenizer"}},
        r"config\.json: tokenizer_class 'BertJapaneseTokenizer' is no fast tokenizer",
    ),
    "tweets": ({JSON: fast(), CONFIG: {"tokenizer_class": "BertweetTokenizer"}}, "BertweetT"),
    "a model": ({JSON: fast(), CONFIG: {"tokenizer_class": "AutoModel"}}, "'AutoModel' is no"),
    "a function": ({JSON: fast(), CONFIG: {"tokenizer_class": "pipeline"}}, "'pipeline' is no"),
    "a number": ({JSON: fast(), CONFIG: {"tokenizer_class": 3}}, "tokenizer_class 3"),
    "a path": ({JSON: fast(), CONFIG: {"tokenizer_class": "os.system"}}, "'os.system' is not the"),
    "another kind": ({VOCAB: TXT, CONFIG: {"tokenizer_class": "XLMRobertaTokenizer"}}, "tokenizer"),
    "unknown, vocab": ({VOCAB: TXT, CONFIG: {"tokenizer_class": "Nobodys"}}, "cannot load its tok"),
    "added beyond": (
        {VOCAB: TXT, ADDED: {"[FAR]": N}}, rf"'\[FAR\]' has id {N}.* embeddings for {N} ids", N,
    ),
    "decoder beyond": (
        {JSON: fast(), CONFIG: {"added_tokens_decoder": added("[FAR]", N)}}, rf"\[FAR\].* {N},", N,
    ),
    "pad beyond": ({JSON: fast(), CONFIG: {"pad_token": "[P]"}}, r"'\[P\]' has id", N),
    "words beyond": ({VOCAB: TXT}, rf"'unk' has id {N - 1}", N - 1),
    "a hole": (
        {JSON: fast(vocabulary=VOCABULARY | {"far": 9999})}, "'far' has id 9999, the model has",
    ),
    "cut on the left": ({VOCAB: TXT, CONFIG: {"truncation_side": "left"}}, "truncation_side"),
    "split specials": ({VOCAB: TXT, CONFIG: {"split_special_tokens": True}}, "split_special"),
    "types": ({JSON: TYPED, CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}}, "token types"),
    "no vocabulary": ({CONFIG: {"do_lower_case": True}}, r"no tokenizer\.json or vocab\.txt"),
    "the wrong vocabulary": ({"vocab.json": {"a": 0}}, "has no words"),
    "no unknown word": ({JSON: fast(), CONFIG: {"unk_token": "<unk>"}}, "cannot be applied"),
    "elsewhere": ({JSON: fast(), CONFIG: {"init_inputs": ["/etc/passwd"]}}, "init_inputs"),
    "elsewhere, vocab": ({JSON: fast(), CONFIG: {"vocab": "/etc/passwd"}}, "vocab is not"),
    "versions elsewhere": (
        {JSON: fast(), CONFIG: {"fast_tokenizer_files": ["../tokenizer.4.0.json"]}}, "beside it",
    ),
    "no JSON": ({JSON: "{", VOCAB: TXT}, r"tokenizer\.json: not valid JSON"),
    "no object": ({JSON: fast(), MAP: "[]"}, r"special_tokens_map\.json: not a JSON object"),
    "no such tokenizer": ({JSON: {"model": 3}}, "cannot load its tokenizer"),
}  # fmt: skip


def make(folder, files):
    for name, content in files.items():
        if isinstance(content, Tokenizer):
            content.save(str(folder / name))
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_bytes(text.encode())
    about = {"model_type": "bert"} | (files.get("config.json") or {})
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def load_twice(folder, room, monkeypatch):
    """From transformers, then what is kept of that, which must be the same in all that counts."""
    first = base_tokenizer.load(folder, room)
    with monkeypatch.context() as patch:
        patch.setattr(base_tokenizer, "_resolve", None)
        kept = base_tokenizer.load(folder, room)
    assert kept is not first and kept.to_str() == first.to_str()
    assert base_tokenizer.essence(kept) == base_tokenizer.essence(first)
    assert base_tokenizer.pair_template(kept) == base_tokenizer.pair_template(first)
    return kept


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_ids_are_those_of_transformers(kind, tmp_path, monkeypatch):
    folder = make(tmp_path, FOLDERS[kind])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_twice(folder, ROOM, monkeypatch)
    texts = [*TEXTS, *random_texts()]
    assert [e.ids for e in ours.encode_batch(texts)] == theirs(texts)["input_ids"]
    for length in (5, 16):
        tokens, offsets, *_ = tokenize(truncating(ours, length), texts)
        wanted = theirs(texts, truncation=True, max_length=length)["input_ids"]
        assert [x.tolist() for x in np.split(tokens, offsets[1:-1])] == wanted


BLANKS = (
    "a film ",
    " a film",
    "a  film  ",
    "film\n",
    "\tfilm",
    " ",
    "  ",
    "a film\u00a0",
    "<mask> a",
)


@pytest.mark.parametrize("family", family_bases.FAMILIES)
def test_the_ids_of_each_family_are_those_of_transformers(family, tmp_path, monkeypatch):
    """Byte-level tokenizers, for one, see blanks at the ends."""
    family_bases.tokenizer(family).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_twice(tmp_path, 500, monkeypatch)
    texts = [*BLANKS, *family_bases.TEXTS, *TEXTS, *random_texts()]
    assert [e.ids for e in ours.encode_batch(texts)] == theirs(texts)["input_ids"]
    tokens, offsets, *_ = tokenize(truncating(ours, 5), texts)
    wanted = theirs(texts, truncation=True, max_length=5)["input_ids"]
    assert [x.tolist() for x in np.split(tokens, offsets[1:-1])] == wanted
    if family in ("roberta", "modernbert"):
        assert ours.encode("a film ").ids != ours.encode("a film").ids


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_the_same_is_refused(kind, tmp_path):
    files, message, room = (*REFUSED[kind], ROOM)[:3]
    folder = make(tmp_path, files)
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            base_tokenizer.load(folder, room)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


CHANGES = {
    "vocab.txt": "\n".join([*VOCABULARY, "more"]),
    "tokenizer_config.json": json.dumps({"do_lower_case": False}),
    "tokenizer.json": fast(lowercase=False).to_str(),
    "config.json": json.dumps({"model_type": "bert", "vocab_size": 99}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_kept_is_of_these_very_files(name, tmp_path, own_cache):
    folder = make(tmp_path, {"vocab.txt": "\n".join(VOCABULARY), "tokenizer_config.json": {}})
    base_tokenizer.load(folder, ROOM)
    (folder / name).write_text(CHANGES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = base_tokenizer.load(folder, ROOM)
    assert [e.ids for e in ours.encode_batch(list(TEXTS))] == theirs(list(TEXTS))["input_ids"]
    assert len(list(own_cache.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "{", "{}", "null", "\x00"])
def test_what_is_kept_and_damaged_is_made_again(content, tmp_path, own_cache):
    folder = make(tmp_path, FOLDERS["json"])
    wanted = base_tokenizer.load(folder, ROOM).to_str()
    (kept,) = own_cache.iterdir()
    kept.write_text(content)
    assert base_tokenizer.load(folder, ROOM).to_str() == wanted == kept.read_text()


def test_another_release_is_asked_again(tmp_path, own_cache, monkeypatch):
    folder = make(tmp_path, FOLDERS["json"])
    base_tokenizer.load(folder, ROOM)
    monkeypatch.setattr(base_tokenizer.importlib.metadata, "version", lambda name: "99")
    base_tokenizer.load(folder, ROOM)
    assert len(list(own_cache.iterdir())) == 2


def test_a_later_start_does_without_transformers(tmp_path, own_cache):
    folder = make(tmp_path, FOLDERS["json"])
    base_tokenizer.load(folder, ROOM)
    code = (
        "import sys, pathlib; from jaxlora.formats import tokenizer; "
        f"tokenizer.load(pathlib.Path({str(folder)!r}), {ROOM}); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_saved_tokenizer_comes_back(tmp_path):
    """What transformers saves for a loaded folder, in its present format."""
    first = make(tmp_path, FOLDERS["vocab, added"])
    theirs = transformers.AutoTokenizer.from_pretrained(first)
    theirs.save_pretrained(tmp_path / "saved")
    shutil.copy(first / "config.json", tmp_path / "saved")
    ours = base_tokenizer.load(tmp_path / "saved", ROOM)
    assert [e.ids for e in ours.encode_batch(list(TEXTS))] == theirs(list(TEXTS))["input_ids"]
    before = base_tokenizer.load(first, ROOM)
    assert base_tokenizer.essence(ours) == base_tokenizer.essence(before)  # still the same base


def test_the_essence_is_what_decides_the_ids(tmp_path):
    """Folders whose ids differ differ in it; those with other truncation and padding do not."""
    found = {}
    for kind, files in FOLDERS.items():
        (tmp_path / kind).mkdir()
        tokenizer = base_tokenizer.load(make(tmp_path / kind, files), ROOM)
        ids = json.dumps([e.ids for e in tokenizer.encode_batch([*TEXTS, *random_texts()])])
        found[kind] = ids, json.dumps(base_tokenizer.essence(tokenizer), sort_keys=True)
    for (ids, essence), (others, another) in itertools.combinations(found.values(), 2):
        assert ids == others or essence != another
    assert found["json"] == found["json with truncation"] == found["vocab, lengths"]
    assert len({ids for ids, _ in found.values()}) > 8

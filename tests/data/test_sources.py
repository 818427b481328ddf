"""TSV files, public archives and the TFDS builders: what is read, and what is refused."""

import dataclasses
import io
import math
import re
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from jaxlora.data import cs224n, demo, official, sources
from jaxlora.data.builders import BUILDERS, SourceConfig, load
from jaxlora.data.raw_examples import TextExample
from jaxlora.data.sources import fingerprint, load_rows
from jaxlora.tasks.task import paper_tasks
from jaxlora.utils.errors import UserError

TASKS = {task.name: task for task in paper_tasks()}
SST, PARA, STS = TASKS["sst"], TASKS["para"], TASKS["sts"]

HEADERS = {
    "sst": "\tid\tsentence\tsentiment",
    "para": "\tid\tsentence1\tsentence2\tis_duplicate",
    "sts": "\tid\tsentence1\tsentence2\tsimilarity",
}


def sst(*lines):
    return "\n".join([HEADERS["sst"], *lines, ""])


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def folder(tmp_path):
    """A data folder with two or three examples in each of the nine files."""
    data = tmp_path / "data"
    pairs = {"para": ("1.0", "0"), "sts": ("4.6", "0")}
    for name, (high, low) in pairs.items():
        stem = cs224n.LAYOUTS[name].stem
        for split in ("train", "dev"):
            rows = [f"7\t{split}a\tOne café ?\tTwo ?\t{high}", f'8\tb\t"A ""b"" c"\tTwo\t{low}']
            write(data, f"{stem}-{split}.csv", "\n".join([HEADERS[name], *rows]))
        write(data, f"{stem}-test-student.csv", "\tid\tsentence1\tsentence2\n1\tc\tOne\tTwo\n")
    for split in ("train", "dev"):
        write(data, f"ids-sst-{split}.csv", sst("0\ta\t Good .\t3", "1\tb\tBad .\t0.0"))
    write(data, "ids-sst-test-student.csv", "0\t\tid\tsentence\n1\t0.0\tt\t So so . \n")
    return data


def refusal(task, path):
    with pytest.raises(UserError) as caught:
        cs224n.read(task, path)
    return str(caught.value)


# --- TSV files ---


def test_reads_columns_by_name_and_strips_sentences(folder):
    rows = cs224n.read(SST, folder / "ids-sst-train.csv")
    assert rows == [TextExample("a", "Good .", "", 3.0, 2), TextExample("b", "Bad .", "", 0.0, 3)]
    rows = cs224n.read(STS, folder / "sts-dev.csv")
    assert rows == [
        TextExample("deva", "One café ?", "Two ?", 4.6, 2),
        TextExample("b", 'A "b" c', "Two", 0.0, 3),
    ]


def test_test_files_have_no_labels(folder):
    (row,) = cs224n.read(SST, cs224n.files(SST, folder)["test"], labelled=False)
    assert row[:3] == ("t", "So so .", "")
    assert math.isnan(row.label)


def test_accepts_windows_files_blank_lines_and_repeated_ids(tmp_path):
    text = sst("0\ta\tGood .\t3", "", "1\ta\tBad .\t1.0").replace("\n", "\r\n")
    rows = cs224n.read(SST, write(tmp_path, "x.csv", b"\xef\xbb\xbf" + text.encode()))
    assert [(row.id, row.label) for row in rows] == [("a", 3.0), ("a", 1.0)]


BAD_SST = {
    "nothing": ("", ["is empty", "replace the file"]),
    "header only": (sst(), ["is empty", "replace the file"]),
    "a column missing": (
        "id\tsentence\tlabel\na\tGood .\t3\n",
        [":1:", "no column sentiment", "found id, sentence, label", "tab-separated"],
    ),
    "commas": ("id,sentence,sentiment\n", [":1:", "no column id, sentence, sentiment"]),
    "too few fields": (sst("0\ta\tGood .\t3", "1\tb\tBad ."), [":3:", "3 fields", "4", "tabs"]),
    "too many fields": (sst("0\ta\tGood\t.\t3"), [":2:", "5 fields", "has 4"]),
    "label not a number": (sst("0\ta\tGood .\tgood"), [":2:", "'good'", "0 to 4", "correct"]),
    "label infinite": (sst("0\ta\tGood .\tinf"), [":2:", "'inf'"]),
    "label too high": (sst("0\ta\tGood .\t3", "", "0\tb\tBad\t5"), [":4:", "'5'", "from 0 to 4"]),
    "label negative": (sst("0\ta\tGood .\t-1"), [":2:", "'-1'"]),
    "label not whole": (sst("0\ta\tGood .\t1.5"), [":2:", "'1.5'", "whole number"]),
    "not UTF-8": (sst("0\ta\tA caf\xe9 .\t3").encode("latin-1"), [":2:", "not UTF-8", "save"]),
    "UTF-16": (sst("0\ta\tGood .\t3").encode("utf-16"), [":1:", "not UTF-8"]),
    "NUL": (sst("0\ta\tGo\0od .\t3"), [":2:", "NUL", "copy it again"]),
    "huge field": (sst("0\ta\t" + "x" * 140_000 + "\t3"), [":2:", "field larger than"]),
}


@pytest.mark.parametrize(("content", "fragments"), BAD_SST.values(), ids=BAD_SST)
def test_a_bad_file_is_refused_with_the_line_and_the_remedy(tmp_path, content, fragments):
    path = write(tmp_path, "ids-sst-train.csv", content)
    message = refusal(SST, path)
    assert message.startswith(str(path))
    assert not [f for f in fragments if f not in message], message


@pytest.mark.parametrize(
    ("task", "line", "fragments"),
    [
        (PARA, "0\ta\tOne\tTwo\t2", ["'2'", "whole number from 0 to 1", "Quora"]),
        (STS, "0\ta\tOne\tTwo\t5.1", ["'5.1'", "a number from 0 to 5", "STS-B"]),
    ],
)
def test_bad_pairs_are_refused(tmp_path, task, line, fragments):
    message = refusal(task, write(tmp_path, "x.csv", f"{HEADERS[task.name]}\n{line}\n"))
    assert not [f for f in ["x.csv:2:", *fragments] if f not in message], message


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_missing_file_is_named(folder, task):
    missing = cs224n.files(task, folder)["dev"]
    missing.unlink()
    with pytest.raises(UserError, match=re.escape(missing.name)) as caught:
        cs224n.files(task, folder)
    assert "`data_dir`" in str(caught.value)


@pytest.mark.parametrize("given", [None, Path("no/such/folder")])
def test_a_missing_folder_names_the_argument(given):
    with pytest.raises(UserError, match="`data_dir`"):
        cs224n.files(SST, given)


def test_quotes_that_are_not_closed_are_text(tmp_path):
    text = sst('0\ta\t"Good .\t3', '1\tb\t"Bad"\t0')
    rows = cs224n.read(SST, write(tmp_path, "x.csv", text))
    assert [row.sentence1 for row in rows] == ['"Good .', '"Bad"']


def test_missing_labels_and_blank_sentences_are_kept_for_the_count(tmp_path):
    text = sst("0\ta\tGood .\t", "0\ta\tGood .\tnan", "0\ta\t  \t3")
    rows = cs224n.read(SST, write(tmp_path, "x.csv", text))
    assert [math.isnan(row.label) for row in rows] == [True, True, False]
    assert rows[2].sentence1 == ""


# --- TFDS builders ---


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_rows_come_back_from_tfds_as_they_went_in(folder, task, tmp_path):
    splits, name = load_rows(task, "cs224n", folder, tmp_path)
    assert list(splits) == ["train", "dev", "test"]
    assert splits["train"] == [
        row._replace(label=pytest.approx(row.label))
        for row in cs224n.read(task, cs224n.files(task, folder)["train"])
    ]
    assert math.isnan(splits["test"][0].label)
    assert name.startswith("cs224n-")


def test_demo_rows_keep_their_order(tmp_path):
    splits, _ = load_rows(PARA, "demo", None, tmp_path)
    assert splits == demo.read("para")


def test_an_edited_file_is_read_again(folder, tmp_path):
    _, before = load_rows(SST, "cs224n", folder, tmp_path)
    path = folder / "ids-sst-dev.csv"
    path.write_text(path.read_text().replace("Bad", "Awful"))
    splits, after = load_rows(SST, "cs224n", folder, tmp_path)
    assert splits["dev"][1].sentence1 == "Awful ."
    assert before != after


def test_a_prepared_dataset_is_not_read_again(folder, tmp_path, monkeypatch):
    first, _ = load_rows(SST, "cs224n", folder, tmp_path)
    unread = dataclasses.replace(sources.SOURCES["cs224n"], read=pytest.fail)
    monkeypatch.setitem(sources.SOURCES, "cs224n", unread)
    second, _ = load_rows(SST, "cs224n", folder, tmp_path)
    assert [row[:3] for row in first["train"]] == [row[:3] for row in second["train"]]


def test_keys_differ_between_sources_tasks_and_contents(folder):
    names = {fingerprint(t, "cs224n", folder) for t in TASKS.values()}
    names |= {fingerprint(t, s, None) for t in TASKS.values() for s in ("demo", "official")}
    assert len(names) == 9
    assert fingerprint(SST, "demo", None) == fingerprint(SST, "demo", folder)


def test_an_interrupted_prepare_leaves_no_half_dataset(tmp_path):
    rows = [TextExample(str(n), f"sentence {n}", "", 1.0) for n in range(50)]

    class Interrupted(list):
        def __iter__(self):
            yield from rows[:20]
            raise KeyboardInterrupt

    config = SourceConfig(name="x", read=lambda _: {"train": rows, "dev": Interrupted(rows)})
    with pytest.raises(KeyboardInterrupt):
        load(BUILDERS["sst"], config, tmp_path)
    assert not list(tmp_path.rglob("*.array_record*"))
    config = SourceConfig(name="x", read=lambda _: {"train": rows, "dev": rows})
    assert load(BUILDERS["sst"], config, tmp_path)["dev"] == rows


def test_two_processes_may_prepare_at_once(tmp_path):
    rows = [TextExample("a", "sentence", "", 1.0)]

    def read(_):
        # The other process is done before this one has written its own.
        other = SourceConfig(name="x", read=lambda _: {"train": rows})
        load(BUILDERS["sst"], other, tmp_path)
        return {"train": rows}

    assert load(BUILDERS["sst"], SourceConfig(name="x", read=read), tmp_path)["train"] == rows


def test_preparing_is_quiet(folder, tmp_path, capfd):
    load_rows(SST, "cs224n", folder, tmp_path)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_errors_in_a_file_come_through_tfds(folder, tmp_path):
    write(folder, "ids-sst-dev.csv", sst("0\ta\tGood .\t9"))
    with pytest.raises(UserError, match=r"ids-sst-dev\.csv:2:"):
        load_rows(SST, "cs224n", folder, tmp_path)


def test_an_unknown_source_is_refused():
    with pytest.raises(UserError, match="demo, cs224n, official"):
        fingerprint(SST, "kaggle", None)


# --- the public releases ---

TREES = r"(3 (2 (2 It) (2 's)) (4 (3 good\/great) (2 (2 -LRB-) (2 really))))"
TREES_ZIP = {f"trees/{split}.txt": TREES + "\n(0 (1 So) (0 bad))\n" for split in
             ("train", "dev", "test")}  # fmt: skip
QQP_ZIP = {
    "QQP/train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    "1\t2\t3\tWhy ?\tHow ?\t0\n4\t5\t6\tWho ?\t \t1\n7\t8\t9\tWhen ?\tAt what time ?\t1\n",
    "QQP/dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA ?\tB ?\t1\n",
    "QQP/test.tsv": "id\tquestion1\tquestion2\n0\tC ?\tD ?\n",
}
STSB_ZIP = {
    "STS-B/train.tsv": "index\tsentence1\tsentence2\tscore\n0\tA plane .\tA jet .\t4.500\n",
    "STS-B/dev.tsv": "index\tsentence1\tsentence2\tscore\n0\tA cat .\tA dog .\t0.000\n",
    "STS-B/test.tsv": "index\tsentence1\tsentence2\n0\tA man .\tA lad .\n",
}
ARCHIVES = {"PTB.zip": TREES_ZIP, "QQP.zip": QQP_ZIP, "STS-B.zip": STSB_ZIP}


@pytest.fixture
def internet(tmp_path, monkeypatch):
    """The three archives, small, in place of the network; the list says what was asked for."""
    asked = []

    def download(manager, url):
        asked.append(url)
        files = next(files for end, files in ARCHIVES.items() if url.endswith(end))
        path = tmp_path / url.rsplit("/", 1)[1]
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return path

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO())
    return asked


def test_official_sst_is_read_from_trees(internet, tmp_path):
    splits, name = load_rows(SST, "official", None, tmp_path)
    assert name.startswith("official-")
    assert splits["dev"] == [
        TextExample("dev-1", "It 's good/great ( really", "", 3.0),
        TextExample("dev-2", "So bad", "", 0.0),
    ]
    assert internet == [official.TREEBANK]
    load_rows(SST, "official", None, tmp_path)
    assert len(internet) == 1


def test_official_sst_keeps_words_with_other_white_space(tmp_path, monkeypatch):
    (tmp_path / "trees").mkdir()
    tree = "(3 (2 (2 2\N{NO-BREAK SPACE}1/2) (2 a\x85b)) (4 hours))"
    for split in ("train", "dev", "test"):
        (tmp_path / "trees" / f"{split}.txt").write_text(f"{tree}\n{tree}\n", encoding="utf-8")
    monkeypatch.setattr(official, "fetch", lambda manager, url: tmp_path)
    rows = official.read_treebank(SST, None)["dev"]
    assert [row.sentence1 for row in rows] == ["2\N{NO-BREAK SPACE}1/2 a\x85b hours"] * 2


def test_official_quora_is_read_from_glue(internet, tmp_path):
    splits, _ = load_rows(PARA, "official", None, tmp_path)
    assert splits["train"] == [
        TextExample("train-0", "Why ?", "How ?", 0.0),
        TextExample("train-1", "Who ?", "", 1.0),  # left out, and counted, where it is tokenised
        TextExample("train-2", "When ?", "At what time ?", 1.0),
    ]
    assert splits["dev"] == [TextExample("dev-0", "A ?", "B ?", 1.0)]
    assert splits["test"][0].sentence2 == "D ?"
    assert math.isnan(splits["test"][0].label)


def test_official_sts_is_read_from_glue(internet, tmp_path):
    splits, _ = load_rows(STS, "official", None, tmp_path)
    assert splits["train"] == [TextExample("train-0", "A plane .", "A jet .", 4.5)]
    assert splits["dev"][0].label == 0.0
    assert math.isnan(splits["test"][0].label)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_without_a_network_the_remedy_is_named(task, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError) as caught:
        load_rows(task, "official", None, tmp_path)
    message = str(caught.value)
    assert not [f for f in ("official", "no network", "`data_dir`", "demo") if f not in message]


def test_a_damaged_archive_is_named(internet, tmp_path, monkeypatch):
    broken = write(tmp_path, "broken.zip", b"PK not a zip")
    monkeypatch.setattr(tfds.download.DownloadManager, "download", lambda *_: broken)
    with pytest.raises(UserError, match=r"broken\.zip is damaged .* delete it"):
        load_rows(SST, "official", None, tmp_path)
    assert not list(tmp_path.glob("*.files"))

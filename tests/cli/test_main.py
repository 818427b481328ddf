"""Bad input: a message that names file, line or flag, exit code 2, and nothing written."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from tiny import train_flags, write_data

from jaxlora.__main__ import main
from jaxlora.cli import console as report
from jaxlora.cli.terminal import say
from jaxlora.training.presets import make_settings
from jaxlora.utils import process


@pytest.fixture
def folders(tiny_base, tmp_path, monkeypatch):
    """A data folder and a base folder that a test may spoil, and an empty place to run in."""
    monkeypatch.setattr(process, "keep_programs", lambda folder: None)
    data = write_data(tmp_path / "data")
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return data, base


def call(folders, *flags, variant="lora3"):
    data, base = folders
    defaults = {
        "--data-dir": data,
        "--base": base,
        "--preset": "cs224n",
        "--max-steps": 1,
        "--max-length": 32,
    }
    given = {f.split("=")[0] for f in flags}
    rest = [f"{k}={v}" for k, v in defaults.items() if k not in given]
    return main(["train", f"--variant={variant}", *rest, *flags])


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def line(number, cells):
    """Replace a line (1 is the header) by tab-separated cells."""

    def change(content):
        lines = content.split(b"\n")
        lines[number - 1] = "\t".join(cells).encode()
        return b"\n".join(lines)

    return change


SST, QUORA, STS = "ids-sst-train.csv", "quora-train.csv", "sts-train.csv"
BAD_DATA = {
    "missing": (STS, None, [STS, "--data-dir"]),
    "empty": (STS, lambda _: b"", [STS, "empty"]),
    "columns": (STS, line(1, ["", "id", "a", "b", "c"]), [STS, "sentence1"]),
    "label range": (SST, line(4, ["0", "x", "good film", "7"]), [f"{SST}:4", "7"]),
    "label word": (QUORA, line(3, ["0", "x", "a", "b", "perhaps"]), [f"{QUORA}:3", "perhaps"]),
    "few fields": (QUORA, line(5, ["0", "x", "a"]), [f"{QUORA}:5"]),
    "utf-8": (STS, lambda content: content + b"9\tx\t\xff\tb\t1.0\n", [f"{STS}:21", "UTF-8"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(folders, capsys, name):
    file, change, fragments = BAD_DATA[name]
    path = folders[0] / file
    path.unlink() if change is None else edit(path, change)
    assert call(folders) == 2
    message = capsys.readouterr().err
    for fragment in fragments:
        assert fragment.lower() in message.lower()
    assert "Traceback" not in message
    assert not Path("runs").exists()


def test_strict_refuses_blank_texts(folders, capsys):
    edit(folders[0] / STS, line(2, ["0", "x", " ", "b", "1.0"]))
    assert call(folders, "--strict") == 2
    assert f"{STS}: 1 row with a blank text (line 2)" in capsys.readouterr().err


BAD_FLAGS = {
    "group": (["--groups=sst|para,stss"], ["--groups", "stss"]),
    "uncovered": (["--groups=sst|para"], ["--groups", "sts"]),
    "twice": (["--groups=sst|para,sts,sst"], ["--groups", "two groups"]),
    "rank 0": (["--rank=0"], ["--rank", "at least 1"]),
    "rank above the width": (["--rank=33"], ["--rank", "32"]),
    "pattern": (
        ["--rank-pattern", "pooler", "4"],
        ["--rank-pattern", "'pooler' matches no adapted module"],
    ),
    "target": (["--target-modules", "querry"], ["--target-modules", "querry", "query"]),
    "epochs": (["--epochs=0"], ["--epochs"]),
    "rate": (["--learning-rate=-1"], ["--learning-rate"]),
    "nan": (["--learning-rate=nan"], ["--learning-rate"]),
    "positions": (["--max-length=9999"], ["--max-length"]),
    "base": (["--base=./nowhere"], ["--base", "nowhere"]),
    "data": (["--data-dir=nowhere"], ["nowhere", "--data-dir"]),
    "seed": (["--seed=99999999999999999999"], ["--seed", "below 2147483648"]),
    "out below a file": ([f"--out={__file__}/x"], ["--out", "test_main.py"]),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(folders, capsys, name):
    flags, fragments = BAD_FLAGS[name]
    assert call(folders, *flags) == 2
    message = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in message
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "flag", ["--rank=4", "--alpha=4", "--learning-rate=1", "--target-modules=query"]
)
def test_flags_that_mean_nothing_to_the_variant(folders, capsys, flag):
    assert call(folders, flag, variant="baseline1") == 2
    assert flag.split("=")[0] in capsys.readouterr().err


def test_a_table_of_your_own_needs_no_variant(folders, capsys):
    """From a table to answers: labels, dev set, pace and folder are found; the end is explained."""
    rows = [
        f"a film {'good' if n % 3 else 'bad'} {n},{('Yes', 'No')[n % 3 == 0]}" for n in range(60)
    ]
    Path("my tickets.csv").write_text("\n".join(["what,liked", *rows]))
    flags = [f"--base={folders[1]}", "--max-length=32", "--max-steps=4", "--rank=2"]
    words = ["train", *flags, "my tickets.csv", "--text", "what", "--label=liked"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "No or Yes (the positive class)" in shown and "held out" in shown
    assert "my-tickets ended: " in shown
    assert re.search(r"Kept: my-tickets step \d of 4", shown)
    assert main(["predict", "--bank=runs/my tickets", "--task=my-tickets", "a film"]) == 0
    assert re.match(r"(Yes|No)  \(No 0\.\d+, Yes 0", capsys.readouterr().out)
    assert main(["train", *flags, "my tickets.csv", "--text=what", "--label=likd"]) == 2
    assert "my tickets.csv:1: no column likd (did you mean 'liked'?)" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "tasks: name the files of your tasks" in capsys.readouterr().err


def test_unknown_variant(folders, capsys):
    with pytest.raises(SystemExit) as stop:
        call(folders, variant="lora9")
    assert stop.value.code == 2
    assert "lora4" in capsys.readouterr().err


BAD_BASE = {
    "no weights": (lambda base: (base / "model.safetensors").unlink(), ["no model.safetensors"]),
    "corrupt": (
        lambda base: edit(base / "model.safetensors", lambda c: c[:999]),
        ["model.safetensors"],
    ),
    "no config": (lambda base: (base / "config.json").unlink(), ["config.json"]),
    "list": (lambda base: (base / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    "broken tokenizer": (
        lambda base: edit(base / "tokenizer.json", lambda c: c[:99]),
        ["tokenizer.json"],
    ),
    "no tokenizer": (lambda base: (base / "tokenizer.json").unlink(), ["tokenizer.json"]),
}


@pytest.mark.parametrize("name", BAD_BASE)
def test_bad_base(folders, capsys, name):
    spoil, fragments = BAD_BASE[name]
    spoil(folders[1])
    assert call(folders) == 2
    message = capsys.readouterr().err
    for fragment in fragments:
        assert fragment in message
    assert not Path("runs").exists()


def test_cs224n_needs_a_data_dir(capsys):
    assert main(["train", "--variant=lora3", "--preset=cs224n"]) == 2
    assert "--data-dir" in capsys.readouterr().err


def test_out_that_holds_another_run(folders, capsys):
    assert call(folders) == 0
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    capsys.readouterr()
    for flags, fragment in (
        ([], "--resume"),
        (["--resume", "--rank=3"], "--rank"),
        (["--resume", "--seed=3"], "--seed"),
        ([f"--out={folders[0]}"], "holds no run"),
        ([f"--out={folders[0] / 'sts-dev.csv'}"], "is a file"),
    ):
        assert call(folders, *flags) == 2
        assert fragment in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}


def test_out_that_holds_a_config_of_something_else(folders, capsys):
    assert call(folders, "--resume", f"--out={folders[1]}") == 2
    assert "not the config of a jaxlora run" in capsys.readouterr().err


def test_resume_finds_its_data_by_another_path(folders):
    assert call(folders, variant="baseline1") == 0
    data = folders[0].rename(folders[0].with_name("moved"))
    assert call((data, folders[1]), "--resume", variant="baseline1") == 0


def test_resume_refuses_changed_data(folders, capsys):
    assert call(folders) == 0
    edit(folders[0] / "sts-train.csv", line(2, ["0", "x", "a dog", "a cat", "1.0"]))
    assert call(folders, "--resume") == 2
    assert "the data of sts" in capsys.readouterr().err


def test_a_long_sentence_is_cut_and_counted(folders, capsys):
    words = " ".join(["good"] * 60)
    edit(folders[0] / "ids-sst-train.csv", line(2, ["0", "x", words, "1"]))
    assert call(folders, "--max-length=60") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "test 26; 1 sentence truncated to 60 tokens" in shown
    assert shown.count("truncated") == 1


def test_run_prints_plan_and_table(folders, capsys):
    assert call(folders, variant="lora4") == 0
    shown = capsys.readouterr().out
    for fragment in (
        "LoRA rank 8",
        "train 26, dev 26, test 26",
        "untrained",
        "the paper",
        "0.6152",
    ):
        assert fragment in shown
    result = json.loads(Path("runs/lora4/result.json").read_text())
    assert f"{result['dev']['sst']:.4f}" in shown


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    named = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert train_flags() <= named


def result(titles):
    """A run's result with a score of 0.5 everywhere."""
    scores = dict.fromkeys(titles, 0.5)
    return {
        "variant": "lora3", "source": "files", "metrics": titles, "dev": scores,
        "untrained": scores, "train_seconds": 60.0,
        "groups": {name: {"best_step": 1, "step": 2} for name in titles},
        "parameters": {"incremental": 1e6, "bundled": 2e6, "base": 1e6},
    }  # fmt: skip


def shown(call):
    """What a function of a console shows on a narrow one."""
    console = Console(file=io.StringIO(), width=60)
    call(console)
    return console.file.getvalue()


def test_titles_of_tasks_are_no_markup():
    table = report.result_table(result({"a": "Topic [news]", "b": "[/news] :cat:"}))
    text = shown(lambda console: console.print(table))
    assert "Topic [news]" in text and "[/news] :cat:" in text


REAL_NAMES = ("SST-5", "Quora", "STS-B")


def of_papers_tasks(source, base):
    """What a run of the paper's three tasks shows at its end, with the settings it writes down."""
    flags = {"data_dir": Path("x")} if source == "cs224n" else {}
    s = make_settings("lora3", source=source, base=base, **flags)
    named = {name: f"{task.title} {task.metric_name}" for name, task in s.named.items()}
    found = result(named) | {"source": s.data.source, "base": s.model.base, "test": {}}
    table = shown(lambda console: console.print(report.result_table(found)))
    return table, " ".join(report.notes(found))


@pytest.mark.parametrize("base", ["minilm", "bert-base-uncased"])
def test_made_up_data_is_called_so_and_stands_beside_no_paper(base):
    table, notes = of_papers_tasks("demo", base)
    assert not [name for name in REAL_NAMES if name in table + notes]
    assert "made-up sentiment accuracy" in table and "the paper" not in table
    assert "built-in made-up data" in notes and "bert-base" not in notes


@pytest.mark.parametrize(
    ("source", "base", "said"),
    [
        ("cs224n", "minilm", True),
        ("official", "sentence-transformers/all-MiniLM-L6-v2@abc", True),
        ("cs224n", "bert-base-uncased", False),
    ],
)
def test_console_says_that_minilm_has_seen_quora(source, base, said):
    table, notes = of_papers_tasks(source, base)
    assert "the paper" in table and all(name in table for name in REAL_NAMES)
    assert ("Quora duplicates" in notes) == said


def test_paths_are_told_as_they_are():
    text = f"Everything is in {'x' * 80}/[best]/lora3."
    assert shown(lambda console: say(text, console)) == f"{text}\n"


def test_tables_are_read_as_in_training(folders, capsys, monkeypatch):
    lines = [f'"film {n}"\t{"bad" if n % 3 else "good"}' for n in range(30)]
    Path("dev.tsv").write_text("\n".join(["what\tliked", *lines]))
    Path("train.tsv").write_text("\n".join(["what\tliked", '"Hello, he said.\tgood', *lines]))
    Path("films.toml").write_text(
        '[films]\nkind = "binary"\ntext = "what"\nlabel = "liked"\nclasses = ["bad", "good"]\n'
        'train = "train.tsv"\ndev = "dev.tsv"\n'
    )
    flags = [f"--base={folders[1]}", "--max-length=32", "--max-steps=1", "--rank=2", "--out=run"]
    assert main(["train", "films.toml", *flags]) == 0
    monkeypatch.setenv("HOME", str(Path.cwd()))
    capsys.readouterr()
    told = "double quotes are part of the text, as in training"
    for source, first in (("run", '"film'), ("run/model", '"film')):
        assert main(["evaluate", source, "--input=~/dev.tsv", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["mistakes"] and found["notes"] == [told]
        assert all(one["texts"][0].startswith(first) for one in found["mistakes"])
    assert main(["evaluate", "run", "--input=dev.tsv"]) == 0
    assert f"30 labelled rows of dev.tsv; {told}\n" in capsys.readouterr().out
    assert main(["evaluate", "run", "--input=dev.tsv", "--quoting=standard", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(one["texts"][0].startswith("film") for one in found["mistakes"])
    words = ["predict", "--bank=run", "--input=dev.tsv", "--output=out.csv"]
    assert main(words) == 0
    assert f"30 answers; {told}\n" in capsys.readouterr().out


def test_a_drafted_task_file_can_be_trained_from(folders, capsys):
    rows = [f"a film {n},{'bad' if n % 3 else 'good'}" for n in range(60)]
    Path("films.csv").write_text("\n".join(["what,liked", *rows]))
    assert main(["init", "films.csv", f"--base={folders[1]}"]) == 0
    shown = capsys.readouterr().out
    assert "films: binary of what by liked: bad, good" in shown
    flags = [f"--base={folders[1]}", "--max-length=32", "--max-steps=1", "--rank=2"]
    assert main(["train", "films.toml", *flags]) == 0
    assert Path("runs/films/model").is_dir()
    written = Path("films.toml").read_text()
    assert main(["init", "films.csv", f"--base={folders[1]}"]) == 2
    assert "--output films.toml: is there already" in capsys.readouterr().err
    assert Path("films.toml").read_text() == written
    assert main(["init"]) == 2
    assert main(["init", "films.csv", "--label=like", "--output=x.toml"]) == 2
    assert "did you mean 'liked'" in capsys.readouterr().err and not Path("x.toml").exists()


def test_a_task_file_is_drafted_beside_a_table_in_the_home_folder(folders, capsys, monkeypatch):
    home = Path("home dir")
    home.mkdir()
    monkeypatch.setenv("HOME", str(home.absolute()))
    rows = [f"a film {n},{'bad' if n % 3 else 'good'}" for n in range(60)]
    (home / "films.csv").write_text("\n".join(["what,liked", *rows]))
    assert main(["init", "~/films.csv", f"--base={folders[1]}"]) == 0
    target = home.absolute() / "films.toml"
    assert target.is_file() and not Path("~").exists()
    assert capsys.readouterr().out.endswith(f"jaxlora train '{target}'\n")


def test_a_trained_task_is_evaluated_on_the_columns_that_it_was_trained_on(folders, capsys):
    rows = [f"{n},a film {n},{'bad' if n % 3 else 'good'}" for n in range(60)]
    Path("films.csv").write_text("\n".join(["id,what,liked", *rows]))
    flags = [f"--base={folders[1]}", "--max-length=32", "--max-steps=2", "--rank=2"]
    for run, seed in (("one", 0), ("two", 1)):
        words = ["films.csv", "--text=what", "--label=liked", f"--out={run}", f"--seed={seed}"]
        assert main(["train", *words, *flags]) == 0
    capsys.readouterr()
    words = ["evaluate", "one", "--input=films.csv", "--against=two"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], sum(map(sum, found["confusion"]))) == (60, 60)
    assert found["scores"].keys() == found["differences"].keys()
    assert main([*words, "--page=page.html"]) == 0
    shown = capsys.readouterr().out
    assert f"{found['scores']['accuracy']['value']:.4f}" in shown and "page.html" in shown
    assert "<h2>Confusion</h2>" in Path("page.html").read_text()
    assert main(["evaluate", "one", "--input=films.csv", "--label=like"]) == 2
    message = capsys.readouterr().err
    assert "did you mean 'liked'" in message
    assert message.endswith("Name other columns with --text and --label.\n")
    assert main(["evaluate", "one", "--input=films.csv", "--page=nowhere/x.html"]) == 2
    assert "--page nowhere/x.html" in capsys.readouterr().err
    assert main(["evaluate", "one", "--input=films.csv", "--page=one"]) == 2
    assert "--page one: is a folder" in capsys.readouterr().err

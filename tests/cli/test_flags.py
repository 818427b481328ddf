"""Fields of the library as flags: the library names arguments, the commands name flags."""

import ast
import re
import sys
import warnings
from pathlib import Path

import pytest
from syntax import parse

import jaxlora
from jaxlora.__main__ import main
from jaxlora.cli import (
    affinity,
    bank,
    combine,
    compare,
    cost,
    evaluate,
    export,
    import_,
    init,
    predict,
    train,
)  # fmt: skip
from jaxlora.cli.flags import bytes_of, flag, flags_of, naming_flags, with_flags
from jaxlora.utils.errors import ConfigError, Note, Stopped, UserError

PACKAGE = Path(jaxlora.__file__).parent
# Flags of pip, which the library tells how to call.
PIP = {"--no-deps", "--force-reinstall"}


def library():
    """The modules that are no command's."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__main__.py" and "cli" not in path.relative_to(PACKAGE).parts:
            yield path


def strings(path):
    """All string literals of a module, docstrings and the constant parts of f-strings included."""
    for node in ast.walk(parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("path", list(library()), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_commands_name_flags(path):
    found = {word for text in strings(path) for word in re.findall(r"--[a-z][\w-]*", text)}
    assert found <= PIP


def test_an_error_names_its_field():
    error = ConfigError("max_length", "512 at most", 600)
    assert isinstance(error, UserError) and error.field == "max_length"
    assert str(error) == "`max_length` 600: 512 at most"
    assert naming_flags(train.Flags)(str(error)) == "--max-length 600: 512 at most"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("lower `learning_rate` in another `out`", "lower --learning-rate in another --out"),
        ("go on with `resume=True`", "go on with --resume"),
        ("use `preset='demo'`", "use --preset=demo"),
        ("`dropout` 1.0: too much", "--lora-dropout 1.0: too much"),
        ("`classes` is missing; see `tasks`", "`classes` is missing; see tasks"),
        ("`label_delimiter=';'` or `strict=True`", "`label_delimiter=';'` or --strict"),
        (
            "see `jaxlora.load`, `Predictor` and 'rank'",
            "see `jaxlora.load`, `Predictor` and 'rank'",
        ),
    ],
)
def test_arguments_in_messages_become_flags(said, shown):
    assert with_flags(said, flags_of(train.Flags)) == shown


COMMANDS = {
    "train": train.Flags, "predict": predict.predict, "evaluate": evaluate.evaluate,
    "init": init.init, "compare": compare.compare, "cost": cost.cost, "combine": combine.combine,
    "affinity": affinity.show, **{f"bank {name}": one for name, one in bank.COMMANDS.items()},
    **{f"export {name}": one for name, one in export.COMMANDS.items()},
    **{f"import {name}": one for name, one in import_.COMMANDS.items()},
}  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_messages_name_the_flags_that_help_lists(words, capsys):
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    shown = set(re.findall(r"^[ │] (--[a-z][\w-]*)", capsys.readouterr().out, re.MULTILINE))
    known = {word for word in flags_of(COMMANDS[words]).values() if word.startswith("--")}
    assert known == shown - {"--help"} and (known or words in ("bank remove", "bank show"))


@pytest.mark.parametrize("raised", [UserError("`bank`, `rank`"), Stopped(2, "at `bank`, `rank`")])
def test_errors_and_notes_of_a_command_name_its_flags(raised, capsys, monkeypatch):
    def load(*args):
        note = Note("`input` and `rank`")
        print(warnings.formatwarning(note, Note, "file.py", 1), end="", file=sys.stderr)
        raise raised

    monkeypatch.setattr(predict.Predictor, "load", load)
    assert main(["predict", "a", "--bank", "x"]) == (2 if isinstance(raised, UserError) else 130)
    note, error = capsys.readouterr().err.splitlines()
    assert note == "note: --input and `rank`" and error.endswith("--bank, `rank`")


def test_a_flag_is_the_field_with_dashes():
    assert flag("max_steps") == "--max-steps"


def test_a_command_names_the_flag(capsys, tmp_path):
    out = tmp_path / "file"
    out.write_text("")
    assert main(["train", "--variant=lora3", f"--out={out}"]) == 2
    assert capsys.readouterr().err == f"error: --out {out}: is a file; name a folder\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1kB", 1000),
        ("512MB", 512e6),
        (" 2 gib", 2**31),
        ("0.5KiB", 512),
        ("1.25TiB", 1.25 * 2**40),
    ],
)
def test_numbers_of_bytes(text, value):
    assert bytes_of("memory", text) == value


@pytest.mark.parametrize(
    "text", ["", "512", "0MB", "-1GB", "1e3MB", "nanGB", "1 PB", "٣MB", "9999999GB"]
)
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(ConfigError, match=r"`memory`.*: give a number above 0 with a unit"):
        bytes_of("memory", text)


@pytest.mark.parametrize("place", range(5))
def test_values_of_tasks_may_stand_anywhere(place):
    words = ["tickets.csv", "--text", "subject", "--label=topic", "--strict"]
    words.insert(place if place != 2 else 5, "tickets.kind=binary")  # not inside `--text subject`
    flags = train.parse(["Anfragen.epochs=3", *words, "tickets.epoch=9"])
    assert flags.choice.tasks[0] == "tickets.csv" and flags.choice.text == "subject"
    given = {"Anfragen.epochs=3", "tickets.kind=binary", "tickets.epoch=9"}
    assert set(flags.choice.tasks[1:]) == given  # the misspelt one is refused by its name later
    assert flags.run.strict and flags.folder.name == "tickets"


@pytest.mark.parametrize("out", ["a/x.epochs=3", "--out=x.epochs=3"])
def test_folders_are_no_values_of_tasks(out):
    words = ["--out", out] if out.startswith("a/") else [out]
    flags = train.parse(["tickets.csv", *words])
    assert (flags.choice.tasks, flags.out.name) == (("tickets.csv",), "x.epochs=3")

"""The table of commands."""

import json
import math

import pytest

from jaxlora.__main__ import main
from jaxlora.cli.main import COMMANDS
from jaxlora.cli.terminal import print_json
from jaxlora.training.presets import make_settings


def test_the_list_names_every_command(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  jaxlora {word}" in said for word in COMMANDS)


def test_a_mistyped_command_is_refused_with_one_like_it(capsys):
    assert main(["trian"]) == 2
    said = capsys.readouterr().err
    assert "unknown command 'trian'; did you mean train?\nThe command jaxlora: " in said


def test_json_has_null_for_numbers_it_does_not_know(capsys):
    print_json({"f1": [math.nan, 0.5], "range": (-math.inf, "NaN")})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "f1": [None, 0.5],
        "range": [None, "NaN"],
    }


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = make_settings("lora3", "cs224n", data_dir="~/data", start_from="~/bank")
    assert settings.data.data_dir == str(tmp_path / "data")
    assert settings.model.start_from == str(tmp_path / "bank")


def test_ctrl_c_during_the_imports_is_one_line(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxlora.__main__.explained", interrupt)
    assert main(["cost", "--help"]) == 130
    assert capsys.readouterr().err == "interrupted\n"

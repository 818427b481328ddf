"""The table of commands."""

from jaxlora.__main__ import main
from jaxlora.cli.main import COMMANDS


def test_the_list_names_every_command(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  jaxlora {word}" in said for word in COMMANDS)


def test_a_mistyped_command_is_refused_with_one_like_it(capsys):
    assert main(["trian"]) == 2
    said = capsys.readouterr().err
    assert "unknown command 'trian'; did you mean train?\nThe command jaxlora: " in said

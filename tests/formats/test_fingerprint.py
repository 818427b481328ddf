"""A base is known by all that decides its vectors: weights, config and tokenizer."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import Silent

import jaxlora
from jaxlora.cli import main as cli
from jaxlora.formats import huggingface
from jaxlora.serving import bank, export_peft, finished_run
from jaxlora.serving import manifest as manifests
from jaxlora.training import run as train
from jaxlora.training.presets import make_settings
from jaxlora.training.run import RunOptions
from jaxlora.utils.errors import Note, UserError

FORMAT1 = Path(__file__).parents[1] / "data" / "format1"
# Made by the version that wrote format 1: request, answer.
ANSWERS = json.loads((FORMAT1 / "answers.json").read_text())


@pytest.fixture(scope="module")
def made(tiny_base, data_dir, tmp_path_factory):
    """A base, a finished run on it and a bank of the run's tasks."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_base, folder / "base")
    settings = flags(folder / "base", data_dir)
    train.run(settings, folder / "run", Silent(), RunOptions(predict_test=False))
    bank.add(folder / "bank", bank.load(folder / "run"), ["sst", "para", "sts"])
    return folder


@pytest.fixture
def base(made, tiny_base):
    """The base of these runs and banks, as it was; a test may change it or move it."""
    shutil.rmtree(made / "base", ignore_errors=True)
    return Path(shutil.copytree(tiny_base, made / "base"))


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def three(made, tmp_path):
    return Path(shutil.copytree(made / "bank", tmp_path / "bank"))


def flags(base, data_dir):
    more = {"rank": 2, "max_steps": 1, "max_length": 16, "batch_size": 6}
    return make_settings("lora1", "cs224n", base=str(base), data_dir=data_dir, **more)


def set_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def set_tokenizer(folder):
    """Two words change places."""
    path = folder / "tokenizer.json"
    about = json.loads(path.read_text())
    vocabulary = about["model"]["vocab"]
    vocabulary["ba"], vocabulary["be"] = vocabulary["be"], vocabulary["ba"]
    path.write_text(json.dumps(about))


CHANGES = {
    "num_attention_heads": (lambda b: set_config(b, num_attention_heads=8), "config"),
    "hidden_act": (lambda b: set_config(b, hidden_act="relu"), "config"),
    "layer_norm_eps": (lambda b: set_config(b, layer_norm_eps=1e-5), "config"),
    "vocabulary": (set_tokenizer, "tokenizer"),
    "lower case": (
        lambda b: (b / "tokenizer_config.json").write_text('{"do_lower_case": false}'),
        "tokenizer",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_weights_do_not_make_the_same_base(three, run, base, change, capsys):
    apply, part = CHANGES[change]
    apply(base)
    for load in (
        lambda: jaxlora.load(three),
        lambda: jaxlora.load(run),
        lambda: jaxlora.load(three, base=str(base)),
    ):
        with pytest.raises(UserError, match=rf"not the {part} that .* was trained on"):
            load()
    assert cli.main(["bank", "verify", str(three)]) == 2
    assert f"not the {part} that" in capsys.readouterr().err


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_another_base(run, base, data_dir, change):
    apply, part = CHANGES[change]
    apply(base)
    with pytest.raises(UserError, match=f"`resume`: the base model's {part} changed since"):
        train.run(flags(base, data_dir), run, Silent(), RunOptions(resume=True, predict_test=False))


@pytest.mark.parametrize("change", CHANGES)
def test_a_bank_takes_no_task_of_another_base(run, three, base, change):
    apply, part = CHANGES[change]
    apply(base)
    other = huggingface.load(str(base)).fingerprint
    source = dataclasses.replace(bank.load(run), fingerprint=other)
    before = (three / manifests.NAME).read_bytes()
    with pytest.raises(UserError, match=rf"is a bank of .* has another {part}"):
        bank.add(three, source, ["sts"], replace=True)
    assert (three / manifests.NAME).read_bytes() == before


def test_what_does_not_change_the_vectors_does_not_count(three, base):
    before = jaxlora.load(three).predict("sst", ["ba be"])
    set_config(base, hidden_dropout_prob=0.3, classifier_dropout=0.2, use_cache=False)
    path = base / "tokenizer.json"
    about = json.loads(path.read_text())
    about["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0}
    about["truncation"]["direction"] = "Right"
    path.write_text(json.dumps(about, indent=4))
    np.testing.assert_array_equal(jaxlora.load(three).predict("sst", ["ba be"]), before)


# --- a folder that moved


def test_a_base_that_moved_can_be_pointed_to(three, run, base, tmp_path, capsys):
    requests = [("sst", "ba be bi"), ("sts", "a fun run", "un")]
    before = [answer.value for answer in jaxlora.load(three)(requests)]
    moved = Path(shutil.move(base, tmp_path / "moved"))
    for folder in (three, run):
        with pytest.raises(UserError, match=rf"{base}.*no such folder.*location as `base`"):
            jaxlora.load(folder)
        found = jaxlora.Predictor.load(folder, base=str(moved))
        assert [answer.value for answer in found(requests)] == pytest.approx(before, abs=1e-6)
    commands = {
        "predict": ["predict", "ba be", "--task=sst", f"--bank={three}"],
        "verify": ["bank", "verify", str(three)],
        "list": ["bank", "list", str(three)],
        "merged": ["export", "merged", str(tmp_path / "m"), f"--bank={three}", "--task=sst"],
    }
    for command in commands.values():
        assert cli.main(command) == 2
        assert "--base" in capsys.readouterr().err
        assert cli.main([*command, f"--base={moved}"]) == 0
        capsys.readouterr()
    set_tokenizer(moved)
    for command in commands.values():
        assert cli.main([*command[:2], *command[2:], f"--base={moved}"]) == 2
        assert "not the tokenizer that" in capsys.readouterr().err


def test_a_run_goes_on_though_its_base_moved(run, base, data_dir, tmp_path, tiny_base):
    moved = Path(shutil.move(base, tmp_path / "moved"))
    before = json.loads((run / finished_run.RESULT).read_text())
    again = flags(moved, data_dir)
    assert train.run(again, run, Silent(), RunOptions(resume=True, predict_test=False)) == before
    set_config(moved, num_attention_heads=8)
    with pytest.raises(UserError, match="`resume`: the base model's config changed"):
        train.run(again, run, Silent(), RunOptions(resume=True, predict_test=False))


def test_peft_folders_go_over_though_the_base_moved(three, base, tmp_path, capsys):
    moved = Path(shutil.move(base, tmp_path / "moved"))
    peft = tmp_path / "peft"
    export = ["export", "peft", str(peft), f"--bank={three}", "--task=sst", f"--base={moved}"]
    assert cli.main(export) == 0
    written = json.loads((peft / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(moved)
    export_peft.save(tmp_path / "old", bank.load(three), "sst")
    capsys.readouterr()
    into = ["import", "peft", str(tmp_path / "old"), f"--bank={three}", "--as=again"]
    assert cli.main(into) == 2
    assert "--base" in capsys.readouterr().err
    assert cli.main([*into, f"--base={moved}"]) == 0
    predictor = jaxlora.load(three, base=str(moved))
    (first, second) = predictor([("sst", "ba be"), ("again", "ba be")])
    assert first.probabilities == pytest.approx(second.probabilities, abs=1e-6)


def test_verify_says_that_the_base_is_missing_and_what_else_is_wrong(three, base, tmp_path, capsys):
    shutil.move(base, tmp_path / "moved")
    shutil.rmtree(next((three / "heads").iterdir()))
    assert cli.main(["bank", "verify", str(three)]) == 2
    shown = capsys.readouterr().err
    assert "missing; restore a backup" in shown and f"{base}: no such folder" in shown


# --- banks and runs of format 1, which know the weights alone


@pytest.fixture
def old(tmp_path):
    """Copies of what the first format left: base, bank, run, peft."""
    return Path(shutil.copytree(FORMAT1, tmp_path / "old"))


def check_answers(predictor):
    for request, wanted in ((one["request"], one["answer"]) for one in ANSWERS):
        if request[0] in predictor.tasks:
            (answer,) = predictor([request])
            found = answer.value if answer.probabilities is None else answer.probabilities
            assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("folder", ["bank", "run"])
def test_the_first_format_is_read_with_a_note(old, folder):
    with pytest.warns(Note, match=r"knows its base by the weights alone"):
        predictor = jaxlora.load(old / folder, base=str(old / "base"))
    check_answers(predictor)


def test_the_first_format_still_refuses_other_weights(old, tiny_base):
    with pytest.raises(UserError, match="not the weights that"):
        jaxlora.load(old / "bank", base=str(tiny_base))


def test_an_exported_task_of_the_first_format_is_read(old):
    with pytest.warns(Note, match="by the weights alone"):
        found = export_peft.load(old / "peft", "again", base=str(old / "base"))
        predictor = jaxlora.Predictor(found.load_base(), found)
    (answer,) = predictor([("again", ANSWERS[0]["request"][1])])
    assert answer.probabilities == pytest.approx(ANSWERS[0]["answer"], abs=1e-5)


def test_adding_to_a_bank_of_the_first_format_upgrades_it(old):
    before = json.loads((old / "bank" / manifests.NAME).read_text())
    known = huggingface.load(str(old / "base")).fingerprint
    source = dataclasses.replace(bank.load(old / "run"), fingerprint=known)
    with pytest.warns(Note, match="by the weights alone"):
        bank.add(old / "bank", source, ["para"])
    after = json.loads((old / "bank" / manifests.NAME).read_text())
    assert after["format"] == manifests.FORMAT > before["format"] and "sha256" not in after
    assert after["fingerprint"] == dataclasses.asdict(known)
    assert known.weights == before["sha256"]
    predictor = jaxlora.load(old / "bank", base=str(old / "base"))  # without a note
    check_answers(predictor)
    assert list(predictor.tasks) == ["sst", "sts", "para"]


def test_importing_into_a_bank_of_the_first_format_upgrades_it(old):
    known = huggingface.load(str(old / "base")).fingerprint
    with pytest.warns(Note, match="by the weights alone"):
        found = export_peft.load(old / "peft", "again", base=str(old / "base"))
        bank.add(old / "bank", found, ["again"])
    after = json.loads((old / "bank" / manifests.NAME).read_text())
    assert after["fingerprint"] == dataclasses.asdict(known)
    check_answers(jaxlora.load(old / "bank", base=str(old / "base")))  # without a note


def test_an_old_run_goes_on_and_says_what_cannot_be_compared(run, base, data_dir):
    config = json.loads((run / finished_run.CONFIG).read_text())
    config["inputs"] = {k: v for k, v in config["inputs"].items() if not k.startswith("the base m")}
    config["inputs"]["the base model"] = huggingface.load(str(base)).fingerprint.weights
    (run / finished_run.CONFIG).write_text(json.dumps(config))
    with pytest.warns(Note, match="by the weights alone"):
        train.run(flags(base, data_dir), run, Silent(), RunOptions(resume=True, predict_test=False))
    config["inputs"]["the base model"] = "0" * 64
    (run / finished_run.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="the base model changed"):
        train.run(flags(base, data_dir), run, Silent(), RunOptions(resume=True, predict_test=False))


def test_the_command_shows_a_note_as_a_line(old):
    words = ["bank", "verify", str(old / "bank"), f"--base={old / 'base'}"]
    code = "import sys; from jaxlora.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("note: ") and "weights alone" in line]
    assert "Warning" not in done.stderr and "all is well" in done.stdout

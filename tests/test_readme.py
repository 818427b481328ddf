"""The README: its code runs, its figures are those of the result files, its limits are real."""

import dataclasses
import doctest
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxlora.formats import families, huggingface, peft_config
from jaxlora.nn import ops
from jaxlora.serving import import_model
from jaxlora.tasks.kinds import KINDS
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.tasks.task import STS_COSINE, Task
from jaxlora.training.presets import PAPER_GUESSES
from jaxlora.utils.errors import UserError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
JOINT = (ROOT / "tests" / "serving" / "test_joint_pairs.py").read_text(encoding="utf-8")
BENCH = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")


def section(name, text=README):
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


def rows(text):
    """The rows of all tables in a text, as lists of cells without emphasis."""
    lines = (line.strip() for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip(" *") for cell in line[1:-1].split("|")] for line in lines]


def test_examples_run():
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert tried > 10 and failed == 0


def test_the_first_screen_has_commands_library_code_and_a_figure():
    first = README.split("\n## ")[0]
    assert [first.count(opening) for opening in ("```sh\n", "```python\n", "![")] == [1, 1, 1]
    assert len(first.split("```")[4].split("![")[0].split()) < 40  # the figure follows the code


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE))
    assert named and named <= targets


def test_scores_and_parameters_are_those_of_the_results():
    scores = {row[0]: row[1:5] for row in rows(section("Table 2: dev scores", RESULTS))}
    parameters = {row[0]: row[1] for row in rows(section("Table 3: stored parameters", RESULTS))}
    checked = 0
    for name, *shown, millions in rows(section("Results")):
        variant = name.split(":")[0]
        if variant in VARIANTS:
            for value, percent in zip(shown, scores[variant], strict=True):
                numbers = [float(number) for number in value.split(" ± ")]
                expected = [float(number) / 100 for number in percent.split(" ± ")]
                assert numbers == pytest.approx(expected, abs=0.00051)
            assert millions == f"{parameters[variant]}M"
            checked += 1
    assert checked == 8


def tables(text):
    """The tables of a page, each a list of rows by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *lines = [line.strip("| \n").split(" | ") for line in block.splitlines()]
        found.append([dict(zip(head, line, strict=False)) for line in lines])
    return found


def benched(text, **wanted):
    """The rows of a page with these cells and a best peer."""
    found = [row for table in tables(text) for row in table if wanted.items() <= row.items()]
    return [row for row in found if "× best peer" in row]


def times(row):
    """A ratio as the README shows it: bold where the peer is faster."""
    ratio = float(row["× best peer"])
    return f"**{ratio:.2f}**" if ratio < 0.995 else f"{ratio:.2f}"


def over_padded(row, peer):
    return f"{float(row[peer].split()[0]) / float(row['ours ms'].split()[0]):.1f}"


STEPS = {
    "train step, one adapter for three tasks with PCGrad, batch 8": ("lora3", "8"),
    "the same, batch 32": ("lora3", "32"),
    "train step, an adapter for each of three tasks, batch 8": ("lora1", "8"),
    "train step, full fine-tuning with PCGrad, batch 8 (no hand-written peer)": ("baseline2", "8"),
}
REQUESTS = {
    "1 / 32 / 256 requests to three tasks": "mixed",
    "1 / 32 / 256 requests to one task, adapter merged": "merged",
}


def test_each_speed_is_that_of_the_benchmarks():
    """Both dtypes, against the best peer and the padded one, in bold where we lose."""
    page, other = BENCH.split("\n---\n")
    lines = re.findall(r"^\|(.*)\|$", section("Speed"), re.MULTILINE)[2:]
    shown = {name: cells for name, *cells in ([c.strip() for c in x.split("|")] for x in lines)}
    assert shown.keys() == STEPS.keys() | REQUESTS.keys()
    for name, (variant, batch) in STEPS.items():
        found = benched(page, variant=variant, batch=batch)
        assert found[0]["dtype"] == "float32" and len(found) <= 2
        padded = ", ".join(over_padded(row, "padded-eager ms") for row in found)
        steps = [times(row) for row in found]
        assert shown[name] == [*steps, *[""] * (2 - len(steps)), padded], name
    for name, kind in REQUESTS.items():
        found = benched(page, kind=kind)
        padded = [over_padded(r, "padded, adapter_names ms") for r in found if kind == "mixed"]
        assert shown[name] == [" / ".join(map(times, found)), "", " / ".join(padded)], name
    rows = [benched(other, variant=v, batch=b)[0] for v, b in STEPS.values()]
    assert "at {}, {}, {} and {}.".format(*map(times, rows)) in section("Speed")


def test_memory_shows_the_benchmarks_in_which_the_peer_needs_less():
    found = [row for table in tables(BENCH) for row in table if "ours / best peer" in row]
    assert found
    for row in found:
        assert f"**{float(row['ours / best peer']):.1f}**" in section("Speed"), row


# ---- what it cannot do: each line is tried


def refuses(call, said=""):
    with pytest.raises((UserError, ValueError), match=said):
        call()


def config_of(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return lambda: huggingface.read_config(folder / "config.json")


def other_encoders(folder):
    for kind in ("deberta-v2", "albert", "gpt2", "llama", "t5"):
        refuses(config_of(folder, model_type=kind), f"model_type '{kind}' is not supported")
    relative = {"position_embedding_type": "relative_key"}
    refuses(config_of(folder, model_type="bert", **relative), "position_embedding_type")
    refuses(config_of(folder, model_type="bert", quantization_config={}), "quantization_config")
    refuses(config_of(folder, model_type="bert", is_decoder=True), "is_decoder")


def other_heads(folder):
    assert {kind.form for kind in KINDS.values()} == {"class", "classes", "score"}
    for kind in ("token_classification", "span"):
        refuses(lambda kind=kind: Task("x", kind), "is not one of")


def models_of_others(folder):
    assert families.FAMILIES["modernbert"].classifier is None
    listed = [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
    (folder / import_model.MODULES).write_text(json.dumps(listed))
    refuses(lambda: import_model.read_modules(folder), "the module Dense is not supported")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    refuses(
        lambda: import_model.read_pooling(folder, [("Pooling", "1_Pooling")]),
        "the pooling max is not supported",
    )
    for fields in ({"peft_type": "LOHA"}, {"use_dora": True}, {"bias": "all"}):
        (folder / peft_config.CONFIG).write_text(json.dumps({"peft_type": "LORA"} | fields))
        refuses(lambda: peft_config.read_config(folder), "is not supported; only plain LoRA and")


def vectors_of_joint_pairs(folder):
    refuses(lambda: dataclasses.replace(STS_COSINE, pair_encoding="joint"), "'cosine' compares")
    (test,) = re.findall(r"^def test_a_joint_pair_has_no_vectors_of_its_own", JOINT, re.MULTILINE)
    assert test


def verdicts(folder):
    claims = rows(section("Claims and verdicts", RESULTS))
    found = [row[5] for row in claims if re.fullmatch("[a-e]", row[0])]
    assert len(found) > 20
    assert found.count("not decidable") > len(found) / 2


def papers_numbers(folder):
    assert re.findall(r"^- preset: (\w+)", RESULTS, re.MULTILINE) == ["cs224n"] and PAPER_GUESSES
    assert "--preset=cs224n" in section("Results")


def accelerators(folder):
    assert "on the cpu" in BENCH


def reverse_mode_only(folder):
    named = re.findall(r"`jax\.(\w+)`", section("Limitations"))
    assert {"jvp", "jacfwd", "hessian", "linearize"} <= set(named)
    for name in named:
        raises_in_forward_mode(name)


def raises_in_forward_mode(name):
    """A transformation that the README says is not supported, through a layer's derivative."""
    x = jnp.ones((2, 3))
    calls = {
        "jvp": lambda: jax.jvp(ops.gelu, (x,), (x,)),
        "linearize": lambda: jax.linearize(ops.gelu, x)[1](x),
    }
    call = calls.get(name, lambda: getattr(jax, name)(lambda x: ops.gelu(x).sum())(x))
    with pytest.raises(TypeError, match="forward-mode"):
        call()


def memory(folder):
    rows = [row for table in tables(BENCH) for row in table if row.get("variant") == "baseline2"]
    found = [row.get("ours / best peer", row.get("ours / peer")) for row in rows]
    factors = [factor for factor in found if factor is not None]
    low, high = (f"{edge(map(float, factors)):.1f}" for edge in (min, max))
    assert f"{low} to {high} ×" in section("Limitations")


TRIED = {
    "Other encoders": other_encoders,
    "Other heads": other_heads,
    "Every third-party model": models_of_others,
    "Vectors of joint pairs": vectors_of_joint_pairs,
    "Forward-mode differentiation": reverse_mode_only,
    "Verdicts from few runs": verdicts,
    "The paper's own numbers": papers_numbers,
    "Speed on GPUs and TPUs": accelerators,
    "Low memory in full fine-tuning": memory,
}
LIMITS = re.findall(r"^- \*\*(.*?)\*\*", section("Limitations"), re.MULTILINE)


def test_each_limit_is_tried():
    assert list(TRIED) == LIMITS


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_real(name, tmp_path):
    TRIED[name](tmp_path)


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md", "docs/tuning.md"])
def test_pages_with_quora_scores_say_that_minilm_has_seen_quora(page):
    assert "Quora duplicates" in (ROOT / page).read_text(encoding="utf-8")


def test_results_decide_no_score_by_one_seed():
    """Claims on scores have a verdict from three seeds on; seeds change no parameter counts."""
    claims = [
        row for row in rows(section("Claims and verdicts", RESULTS)) if re.match("[a-e]$", row[0])
    ]
    assert len(claims) > 20
    decided = [row for row in claims if {"reproduced", "not reproduced"} & set(row)]
    assert decided
    for row in decided:
        assert int(row[10]) >= 3 or "parameters" in " ".join(row)

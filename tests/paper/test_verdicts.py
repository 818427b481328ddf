"""When a report gives a verdict at all: seeds, capped and failed runs, made-up data, chance."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_runs import (
    ANSWERS,
    EXAMPLES,
    PLAN,
    RESAMPLES,
    Answers,
    examine,
    write_json,
    write_root,
    write_run,
)

from experiments.report import claims, facts, figures, page, results, scores, tables
from experiments.report.collect import collect
from jaxlora.tasks.sharing import VARIANTS

# Far apart, so that nothing but the number of seeds can stand against a verdict.
LOW, HIGH = Answers((2, 2), (4, 4), 0.1), Answers((18, 18), (19, 19), 0.97)


def write_seeds(root, seeds, **settings):
    """All eight variants, with every effect as large as it can be."""
    for study in VARIANTS:
        cosine = VARIANTS[study].sts_loss == "cosine"
        for seed in seeds:
            write_run(root, study, seed, HIGH if cosine else LOW, **settings)
    return root


def texts(context, findings):
    """The report as Markdown and as a page, without its figures, which take long."""
    parts, found = facts.parts(context, findings), tables.make(context, findings)
    return (
        results.markdown(context, parts, found, "command"),
        page.html(context, parts, found, [], "command"),
    )


def on_scores(findings):
    return [f for f in findings if f.claim.by_seeds]


def found(findings, first, second, measure):
    (one,) = [
        f for f in findings
        if (f.claim.first, f.claim.second, f.claim.measure) == (first, second, measure)
    ]  # fmt: skip
    return one


# Seeds


def test_one_seed_gives_no_verdict_on_scores(tmp_path):
    findings = examine(write_seeds(tmp_path, [0]))[1]
    there = [f for f in on_scores(findings) if f.verdict != "not run"]
    assert len(there) > 10
    assert {f.verdict for f in there} == {"not decidable"}
    assert all("one seed" in f.note for f in there)
    cosine = found(findings, "lora2", "lora1", "sts")
    assert cosine.evidence.interval.low > 0  # it would be reproduced, were there more seeds


def test_two_seeds_reproduce_nothing_and_three_do(tmp_path):
    verdicts = {}
    for count in (2, 3):
        findings = examine(write_seeds(tmp_path / str(count), range(count)))[1]
        verdicts[count] = found(findings, "lora2", "lora1", "sts")
        assert count == 3 or "reproduced" not in {f.verdict for f in on_scores(findings)}
    assert verdicts[2].verdict == "not decidable"
    assert "two seeds" in verdicts[2].note
    assert verdicts[3].verdict == "reproduced"


def test_two_seeds_may_contradict(tmp_path):
    """Squared error is far better here, against the claim."""
    for study, answers in (("lora2", LOW), ("lora1", HIGH)):
        for seed in (0, 1):
            write_run(tmp_path, study, seed, answers)
    assert found(examine(tmp_path)[1], "lora2", "lora1", "sts").verdict == "not reproduced"


def test_interval_holds_what_seeds_do(tmp_path):
    """Seeds that lie 8 examples apart make an interval wider than dev examples alone do."""
    for seed in range(4):
        write_run(tmp_path, "lora1", seed, Answers((4, 4), (10, 10), 0.5))
        write_run(tmp_path, "lora2", seed, Answers((6, 14), (10, 10), 0.5))
    context = examine(tmp_path)[0]
    alike = tmp_path / "alike"
    for seed in range(4):
        write_run(alike, "lora1", seed, Answers((4, 4), (10, 10), 0.5))
        write_run(alike, "lora2", seed, Answers((10, 10), (10, 10), 0.5))
    wide = context.scores.difference("lora2", "lora1", "sst")
    narrow = examine(alike)[0].scores.difference("lora2", "lora1", "sst")
    assert wide.value == narrow.value == pytest.approx(6 / EXAMPLES)
    assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)


def simulated(pairs, seeds, spread, effect=0.0, examples=300):
    """Pairs of studies `x<n>`, `y<n>`: seeds differ by `spread`, x is better by `effect`."""
    rng = np.random.default_rng(5)
    runs = {}
    for name, better in (("x", effect), ("y", 0.0)):
        for pair in range(pairs):
            rates = 0.6 + better + rng.normal(0, spread, (seeds, 1))
            right = rng.random((seeds, examples)) < rates
            runs[f"{name}{pair}"] = tuple(
                SimpleNamespace(
                    seed=seed,
                    result={"dev": dict.fromkeys(("sst", "para", "sts"), row.mean()),
                            "dev_mean": row.mean()},
                    answers={"sst": SimpleNamespace(
                        predictions=row * 1.0, labels=np.ones(examples))},
                )
                for seed, row in enumerate(right)
            )  # fmt: skip
    return scores.score(SimpleNamespace(studies=runs), RESAMPLES, 0)


@pytest.mark.parametrize("spread", [0.0, 0.03])
def test_no_effect_is_called_one_as_often_as_is_said(spread):
    """2.5 % of the intervals lie above 0, 2.5 % below; of 400: 10 ± 3.1 each."""
    measured = simulated(400, 20, spread)
    intervals = [measured.difference(f"x{n}", f"y{n}", "sst") for n in range(400)]
    for region in (claims.HIGHER, claims.LOWER):
        said = sum(claims.judge(region, found) == "reproduced" for found in intervals)
        assert 2 <= said <= 20


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_few_seeds_do_not_find_more_than_is_said(seeds):
    measured = simulated(400, seeds, 0.03)
    intervals = [measured.difference(f"x{n}", f"y{n}", "sst") for n in range(400)]
    said = sum(claims.judge(claims.HIGHER, found) == "reproduced" for found in intervals)
    assert said <= 20


def test_real_effect_is_found_with_three_seeds():
    measured = simulated(50, 3, 0.005, effect=0.15)
    intervals = [measured.difference(f"x{n}", f"y{n}", "sst") for n in range(50)]
    assert sum(claims.judge(claims.HIGHER, found) == "reproduced" for found in intervals) >= 45


def test_each_task_has_resamples_of_its_own(tmp_path):
    """The same answers in two tasks of as many examples: their resamples are independent."""
    for seed in (0, 1):
        write_run(tmp_path, "lora2", seed, ANSWERS["lora2"])
        folder = tmp_path / "lora2" / f"seed{seed}"
        sst, para = (folder / "predictions" / f"{task}-dev.csv" for task in ("sst", "para"))
        para.write_text(sst.read_text())
    drawn = examine(tmp_path)[0].scores.resampled["lora2"]
    assert abs(np.corrcoef(drawn["sst"], drawn["para"])[0, 1]) < 0.2


def test_gain_that_may_be_nothing_has_no_share(tmp_path):
    """baseline4 is better by one example of 20, which many resamples do not draw."""
    for seed in range(3):
        write_run(tmp_path, "baseline1", seed, Answers((9, 9), (10, 10), 0.5))
        write_run(tmp_path, "baseline4", seed, Answers((10, 10), (10, 10), 0.5))
        write_run(tmp_path, "lora2", seed, Answers((10, 10), (10, 10), 0.5))
    gain = found(examine(tmp_path)[1], "lora2", "baseline1", "gain")
    assert gain.evidence.interval is None and gain.verdict == "not decidable"
    assert "gains nothing certain" in gain.note


# Chance


def test_verdicts_expected_by_chance_are_said(tmp_path):
    context, findings = examine(write_seeds(tmp_path, range(3)))
    count = sum(
        f.claim.measure not in ("parameters", "step", "best") and f.evidence.interval is not None
        for f in findings
    )
    said = facts.chance(findings)
    assert count > 10 and f"{count} comparisons of scores" in said and f"{count / 40:.1f}" in said
    assert all(said in text for text in texts(context, findings))


def test_two_seeds_leave_no_reproduction_to_chance(tmp_path):
    said = facts.chance(examine(write_seeds(tmp_path, range(2)))[1])
    assert "up to 0.0 are expected to be called reproduced" in said
    assert "up to 0.0 not reproduced" not in said


def test_one_seed_leaves_nothing_to_chance(tmp_path):
    findings = examine(write_seeds(tmp_path, [0]))[1]
    assert facts.chance(findings).startswith("No comparison of scores can be decided")


# Runs that are not whole


def test_step_that_was_timed_once_gives_no_verdict(tmp_path):
    """Of a single rate nobody knows how far the next one would be from it."""
    for study in ("lora2", "baseline4"):
        write_run(tmp_path, study, 0, HIGH)
    once, often = ({"low": ms, "median": 50.0, "high": 50.0} for ms in (50.0, 40.0))
    for low, verdict in ((once, "not decidable"), (often, "not reproduced")):
        write_json(tmp_path / "timing.json", {"studies": {
            # a third as many steps as those of three encoders in turn
            "lora2": {"ms_per_step": {name: 6 * ms for name, ms in often.items()}},
            "baseline4": {"ms_per_step": low},
        }})  # fmt: skip
        finding = found(examine(tmp_path)[1], "lora2", "baseline4", "step")
        assert finding.verdict == verdict
        assert ("+100 %, whose spread is unknown" in finding.note) == (low is once)


CAPPED = {"max_steps": 20}


@pytest.mark.parametrize("seeds", [1, 3])
def test_capped_runs_reproduce_nothing(tmp_path, seeds):
    """Every verdict, those of storage and of time as well; each table names the cap."""
    findings = examine(write_seeds(tmp_path, range(seeds), **CAPPED))[1]
    assert {f.verdict for f in findings} == {"not decidable", "not run"}
    there = [f for f in findings if f.verdict == "not decidable"]
    assert all("capped at 20 steps" in f.note for f in there)


def whole(root):
    for seed in range(3):
        for study, answers in ANSWERS.items():
            write_run(root, study, seed, answers)
    return root


def rows_of(table, name):
    return [row for row in table.rows if name in row[:4]]


@pytest.mark.parametrize(
    ("broken", "mark"),
    [({"max_steps": 12}, "seed 1: capped at 12 steps"), ({"skipped": 3}, "seed 1: 9 steps left")],
)
def test_runs_that_are_not_whole_are_marked_in_every_table(tmp_path, broken, mark):
    write_run(whole(tmp_path), "lora2", 1, ANSWERS["lora2"], **broken)
    context, findings = examine(tmp_path)
    every = [*tables.make(context, findings), results.estimate_table(context)]
    assert len(every) == 9
    for table in every:
        for row in rows_of(table, "lora2"):
            assert any(mark in str(value) for value in row), table.name
        for row in rows_of(table, "lora1"):
            if "lora2" not in row:
                assert not any(mark in str(value) for value in row)
    assert found(findings, "lora2", "lora1", "sts").verdict == "not decidable"
    assert found(findings, "lora2", "baseline1", "gain").verdict == "not decidable"
    assert found(findings, "lora3", "lora1", "sts").verdict == "reproduced"
    assert any(mark in line for line in facts.missing(context.collection))
    assert f"lora2: {mark}" in facts.headline(context)


def test_cap_that_was_not_reached_is_none(tmp_path):
    write_run(tmp_path, "lora2", 0, ANSWERS["lora2"], max_steps=21)
    assert collect(tmp_path).state("lora2") == "complete"


def test_failed_run_is_marked_and_gives_no_verdict(tmp_path):
    whole(tmp_path)
    plan = PLAN | {"seeds": [0, 1, 2, 3], "failed": {"lora2/seed3": "the loss of sst is nan"}}
    write_json(tmp_path / "plan.json", plan)
    context, findings = examine(tmp_path)
    assert found(findings, "lora2", "lora1", "sts").verdict == "not decidable"
    assert found(findings, "lora3", "lora1", "sts").verdict == "reproduced"
    assert "seed 3: failed" in found(findings, "lora2", "lora1", "sts").note
    assert context.collection.state("lora2") == "seed 3: failed"
    assert context.collection.state("lora1") == "seed 3: not begun"
    assert "lora2, seed 3: failed: the loss of sst is nan" in facts.missing(context.collection)


def test_state_of_a_study_without_a_finished_run(tmp_path):
    collection = collect(write_root(tmp_path))
    assert collection.state("lora4") == "seed 0: not finished; seed 1: not begun"
    assert collection.state("lora4-summed") == "not run"


def test_failure_of_the_best_baseline_bars_the_gain(tmp_path):
    write_run(whole(tmp_path), "baseline4", 0, ANSWERS["baseline4"], **CAPPED)
    gain = found(examine(tmp_path)[1], "lora2", "baseline1", "gain")
    assert gain.verdict == "not decidable" and "baseline4: seed 0: capped" in gain.note


def test_not_run_has_a_badge_of_its_own(tmp_path):
    context, findings = examine(write_root(tmp_path))
    absent = found(findings, "lora4", "lora2", "sts")
    assert (absent.verdict, absent.note) == ("not run", "no finished run of lora4")
    html = texts(context, findings)[1]
    badges = set(re.findall(r'class="chip ([\w-]+)"', html))
    assert {"not-run", "not-decidable"} <= badges
    for badge in ("not-run", "not-decidable"):
        assert re.search(rf"^\.{badge} \{{", html, re.MULTILINE)
    marks = dict(re.findall(r'class="chip ([\w-]+)"><span aria-hidden="true">(.)</span>', html))
    assert marks["not-run"] != marks["not-decidable"]


# Made-up data


def words_of_figures(context):
    """Titles, captions and labels of all figures, each panel painted on axes of its own."""
    said = []
    for plan in figures.plans(context):
        said += [plan.title, plan.caption]
        for panel in plan.panels:
            axes = Figure().add_subplot()
            panel(axes)
            said += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    return " ".join(said)


def test_made_up_data_has_no_real_name_and_no_paper_beside_it(tmp_path):
    context, findings = examine(write_seeds(tmp_path, range(3), source="demo"))
    markdown, html = texts(context, findings)
    measured = markdown.split("## The paper's slips")[0], html.split('id="slips"')[0]
    for text in (*measured, words_of_figures(context)):
        assert not [name for name in ("SST-5", "Quora", "STS-B") if name in text]
    assert all("built-in made-up data" in text for text in measured)
    by_name = {table.name: table for table in tables.make(context, findings)}
    assert not [c for c in by_name["table2"].columns if "paper" in c.title]
    said = {(f.claim.measure, f.claim.paper) for f in findings if f.claim.paper is not None}
    assert {measure for measure, _ in said} == {"parameters"}
    assert {f.verdict for f in on_scores(findings)} <= {"not decidable", "not run"}
    assert "made-up data" in found(findings, "lora2", "lora1", "sts").note
    pareto = next(plan for plan in figures.plans(context) if plan.name == "pareto")
    assert len(pareto.panels) == 1


@pytest.mark.parametrize(("base", "said"), [("minilm", True), ("bert-base-uncased", False)])
def test_what_minilm_has_seen_is_said_where_quora_scores_stand(tmp_path, base, said):
    context, findings = examine(write_seeds(tmp_path, [0], base=base))
    for text in (*texts(context, findings), words_of_figures(context)):
        assert ("Quora duplicates" in text) == said
    table2 = next(t for t in tables.make(context, findings) if t.name == "table2")
    assert ("Quora duplicates" in table2.about) == said


# The paper's claims


def test_claims_say_whose_they_are():
    assert {c.source for c in claims.CLAIMS if c.part == "d"} == {"our question"}
    paper = [c for c in claims.CLAIMS if c.measure == "parameters" and c.source == "the paper"]
    (small,) = paper  # 5.10M of 111.78M
    assert (small.first, small.second) == ("lora2", "baseline3")
    assert small.paper == pytest.approx(4.5) and "4.5 %" in small.text
    assert claims.paper_share("lora2", "baseline3") == pytest.approx(100 * 5.10 / 111.78)


def test_slips_name_the_texts_paraphrase():
    text = " ".join(tables.footnotes())
    assert "−7.63" in text and "−7.73" in text and "paraphrase" in text


def test_questions_of_ours_are_marked(tmp_path):
    write_json(tmp_path / "plan.json", PLAN)
    assert all("our question" in text for text in texts(*examine(tmp_path)))


def test_interval_may_wrap_beside_its_badge(tmp_path):
    """It ran under the badge at 1,400 px: a number wider than its column must break instead."""
    write_json(tmp_path / "plan.json", PLAN)
    html = texts(*examine(tmp_path))[1]
    rules = re.findall(r"^ *\.finding \.number \{([^}]*)\}", html, re.MULTILINE)
    assert rules and not any("nowrap" in rule for rule in rules)

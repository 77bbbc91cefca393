"""Plans and drawings from a source that is passed, the one writer, an exhibit's YAML, words, marks and notebooks."""

import argparse
import itertools
import re
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from made_up_figure import HEADLINE, do, options
from scipy import stats

from functional_sam import METHODS, exhibits
from functional_sam.commands import results, runs
from functional_sam.errors import UserError
from functional_sam.exhibits import claims, figure_1, style, words
from functional_sam.exhibits.check import check
from functional_sam.exhibits.markdown import MARKS, interval, marked, number, significant, table
from functional_sam.exhibits.spec import load_spec, scales
from functional_sam.files import write_text
from functional_sam.records import Run, Status, released
from functional_sam.study.compare import Estimate, Verdict

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------- plans and sources


def test_a_missing_run_stops_the_drawing_and_names_the_command(tmp_path):
    with pytest.raises(exhibits.NotComplete, match="functional-sam run figure-1 --scale quick"):
        exhibits.draw("figure-1", overrides=(f"runtime.runs={tmp_path}",))


def test_unknown_exhibit_and_scale():
    with pytest.raises(UserError, match="unknown exhibit 'figure_1'; did you mean 'figure-1'"):
        exhibits.needed("figure_1")
    with pytest.raises(UserError, match="unknown scale 'quik'"):
        exhibits.needed("figure-1", "quik")


def test_a_plan_knows_what_is_missing(home):
    configs = exhibits.needed("figure-1")
    do(configs[:2])
    plan = exhibits.planned("figure-1")
    assert plan.configs == configs
    assert plan.missing == configs[2:]
    assert plan.shown == configs[:2]
    assert not plan.drawable
    do(configs[2:])
    assert exhibits.planned("figure-1").drawable


def test_a_drawing_does_not_plan_again(home, monkeypatch):
    do(exhibits.needed("figure-1"))
    plan = exhibits.ready("figure-1")
    monkeypatch.setattr(figure_1, "plan", None)
    monkeypatch.setattr(figure_1, "plan", None)
    exhibit = exhibits.draw_plan(plan)
    assert exhibit.plan is plan
    assert not (home / "paper").exists()  # in memory


def test_runs_are_preferred_where_they_hold_as_much(home):
    configs = exhibits.needed("figure-1")
    do(configs)
    results.release_command(options())
    assert exhibits.ready("figure-1").source.name == "runs"
    (Run(configs[0]).directory / "done.json").unlink()
    assert exhibits.ready("figure-1").source.name.startswith("results/")
    with pytest.raises(exhibits.NotComplete):
        exhibits.fresh("figure-1")
    with pytest.raises(exhibits.NotComplete):  # other runs than the released ones
        exhibits.ready("figure-1", overrides=("training.steps=7",))
    with pytest.raises(UserError, match="only complete runs can be released"):
        results.release_command(options())


def test_figure_1_leaves_the_adam_ascent_out_where_it_is_noise(home):
    do(exhibits.needed("figure-1"))
    exhibit = exhibits.draw("figure-1")
    steps = exhibit.frame.groupby("ascent").step.apply(lambda column: set(column))
    assert steps.to_dict() == {"gradient": {1, 3, 7, 17, 45, 116, 300}, "adam": {17, 45, 116, 300}}
    assert "under Adam's ascent from step 10 on" in exhibit.caption
    assert len(re.findall(r"\.(?= [A-Z]|$)", exhibit.caption)) == 3
    # Shares at the end differ by 0.1, and by seed 0.01 in each task: standard error 0.01 sqrt(2 / 3), t for 4 degrees 2.776.
    assert "gradient, 512 targets: +0.100 \N{PLUS-MINUS SIGN} 0.023, language above" in exhibit.verdict
    tests = exhibit.frames["tests"]
    assert list(zip(tests.ascent, tests.targets, strict=True)) == list(itertools.product(("gradient", "adam"), (128, 512, 2048)))
    assert tests.p_holm.to_list() == pytest.approx([6 * 2 * stats.t.sf(0.1 / (0.01 * (2 / 3) ** 0.5), 4)] * 6)
    assert figure_1.headline(exhibit.frame) == HEADLINE
    assert exhibit.answer == "holds"
    without = exhibit.frame[exhibit.frame.origin == "independent"].groupby("step").share_logit_without_noise.first()
    assert without.to_dict() == pytest.approx(
        {1: 1.0, 3: 0.75, 7: 0.75, 17: 0.75, 45: 0.75, 116: 0.75, 300: 0.75}
    )  # sqrt(.36) against sqrt(.04); a negative square is zero
    assert exhibit.frame[exhibit.frame.origin == "same"].share_logit_without_noise.isna().all()


def test_the_noise_scale_is_the_covariance_over_the_square_of_the_mean():
    """Of vectors drawn for each target with a known mean and covariance, measured as runs are: a batch and its two halves."""
    rng, n, mean, deviations = np.random.default_rng(0), 128, np.array([0.3, -0.2, 0.1]), np.array([1.0, 2.0, 0.5])
    rows = []
    for seed in range(400):
        first, second = (mean + rng.normal(size=(n // 2, 3)) * deviations for _ in range(2))
        whole = (first.mean(0) + second.mean(0)) / 2
        part = 1.0 - first.mean(0) @ second.mean(0) / (whole @ whole)
        rows.append({"task": "language", "seed": seed, "step": 9, "targets": n, "ascent": "gradient", "origin": "independent"})
        rows[-1] |= {"norm_gradient": np.linalg.norm(whole), "noise_gradient": part}
    found = figure_1.noise_scale(pd.DataFrame(rows), "language", "gradient")
    assert found == pytest.approx((deviations**2).sum() / (mean**2).sum(), rel=0.1)


def test_the_part_that_is_noise_is_a_ratio_of_means():
    """|d|^2 of 4 and 16, of which 3 and -1 are the mean's: 3 of 10; the mean of the seeds' own ratios would be another."""
    data = pd.DataFrame({"norm_func": [2.0, 4.0], "noise_func": [1 - 3 / 4, 1 + 1 / 16]})
    assert figure_1.noise(data, "func") == pytest.approx(1 - (3 - 1) / (4 + 16))


def test_a_share_of_which_all_is_noise_in_a_seed_is_of_the_other_seeds():
    """It is 0 / 0 there; the mean of all seeds would be nan, and print nothing."""
    known = figure_1._known(pd.Series([0.7, 0.8, 0.9]))
    assert known == "0.80 \N{PLUS-MINUS SIGN} 0.25"
    assert figure_1._known(pd.Series([0.7, np.nan, 0.9, 0.8])) == f"{known} (in 3 of 4 seeds, of the others all is noise)"
    assert figure_1._known(pd.Series([np.nan, np.nan])) == "not known, all is noise"


def test_figure_1_says_nothing_where_seeds_differ_more_than_tasks(home):
    do(
        exhibits.needed("figure-1"),
        of=lambda config, step: 0.3 + 0.1 * config.training.init_seed * (-1) ** (config.task == "vision"),
    )
    tests = exhibits.draw("figure-1").frames["tests"]
    assert set(tests.verdict) == {"inconclusive"}


@pytest.mark.parametrize("name", ["figure-1", "figure-2", "figure-4", "figure-9", "table-4"])
@pytest.mark.parametrize("scale", ["quick", "laptop"])
def test_every_scale_has_a_tolerance_with_a_reason(name, scale):
    tolerance = load_spec(name, scale).tolerance
    assert tolerance.keys
    assert tolerance.bounds
    assert tolerance.reason


def test_nothing_differs_from_itself():
    frame = pd.DataFrame({"seed": [0, 1], "a": [1.0, float("nan")]})
    tolerance = exhibits.spec.Tolerance(keys=["seed"], exact=["a"])
    found = check(frame, frame.copy(), tolerance)
    assert (found.mismatches, found.rows, found.cells, found.same) == ([], 2, 2, True)


def test_a_row_that_is_there_twice_is_a_difference():
    """The second of them alone would be compared."""
    released = pd.DataFrame({"seed": [0, 1], "a": [1.0, 2.0]})
    fresh = pd.DataFrame({"seed": [0, 1, 1], "a": [1.0, 7.0, 2.0]})
    (found,) = check(fresh, released, exhibits.spec.Tolerance(keys=["seed"], exact=["a"])).mismatches
    assert (found.row, found.fresh, found.released) == ("seed 1", "there more than once", "once")


def test_commands_that_a_message_names_are_of_the_same_scale():
    """Without its scale --fresh would move the runs of another one aside."""
    stale = [(None, Status("stale", 3, ["torch 1.0, here 2.0"]))]
    words = runs.stale_words("figure-1", "laptop", stale)
    assert "`functional-sam plan figure-1 --scale laptop` says what differs" in words
    assert "`functional-sam run figure-1 --scale laptop --fresh` moves them aside" in words
    assert runs.stale_words("figure-1", "laptop", []) == ""


# ---------------------------------------------------------------------- YAML, make, README


@pytest.mark.parametrize("name", exhibits.known())
def test_make_help_lists_the_exhibit_as_its_yaml_has_it(name):
    spec = load_spec(name, scales(name)[0])
    done = subprocess.run(["make", "-s", "help"], capture_output=True, text=True, cwd=ROOT, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [name]]
    assert line.split(maxsplit=1)[1] == f"{spec.title} ({spec.time})"


def test_an_exhibit_without_its_facts_is_refused(tmp_path, monkeypatch):
    (tmp_path / "configs" / "tasks").mkdir(parents=True)
    write_text(tmp_path / "configs" / "scales" / "quick.yaml", "")
    write_text(
        tmp_path / "configs" / "exhibits" / "table-1.yaml", "title: T\ntime: 1 min\nclaim: c\nscales: {quick: {seeds: [0]}}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"table-1.yaml: published is missing"):
        load_spec("table-1", "quick")


@pytest.mark.parametrize("seeds", ["seeds: [0, 1, 1]", "seeds: [0], seeds_by_task: {vision: [0, 1, 1]}"])
def test_a_seed_is_not_counted_twice(tmp_path, monkeypatch, seeds):
    (tmp_path / "configs" / "tasks").mkdir(parents=True)
    write_text(tmp_path / "configs" / "scales" / "quick.yaml", "")
    facts = "title: T\ntime: 1 min\nclaim: c\npublished: p\n"
    write_text(tmp_path / "configs" / "exhibits" / "table-1.yaml", f"{facts}scales: {{quick: {{{seeds}}}}}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"table-1.yaml, scale quick: seeds(_by_task.vision)?=\[0, 1, 1\]: one is there twice"):
        load_spec("table-1", "quick")


FACTS = {"figure-10": {}, "figure-2": {"claim": "a | b", "title": "T", "time": "1 min"}, "table-1": {}}
RECORD = {"files": ["paper/figures/figure-2.pdf", "paper/figures/figure-2.png"], "headline": "|g| is small"}


def test_what_was_drawn_stays_whole_until_all_of_the_next_is_made(home, monkeypatch):
    """A drawing that is interrupted, here in its PNG, leaves picture, numbers and record as they were, and nothing else."""
    do(exhibits.needed("figure-1"))
    exhibit = exhibits.draw("figure-1")
    before = {path: path.read_bytes() for path in exhibits.write(exhibit)}
    save = type(exhibit.figure).savefig

    def interrupted(figure, path, **words):
        if words["format"] == "png":
            raise KeyboardInterrupt
        save(figure, path, **words)

    monkeypatch.setattr(type(exhibit.figure), "savefig", interrupted)
    exhibit.figure.set_facecolor("red")
    with pytest.raises(KeyboardInterrupt):
        exhibits.write(exhibit)
    assert {path: path.read_bytes() for path in (home / "paper").rglob("*.*")} == before


def test_claims_and_report_refuse_what_is_not_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "paper_directory", lambda: tmp_path / "paper")
    path = tmp_path / "paper" / "figures" / "figure-2.json"
    write_text(path, '{"exhibit": "figure-2", "scale": "quick", "files": ["paper/figures/figure-2.png"]}')
    with pytest.raises(UserError, match=r"figure-2.png is missing; draw it again: functional-sam draw figure-2 --scale quick"):
        claims.recorded()
    write_text(path.with_suffix(".png"), "")
    assert list(claims.recorded()) == [("figure-2", "quick")]
    for damaged in ('{"exhibit": ', "[]", "{}"):
        write_text(path, damaged)
        with pytest.raises(UserError, match=r"figure-2.json is damaged .*: remove it, and draw the exhibit again"):
            claims.recorded()


def test_the_table_of_claims():
    text = claims.table(FACTS, {("figure-2", "quick"): RECORD})
    row = r"| a \| b | \|g\| is small | descriptive | `make figure-2` (1 min): [quick](paper/figures/figure-2.png) |"
    assert text.splitlines()[2:] == [row]
    larger = {**RECORD, "files": ["paper/figures/figure-2-laptop.png"], "answer": "holds", "headline": "large"}
    text = claims.table(FACTS, {("figure-2", "quick"): RECORD, ("figure-2", "laptop"): larger})
    both = "`make figure-2` (1 min): [laptop](paper/figures/figure-2-laptop.png), [quick](paper/figures/figure-2.png)"
    assert f"| large | **holds** | {both} |" in text
    assert claims.table(FACTS, {("figure-2", "quick"): {**RECORD, "answer": "inconclusive"}}).count("| inconclusive |") == 1
    untested = {**larger, "answer": "not tested"}
    text = claims.table(FACTS, {("figure-2", "quick"): {**RECORD, "answer": "mixed"}, ("figure-2", "laptop"): untested})
    asked = "`make figure-2` (1 min): [quick](paper/figures/figure-2.png), [laptop](paper/figures/figure-2-laptop.png)"
    assert rf"| \|g\| is small | **mixed** | {asked} |" in text  # of the largest scale that asks the claim, which is linked first
    assert "| large | not tested |" in claims.table(FACTS, {("figure-2", "laptop"): untested})


def test_exhibits_are_ordered_by_kind_and_number():
    assert claims.in_order(["table-1", "figure-10", "figure-2", "table-1"]) == ["figure-2", "figure-10", "table-1"]


# ---------------------------------------------------------------------- Markdown


def test_a_table():
    assert table(["|g|", "n"], [["a\nb", 1], ["c|d", number(-0.5, 1)]]) == (
        "| \\|g\\| | n |\n|:---|---:|\n| a b | 1 |\n| c\\|d | \N{MINUS SIGN}0.5 |\n"
    )
    assert ":---|:---|" in table(["a", "b"], [], text=["b"])
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        table(["a", "b"], [["1"]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(1.23456), "1.2346"),
        (number(1.23456, sign=True), "+1.2346"),
        (number(0.0), "0.0000"),
        (number(0.00004), "< .0001"),
        (number(0.00004, sign=True), "< +.0001"),
        (number(-0.00004), "> \N{MINUS SIGN}.0001"),
        (number(0.04, 1), "< .1"),
        (number(float("nan")), ""),
        (number(float("inf")), "infinite"),
        (significant(-12345.0), "\N{MINUS SIGN}12,300"),
        (significant(0.000012345), "1.23e\N{MINUS SIGN}05"),
        (significant(1234.5), "1230"),
        (significant(4560.0, 2), "4600"),
        (interval(4.86934, 0.04041), "4.8693 \N{PLUS-MINUS SIGN} 0.0404"),
        (interval(-0.07326, 0.38812, sign=True), "\N{MINUS SIGN}0.073 \N{PLUS-MINUS SIGN} 0.388"),
        (interval(0.000012, 0.0000012), "< .0001 \N{PLUS-MINUS SIGN} < .0001"),
        (interval(123.456, 12.3), "123.46 \N{PLUS-MINUS SIGN} 12.30"),
        (interval(0.0123456, float("inf")), "0.0123"),
        (interval(0.5, 0.25, 2), "0.50 \N{PLUS-MINUS SIGN} 0.25"),
        (interval(0.5, float("inf"), 2), "0.50"),
        (interval(float("inf"), float("nan"), 2), "infinite"),
    ],
)
def test_numbers(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("cell", "mark"),
    [
        ("better", "better"),
        ("worse, +0.2", "worse"),
        ("+0.2, worse (diverged)", "worse"),
        ("worse (diverged)", "worse"),
        ("no difference", "no difference"),
        ("inconclusive, +0.2", None),
        ("better than AdamW", None),
        ("0.5", None),
    ],
)
def test_a_verdict_in_a_cell_is_marked(cell, mark):
    assert marked(cell) == (f"{MARKS[mark]} {cell}" if mark else cell)
    assert marked(cell) in table(["a"], [[cell]])


# ---------------------------------------------------------------------- words of verdicts


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["worse", "worse (diverged)"], "holds"),
        (["worse", "inconclusive", "no difference", ""], "holds in 1 of 3"),
        (["better", "better"], "opposite"),
        (["better", "inconclusive"], "opposite in 1 of 2"),
        (["better", "worse"], "mixed"),
        (["no difference", "no difference"], "not seen"),
        (["no difference", "inconclusive"], "inconclusive"),
        ([float("nan"), ""], "not tested"),
    ],
)
def test_what_comparisons_say_to_a_claim_of_worse(verdicts, expected):
    assert words.answer(verdicts, Verdict.WORSE) == expected


def test_a_tally_names_every_verdict_once():
    assert words.tally(["worse", "inconclusive", "worse", "", float("nan")]) == "2 worse, 1 inconclusive"
    assert words.tally([]) == "nothing to compare"


# ---------------------------------------------------------------------- how figures look


def test_ticks_are_where_the_data_are_with_true_minus_signs():
    figure, (left, right) = plt.subplots(1, 2)
    left.plot([0.005, 0.05, 0.5], [-0.3, 0.002, 0.04])
    style.log_ticks(left, "x", [0.005, 0.05, 0.5, 0.5])
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0.005", "0.05", "0.5"]
    style.signed_log(left, 0.01)
    ticks = [tick.get_text() for tick in left.get_yticklabels()]
    assert {"0", "0.01", "0.03", "\N{MINUS SIGN}0.1", "\N{MINUS SIGN}0.3"} <= set(ticks)
    right.plot(range(1, 200), range(1, 200))
    style.log_ticks(right, "x", range(1, 200))
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["1", "3", "10", "30", "100"]
    plt.close(figure)


def test_a_title_breaks_no_interval():
    figure = plt.figure()
    for words_before in range(10, 16):
        style.finding_above(figure, f"{'finding ' * words_before}{interval(-0.1, 0.2)} and more of it")
        lines = figure.texts[-1].get_text().splitlines()
        assert len(lines) > 1 or words_before < 13
        assert not [line for line in lines if line.endswith("\N{PLUS-MINUS SIGN}") or line.startswith("\N{PLUS-MINUS SIGN}")]
    plt.close(figure)


def test_marks_show_the_interval_that_decides_and_one_seed_lighter():
    figure, axis = plt.subplots()
    style.marks(axis, [0, 1, 2], [Estimate(1.0, 0.5, 3), Estimate(2.0, float("nan"), 1), Estimate(float("inf"), 0, 3)], "sam")
    (bar,) = [segment for bars in axis.collections for segment in bars.get_segments() if len(segment)]
    assert list(bar[:, 1]) == pytest.approx([1.0 - 4.303 * 0.5, 1.0 + 4.303 * 0.5], abs=1e-3)  # t quantile of 2 degrees of freedom
    shown = [line for line in axis.lines if line.get_linestyle() == "None"]
    assert [(line.get_alpha(), list(line.get_xdata())) for line in shown] == [(1.0, [0]), (style.SINGLE, [1])]
    plt.close(figure)


@pytest.mark.parametrize(("value", "text"), [(6224, "6.2k"), (13944, "14k"), (789504, "0.79M"), (1.208e9, "1.2B"), (7, "7")])
def test_sizes_in_words(value, text):
    assert style.count(value) == text


def test_every_method_has_a_name_for_readers():
    assert {name for name in METHODS if name != "plain"} <= set(style.METHOD_LABEL)
    assert set(style.METHOD_MARKER) <= set(style.METHOD_COLOR)


def test_offsets_do_not_meet():
    assert style.offsets(3, 0.2) == pytest.approx([-0.2, 0.0, 0.2])
    assert style.offsets(1, 0.2) == [0.0]


# ---------------------------------------------------------------------- notebooks, old runs


def test_status_says_which_directories_are_of_an_earlier_version(home, capsys):
    configs = exhibits.needed("figure-1")[:3]
    do(configs)
    old, renamed = (Run(config).directory for config in configs[1:])
    text = (old / "config.yaml").read_text()
    assert "  micro_batch: null\n" in text
    write_text(old / "config.yaml", text.replace("  micro_batch: null\n", "  micro_batch: 0\n"))
    renamed.rename(home / "runs" / "language-adamw-0123456789ab")
    assert runs.status_command(argparse.Namespace(directory="runs")) == 0
    out = capsys.readouterr().out
    assert re.search(rf"{old.name} .*of an earlier version, or damaged: training.micro_batch=0", out)
    assert f"of an earlier version, or renamed: today its settings are those of {renamed.name}" in out
    assert "runs: 1 runs; 1 " in out
    assert "2 directories hold no run of this version" in out
    assert released.load_pack("figure-1", "quick") is None

"""Statistics by hand, table-1 as a view of other exhibits' runs, and exhibits that refuse to draw without their runs."""

import copy
import math

import pytest
from test_study import finish, study_of

from functional_sam import exhibits
from functional_sam.errors import UserError
from functional_sam.exhibits import study
from functional_sam.exhibits.statistics import estimate, paired_difference, verdict
from functional_sam.exhibits.study import REGIMES


def test_estimate_by_hand():
    value = estimate([1.0, 2.0, 6.0])
    assert value.mean == 3.0
    assert value.stderr == pytest.approx(math.sqrt(7 / 3))  # variance (4 + 1 + 9) / 2 = 7
    assert estimate([1.0]).n == 1
    assert math.isnan(estimate([1.0]).stderr)
    assert estimate([1.0, math.inf]).mean == math.inf


def test_verdict_needs_the_t_interval_to_leave_out_zero():
    # n = 3: t quantile 4.303. Differences of mean -4.2 (-4.4) standard errors are inconclusive (better).
    for ratio, word in ((4.2, "inconclusive"), (4.4, "better")):
        spread = 1.0 * math.sqrt(3)  # sample standard deviation for stderr 1
        values = [-ratio - spread, -ratio, -ratio + spread]
        assert verdict(estimate(values)) == word
        assert verdict(estimate([-v for v in values])) == ("worse" if word == "better" else word)
        assert verdict(estimate(values), lower_is_better=False) == ("worse" if word == "better" else word)
    assert verdict(estimate([-1.0])).startswith("inconclusive")
    assert verdict(paired_difference([math.inf, 1.0], [1.0, 1.0])) == "worse (diverged)"
    assert verdict(paired_difference([1.0, 1.0], [math.inf, 1.0])) == "better (the other diverged)"
    assert verdict(paired_difference([math.inf, 1.0], [math.inf, 1.0])) == "inconclusive"  # both: nothing can be said


def test_pairing_removes_what_both_share():
    difference = paired_difference([1.1, 5.1, 9.1], [1.0, 5.0, 9.0])
    assert difference.mean == pytest.approx(0.1)
    assert difference.stderr == pytest.approx(0.0, abs=1e-12)


TABLE_1 = {"adamw", "sam", "functional-sam"}
GAINS = {"adamw": 0.0, "sam": -0.5}


def worse_sam(config):
    """A loss at which SAM is 0.5 worse than AdamW, and everything else 0.25 better."""
    return 4 + 0.1 * config.training.init_seed - GAINS.get(config.method.name, 0.25)


def drawn_table_1(tmp_path, monkeypatch, loss):
    overrides = finish("table-1", tmp_path, loss)
    monkeypatch.setattr("functional_sam.exhibits.output.paper_directory", lambda: tmp_path / "paper")
    exhibit = exhibits.draw("table-1", overrides=overrides)
    return exhibit, (tmp_path / "paper" / "tables" / "table-1.md").read_text()


def test_table_1_is_a_view_of_the_runs_of_table_2_and_table_3(tmp_path, monkeypatch):
    theirs = []
    for name in ("table-2", "table-3"):
        theirs += exhibits.plan(name, overrides=finish(name, tmp_path, worse_sam))
    ours = exhibits.plan("table-1", overrides=(f"runtime.runs={tmp_path}",))
    assert {config.name for config in ours} == {config.name for config in theirs if config.method.name in TABLE_1}
    exhibit, text = drawn_table_1(tmp_path, monkeypatch, worse_sam)
    sizes = list(study_of(tmp_path).sizes)
    assert list(dict.fromkeys(zip(exhibit.frame.regime, exhibit.frame["size"], strict=True))) == [
        (regime, size) for regime in REGIMES for size in sizes
    ]
    rows = exhibit.frame.set_index("method")
    assert set(rows.index) == TABLE_1
    assert list(rows.loc["sam"].minus_adamw) == pytest.approx([0.5] * 4)
    assert list(rows.loc["functional-sam"].minus_sam) == pytest.approx([-0.75] * 4)
    assert set(rows.loc["sam"].verdict_adamw) == {"worse"}
    assert set(rows.loc["functional-sam"].verdict_adamw) == {"better"}
    for regime in REGIMES.values():
        for size in sizes:
            (row,) = (line for line in text.splitlines() if line.startswith(f"| {regime} | {size.removeprefix('language-')} |"))
            assert row.endswith("| +0.5000 +- 0.0000, worse | -0.2500 +- 0.0000, better | -0.7500 +- 0.0000, better | 3 |")
        assert f"{regime.capitalize()}: 0.006M (n=3) better: Functional-SAM; worse: SAM" in exhibit.verdict
        assert f"{regime.capitalize()}: Still at an end of the grid" in exhibit.caption  # equal losses are never interior
    assert "3.59" in text  # the published pair stands below ours


def test_table_1_says_whose_runs_diverged(tmp_path, monkeypatch):
    def of(config):
        lost = config.training.test and config.method.name == "sam" and config.training.init_seed == 1
        return None if lost else worse_sam(config)

    exhibit, text = drawn_table_1(tmp_path, monkeypatch, of)
    assert text.count("| diverged: SAM (1 of 3) | -0.2500 +- 0.0000, better | diverged: SAM (1 of 3) | 3 |") == 4
    assert "worse: SAM" in exhibit.verdict


def test_table_1_in_turn_begins_a_regime_when_the_one_before_is_complete(tmp_path, monkeypatch):
    content = study.read_yaml("studies", "language")
    content["scales"]["quick"] |= {"in_turn": True, "fixed_steps": 250}  # of no Chinchilla-style run
    monkeypatch.setattr(study, "read_yaml", lambda *_: copy.deepcopy(content))
    stages = []

    def of(config):
        stages.append((config.training.steps == content["scales"]["quick"]["fixed_steps"], config.task))
        return worse_sam(config)

    finish("table-1", tmp_path, of)
    sizes = list(study_of(tmp_path).sizes)
    assert list(dict.fromkeys(stages)) == [(fixed, size) for fixed in (True, False) for size in sizes]


def test_a_missing_run_stops_the_drawing_and_names_the_command(tmp_path):
    for name in ("figure-1", "table-1"):
        with pytest.raises(UserError, match=f"functional-sam run {name} --scale quick"):
            exhibits.draw(name, overrides=(f"runtime.runs={tmp_path}",))


def test_unknown_exhibit_and_scale():
    with pytest.raises(UserError, match="unknown exhibit 'figure-11'; did you mean 'figure-1'"):
        exhibits.plan("figure-11")
    with pytest.raises(UserError, match="unknown scale 'quik'"):
        exhibits.plan("figure-1", "quik")

"""Statistics by hand, plans that keep tuning apart from reporting, and exhibits that refuse to draw without their runs."""

import dataclasses
import math

import pytest

from functional_sam import exhibits
from functional_sam.errors import UserError
from functional_sam.exhibits.spec import load_spec
from functional_sam.exhibits.statistics import estimate, paired_difference, verdict
from functional_sam.records import Run


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


def test_pairing_removes_what_both_share():
    difference = paired_difference([1.1, 5.1, 9.1], [1.0, 5.0, 9.0])
    assert difference.mean == pytest.approx(0.1)
    assert difference.stderr == pytest.approx(0.0, abs=1e-12)


def record(config, loss):
    run = Run(config)
    run.directory.mkdir(parents=True, exist_ok=True)
    run.write("done.json", {"loss": loss, "test_loss": loss, "test_bits_per_byte": loss, "seconds": 1.0})
    run.write("provenance.json", {"commit": "c", "diff": "", "versions": {}, "data": {"data": "d", "sha256": "s"}})


def test_table_1_tunes_on_one_seed_and_reports_others(tmp_path, monkeypatch):
    overrides = (f"runtime.runs={tmp_path}",)
    tuning = exhibits.plan("table-1", overrides=overrides)
    spec = load_spec("table-1", "quick")
    assert {c.training.init_seed for c in tuning} == {spec.tuning_seed}
    assert not any(c.training.test for c in tuning)  # the test split is not read while tuning
    assert min(c.method.rho for c in tuning) < 0.1
    for config in tuning:  # the middle radius is best, except that SAM diverges at all but the smallest
        best = spec.rho[1]
        loss = abs(math.log(config.method.rho / best)) + 3
        record(config, None if config.method.name == "sam" and config.method.rho > spec.rho[0] else loss)
    both = exhibits.plan("table-1", overrides=overrides)
    reported = [c for c in both if c.training.test]
    assert {c.training.init_seed for c in reported} == set(spec.seeds)
    assert {c.method.rho for c in reported if c.method.name == "sam"} == {spec.rho[0]}
    assert {c.method.rho for c in reported if c.method.name == "functional-sam"} == {spec.rho[1]}
    for config in reported:  # same data order and steps for every method
        twin = next(c for c in reported if c.method.name == "adamw" and c.training.data_seed == config.training.data_seed)
        assert dataclasses.replace(config, method=twin.method) == twin

    for config in reported:
        record(config, 3.0 + config.training.init_seed + {"adamw": 0.0, "sam": 0.5}.get(config.method.name, -0.25))
    monkeypatch.setattr("functional_sam.exhibits.output.paper_directory", lambda: tmp_path / "paper")
    exhibit = exhibits.draw("table-1", overrides=overrides)
    rows = exhibit.frame.set_index("method")
    assert rows.loc["sam", "verdict"] == "worse"
    assert rows.loc["functional-sam", "verdict"] == "better"
    assert rows.loc["sam", "minus_adamw"] == pytest.approx(0.5)
    assert rows.loc["sam", "rho_at_edge"]
    text = (tmp_path / "paper" / "tables" / "table-1.md").read_text()
    assert "3.59" in text  # the published pair stands beside ours
    assert "edge of the grid for SAM" in text.replace("sam", "SAM")


def test_a_missing_run_stops_the_drawing_and_names_the_command(tmp_path):
    for name in ("figure-1", "table-1"):
        with pytest.raises(UserError, match=f"functional-sam run {name} --scale quick"):
            exhibits.draw(name, overrides=(f"runtime.runs={tmp_path}",))


def test_unknown_exhibit_and_scale():
    with pytest.raises(UserError, match="unknown exhibit 'figure-11'; did you mean 'figure-1'"):
        exhibits.plan("figure-11")
    with pytest.raises(UserError, match="unknown scale 'quik'"):
        exhibits.plan("figure-1", "quik")

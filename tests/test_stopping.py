"""Early stopping on repeated data: which runs are evaluated on the way, and what is said of their lowest losses."""

import json
import math

import pytest
from test_study import bowl, fill, record, study_of

from functional_sam.exhibits import stopping
from functional_sam.exhibits.comparison import comparison
from functional_sam.exhibits.study import Entry, cells, plan_cell, repeated
from functional_sam.files import write_text
from functional_sam.records import Run

ENTRIES = {"adamw": Entry(passes=1), "sam": Entry(), "functional-sam": Entry()}


def curve(config, losses):
    """The validation losses of a finished run at equal distances."""
    record(config, losses[-1])
    every = config.training.steps // len(losses)
    lines = [{"kind": "validation", "step": (i + 1) * every, "loss": loss} for i, loss in enumerate(losses)]
    write_text(Run(config).directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def planned(tmp_path):
    """A cell on repeated data with three methods: AdamW overfits, SAM ends best, Functional-SAM was best on the way."""
    study = study_of(tmp_path)
    fill(study, cells(study, "fixed", [study.middle])[0], bowl(), ENTRIES)
    cell = repeated(study)[-1]
    fill(study, cell, bowl(), ENTRIES)
    one = plan_cell(study, cell, ENTRIES)
    for name, configs in one.reported.items():
        for seed, config in enumerate(configs):
            luck = 0.01 * seed
            losses = {"adamw": [5.0, 4.0, 7.0], "sam": [5.0, 4.2, 4.1 + 0.001 * seed], "functional-sam": [5.0, 3.9, 4.3]}[name]
            curve(config, [loss + luck for loss in losses])
    return one


def test_reported_runs_on_repeated_data_alone_are_evaluated_on_the_way(tmp_path):
    study = study_of(tmp_path)
    (once,) = cells(study, "fixed", [study.middle])
    cell = repeated(study)[-1]
    for wanted in (once, cell):
        fill(study, wanted, bowl(), ENTRIES)
        one = plan_cell(study, wanted, ENTRIES)
        reported = {config.training.eval_every for configs in one.reported.values() for config in configs}
        assert reported == ({once.steps // study.evaluations} if wanted.unique_tokens else {0})
        assert {config.training.eval_every for config in one.tuning} == {0}


def test_lowest_loss_and_its_step(planned):
    steps = planned.cell.steps
    loss, step = stopping.lowest(planned.reported["adamw"][0])
    assert (loss, step) == (4.0, 2 * (steps // 3))
    diverged = planned.reported["sam"][0]
    write_text(Run(diverged).directory / "metrics.jsonl", "")
    assert stopping.lowest(diverged) == (math.inf, 0)


def test_differences_are_those_of_the_lowest_losses_paired_by_seed(planned):
    adamw, sam, functional = stopping.stopped(planned)
    assert adamw["stopped_loss"] == pytest.approx(4.01)
    assert adamw["stopped_verdict_adamw"] == ""
    n = len(planned.reported["sam"])
    assert sam["stopped_minus_adamw"] == pytest.approx(0.1 + 0.001 * (n - 1) / 2)
    assert sam["stopped_minus_adamw_stderr"] == pytest.approx(0.001 / math.sqrt(n))  # of 0, 0.001, 0.002
    assert sam["stopped_verdict_adamw"] == "worse"  # and better at the end
    assert functional["stopped_minus_sam"] == pytest.approx(-0.2 - 0.001 * (n - 1) / 2)
    assert functional["stopped_verdict_sam"] == "better"


def test_columns_join_the_comparison_row_by_row(planned):
    data = stopping.with_stopping(comparison([planned]), [planned])
    assert list(data.method) == list(ENTRIES)
    assert list(data.stopped_loss.round(6)) == [4.01, 4.111, 3.91]
    lines = stopping.markdown(data)
    assert "+0.1010 +- 0.0006" in lines[3]
    assert "worse" in lines[3]

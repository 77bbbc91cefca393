"""table-6 and figure-6 from made-up records: transfers and equal compute are compared, the diagnosis is ranked."""

import math

import pandas as pd
import pytest
from made_up import MadeUp

from functional_sam.exhibits import draw_plan, figure_6, planned, table_6
from functional_sam.exhibits.figure_6 import functional_share
from functional_sam.exhibits.output import paper_directory, write
from functional_sam.exhibits.published import gains
from functional_sam.study.design import load_study, trials
from functional_sam.study.tune import plan_cell
from functional_sam.tasks import TASKS

SHARES = {"question-type": 0.2, "movie-sentiment": 0.3, "lead-topic": 0.4, "sms-spam": 0.5, "movie-grade": 0.6}


class Records(MadeUp):
    """Runs whose metric is made up: what fine-tuning records beside it."""

    def summary(self, config):
        _, value = self.records[config.name]
        if value is None:
            return {"diverged": True, "error": "e", "loss": None}
        metric, unit = TASKS[config.kind].metric.name, TASKS[config.kind].unit
        value = 1 - value if metric == "loss" else value
        found = {"step": config.training.steps, "seconds": 2.0, unit: 100, "loss": 1 - value, metric: value}
        if config.training.test:
            found[f"test_{metric}"] = value
            found |= {f"test_{metric}_{name}": value / 2 for name in config.data.transfer}
        return found

    def read(self, config, file):
        found = super().read(config, file)
        if file == "provenance.json" and config.data.texts:
            found["data"]["texts"] = {"train": 1001, "validation": 100}
        return found

    def metrics(self, config, kind=None):
        if kind == "decompose":
            return [{"kind": kind, "step": 1, "gradient": {"share": SHARES[config.task] + 0.001 * config.training.init_seed}}]
        return [{"kind": "dose", "step": 1, "dose": 0.5}] if kind == "dose" and config.method.rho is not None else []


def value(config):
    """SAM gains the more, the larger a task's functional share; twice the steps gain .02; one method loses."""
    seed = config.training.init_seed
    gain = {"sam": 0.1 * SHARES.get(config.task, 0.2), "functional-sam": 0.01, "asam": -0.03}.get(config.method.name, 0.0)
    gain += 0.02 if config.training.steps in (60, 100) and config.method.name == "adamw" else 0.0
    gain -= 1e-3 * abs(math.log(max(config.optimizer.lr, 1e-9) / 2e-4))
    return 0.7 + gain + 0.05 * math.sin(seed) + 1e-4 * math.cos(7 * seed + len(config.method.name) + config.training.steps)


def complete(name, scale, overrides=()):
    source = Records(value)
    while source.do(planned(name, scale, overrides, source).configs):
        pass
    return source


@pytest.mark.parametrize("scale", ["quick", "laptop"])
def test_table_6_compares_at_equal_steps_at_equal_compute_and_elsewhere(scale, tmp_path):
    source = complete("table-6", scale)
    exhibit = draw_plan(planned("table-6", scale, source=source))
    data = exhibit.frame
    assert not data.duplicated(["cell", "tested_on", "entry"]).any()
    home = data[(data.tested_on == "movie-grade")].set_index("entry")
    assert home.minus_baseline["sam"] == pytest.approx(0.06, abs=2e-3)
    assert home.minus_double["sam"] == pytest.approx(0.04, abs=2e-3)
    assert (home.verdict_baseline["sam"], home.verdict_double["sam"], home.verdict_baseline["asam"]) == (
        "better",
        "better",
        "worse",
    )
    assert home.verdict_double["functional-sam"] == "worse"
    assert home.verdict_double["adamw-double"] == home.verdict_baseline["adamw"] == ""
    away = data[data.tested_on == "tweet-grade"].set_index("entry")
    assert away.minus_baseline["sam"] == pytest.approx(0.03, abs=2e-3)
    assert away.transfer.all()
    others = {"amazon-grade", "nyt-grade", "tweet-grade", "technical"}
    assert set(data[data.transfer].tested_on) == others
    assert "+1.57" in exhibit.markdown
    assert "Not shown" not in exhibit.caption
    assert "(AdamW: amazon-grade" in exhibit.markdown
    taken = data[~data.transfer & (data.metric == "spearman")]
    assert set(taken.unique_units) == {50}  # 5 % of 1,001 texts, whatever the run holds of them
    assert {file.suffix for file in write(exhibit, tmp_path)} == {".md", ".csv", ".json"}


def test_the_language_model_is_judged_by_its_loss_and_counts_as_transfer_alone():
    source = complete("table-6", "quick")
    exhibit = draw_plan(planned("table-6", "quick", source=source))
    own = exhibit.frame[exhibit.frame.metric == "loss"]
    there = own[own.tested_on == "technical"].set_index("entry")
    assert list(there.index) == load_study("finetune", "quick").cells["transfer-language"].entries
    assert there.transfer.all()
    assert there.minus_baseline["sam"] == pytest.approx(-0.01, abs=2e-3)  # half of its gain at home, and a loss
    assert there.verdict_baseline["sam"] == "better"
    assert set(own[~own.transfer].tested_on) == {"news"}
    home = exhibit.frame[~exhibit.frame.transfer & (exhibit.frame.entry == "sam")]
    assert list(home.metric) == ["spearman", "loss"]
    tram = exhibit.frame[exhibit.frame.transfer & exhibit.frame.entry.str.startswith("tram")]
    claimed = ["better", *tram.verdict_baseline]  # SAM on movie grades (a model from scratch is not fine-tuned), TRAM elsewhere
    assert exhibit.answer == f"holds in {claimed.count('better')} of {len(claimed)}"
    assert len(claimed) > 2
    assert "**news**" in exhibit.markdown
    assert "tested without training on technical" in exhibit.markdown
    lost = next(c for c in planned("table-6", "quick", source=source).configs if c.training.test and c.kind == "language")
    source.records[lost.name] = (lost, None)
    assert [table_6.tested_on([lost], source, on) for on in ("news", "technical")] == [[math.inf]] * 2


def test_the_headline_counts_what_is_better_because_adamw_diverged():
    row = {"entry": "sam", "transfer": False, "verdict_baseline": "better (the other diverged)"}
    data = pd.DataFrame([row, row | {"verdict_baseline": "inconclusive"}, row | {"transfer": True, "verdict_baseline": "better"}])
    assert table_6.headline(data) == "better than AdamW: 1 of 2 at home, 1 of 1 on other domains"


def test_adafactor_is_the_baseline_of_t5_and_each_model_has_its_own():
    cells = ("cells=super-glue-rte,t5-small-rte,t5-base-rte,t5-small-multirc",)
    source = complete("table-6", "paper", cells)
    exhibit = draw_plan(planned("table-6", "paper", cells, source))
    data = exhibit.frame
    assert len(data) == 8 + 3 * 4
    t5 = data[data.task.str.startswith("t5")]
    assert list(t5.groupby("task", sort=False).entry.first()) == ["adafactor"] * 3
    assert t5[t5.entry == "sam"].minus_double.notna().all()
    assert dict(zip(t5.task, t5.metric, strict=True))["t5-small-multirc"] == "f1a"
    for words in (
        "minus Adafactor, verdict",
        "minus AdamW, verdict",
        "(t5-base-superglue)",
        "(roberta-glue)",
        "F1 over all answers",
    ):
        assert words in exhibit.markdown


def test_a_divergence_is_infinitely_bad_at_home_and_away():
    source = complete("table-6", "quick")
    config = next(c for c in planned("table-6", "quick", source=source).configs if c.training.test and c.method.name == "tram")
    source.records[config.name] = (config, None)
    assert [table_6.tested_on([config], source, on) for on in ("movie-grade", "nyt-grade")] == [[-math.inf]] * 2
    data = draw_plan(planned("table-6", "quick", source=source)).frame
    assert set(data[(data.entry == "tram") & (data.task == "movie-grade")].verdict_baseline) == {"worse (diverged)"}


def test_a_dose_of_nothing_is_said_to_be_no_comparison():
    data = pd.DataFrame(
        [
            {"entry": "tram", "label": "", "task": "movie-grade", "rho": 0.05, "dose": 8e-6},
            {"entry": "tram", "label": "", "task": "news", "rho": 0.05, "dose": 0.02},
            {"entry": "sam", "label": "", "task": "movie-grade", "rho": 0.05, "dose": 0.3},
            {"entry": "adamw", "label": "", "task": "movie-grade", "rho": math.nan, "dose": 0.0},
        ]
    )
    assert table_6._idle(data) == " Of so small a dose (below 0.0001) that nothing is said of the method: TRAM on movie-grade."
    assert table_6._idle(data[1:]) == ""


def test_figure_6_says_which_cells_are_missing():
    source = complete("figure-6", "quick")
    cell = load_study("finetune", "quick").cells["question-type-20"]
    gone = {config.name for config in plan_cell(load_study("finetune", "quick"), cell, source).configs}
    source.records = {name: record for name, record in source.records.items() if name not in gone}
    exhibit = draw_plan(planned("figure-6", "quick", source=source))
    assert "Not shown, their runs are not complete: question-type-20; verdicts are so far." in exhibit.caption


@pytest.mark.parametrize("scale", ["quick", "laptop"])
def test_figure_6_ranks_tasks_by_the_share(scale, tmp_path):
    source = complete("figure-6", scale)
    plan = planned("figure-6", scale, source=source)
    exhibit = draw_plan(plan)
    assert set(exhibit.frame.cell) == {cell.name for cell in load_study("finetune", scale).part("tasks", "share")}
    found = exhibit.frames["ranks"].set_index("entry").correlation
    assert (found["sam"] > 0.99).all() if scale == "laptop" else found["sam"] > 0.99
    assert len(set(exhibit.frame.data_share)) == 3
    share = exhibit.frame[exhibit.frame.task == "sms-spam"].share.iloc[0]
    configs = plan.content[1]["sms-spam"]
    assert share == pytest.approx(sum(functional_share(source, config) for config in configs) / len(configs))
    assert all(config.optimizer.lr == 0.0 and config.training.steps == 1 for config in configs)  # nothing has moved
    assert "rank correlation" in exhibit.headline
    assert {file.suffix for file in write(exhibit, tmp_path)} == {".pdf", ".png", ".csv", ".json"}


def test_published_gains_are_differences_of_published_numbers():
    found = {group.title: group for group in gains(paper_directory() / "numbers.csv") if group.method == "sam"}
    five = dict(found["SuperGLUE with 5 % of the data, T5.1.1 (Bahri 2022)"].values)
    assert five == {"small": 1.7, "base": 3.8, "large": 1.5, "xl": 1.1}
    assert dict(found["GLUE, RoBERTa-base (Kaddour 2022)"].values)["sst"] == -0.23
    tram = next(group for group in gains(paper_directory() / "numbers.csv") if group.method == "tram")
    assert tram.transfer
    assert dict(tram.values) == {"low": 2.1, "high": 2.3}


def test_every_entry_has_as_many_trials_and_learning_rates_stay_where_they_were_published():
    for scale in ("quick", "laptop", "paper"):
        study = load_study("finetune", scale)
        for cell in study.cells.values():
            assert not cell.choose or len({len(trials(study, cell, name, 1e-4)) for name in cell.entries}) == 1
            if cell.lr and not cell.task.startswith(("language", "t5")):
                assert max(cell.lr) <= 2e-4


@pytest.mark.parametrize("part", ["tasks", "share"])
def test_figure_6_is_drawn_of_one_part_alone(part, tmp_path):
    """As its cells are done one after the other: each part may be the first."""
    cells = [cell.name for cell in load_study("finetune", "quick").part(part)]
    cells = [name for name in cells if part != "share" or "question-type" in name]
    overrides = (f"cells={','.join(cells)}",)
    source = complete("figure-6", "quick", overrides)
    exhibit = draw_plan(planned("figure-6", "quick", overrides, source))
    assert write(exhibit, tmp_path)
    assert ("SAM minus AdamW" in exhibit.headline) == (part == "share")
    assert ("rank correlation" in exhibit.headline) == (part == "tasks")
    assert ("by task" in exhibit.caption) == (part == "tasks")
    assert "nan" not in exhibit.caption


def test_figure_6_shows_a_single_task_by_its_data_alone_and_names_the_radius_of_a_verdict():
    """As the laptop study is run: the shares of one task are complete first."""
    overrides = ("cells=question-type,question-type-20,question-type-100",)
    source = complete("figure-6", "laptop", overrides)
    exhibit = draw_plan(planned("figure-6", "laptop", overrides, source))
    assert len(exhibit.figure.axes) == 1
    assert "functional share" not in exhibit.caption
    assert "ranks" not in exhibit.frames
    assert "rank correlation" not in exhibit.headline + exhibit.caption.lower()
    assert exhibit.headline.startswith("SAM at rho 0.05 minus AdamW ")
    assert "SAM at rho 0.05" in exhibit.caption
    assert "SAM at rho 0.15" in exhibit.caption


def test_figure_6_has_no_correlation_of_one_task_and_no_answer_without_a_mean():
    row = {"entry": "sam", "rho": 0.05, "share": 0.2, "minus_baseline": 0.01, "minus_baseline_stderr": 0.001, "n": 3}
    data = pd.DataFrame([row | {"part": "tasks", "task": "question-type", "data_share": 0.05}])
    assert figure_6.headline(data) == "rank correlation of gain and functional share: SAM none"
    ends = [row | {"part": "share", "task": "t", "data_share": share} for share in (0.01, 0.2)]
    assert figure_6._little_against_much(pd.DataFrame(ends).assign(minus_baseline=[0.1, 0.0])) == "better"
    lost = pd.DataFrame(ends).assign(minus_baseline=[-math.inf, -math.inf], minus_baseline_stderr=math.nan)
    assert figure_6._little_against_much(lost) == "inconclusive"

"""table-7 from made-up records: what is compared with what, one family of losses, the published signs, the words."""

import dataclasses
import math

import pytest
from made_up import MadeUp, bowl

from functional_sam.errors import UserError
from functional_sam.exhibits import draw_plan, module_of, planned, table_7
from functional_sam.exhibits.output import as_written
from functional_sam.exhibits.words import answer
from functional_sam.study.compare import Estimate, Verdict, holm, paired_difference
from functional_sam.study.design import Trial, load_study
from functional_sam.study.report import difference
from functional_sam.study.tune import plan_cell


class Translated(MadeUp):
    """With scores of translations: the lower the loss, the better; ASAM translates worst."""

    def summary(self, config):
        found = super().summary(config)
        if found.get("diverged") or not config.training.test:
            return found | {"pairs": 50}
        for prefix in ("test_", *(["test_best_"] if config.training.test_best else [])):
            bleu = 20 - 2 * found[f"{prefix}loss"] - (1.0 if config.method.name == "asam" else 0.0)
            found |= {f"{prefix}bleu": bleu, f"{prefix}chrf": 2 * bleu}
        return found | {"pairs": 50}


def loss(config):
    """SAM is worse than AdamW, twice the steps better than all, Precond SAM at its larger radius diverges."""
    value = bowl(best_lr=0.004)(config)
    if config.method.name == "sam":
        value += 0.3
    if config.method.name == "precond-sam" and config.training.test:
        return None
    longer = config.training.steps in (400, 1600) and config.method.name == "adamw"
    return value - (0.5 + 0.001 * math.cos(config.training.init_seed) if longer else 0.0)


def drawn(scale, of=loss):
    source, study = Translated(of), load_study("translation", scale)
    for cell in study.cells.values():
        while source.do(plan_cell(study, cell, source).configs):
            pass
    return draw_plan(planned("table-7", scale, source=source)), source


@pytest.fixture(scope="module")
def quick():
    return drawn("quick")


def test_each_method_meets_adamw_and_adamw_with_twice_the_steps(quick):
    exhibit, source = quick
    data = exhibit.frame.set_index("entry")
    assert list(data.index)[:3] == ["adamw", "adamw-double", "placebo"]
    assert math.isnan(data.minus_double["placebo"])
    assert data.verdict_baseline["placebo"] == ""
    assert "jittered by 1e-6: +0.000 \N{PLUS-MINUS SIGN} 0.000" in exhibit.caption
    data = data.drop("placebo")
    assert data.steps["adamw-double"] == 2 * data.steps["adamw"] == 2 * data.steps["sam"]
    assert data.trials.nunique() == 1
    assert math.isnan(data.minus_baseline["adamw"])
    assert math.isnan(data.minus_double["adamw"])
    assert math.isnan(data.minus_double["adamw-double"])
    for entry in ("sam", "asam", "functional-sam"):
        twice = data.minus_baseline[entry] - data.minus_baseline["adamw-double"]
        assert data.minus_double[entry] == pytest.approx(twice, abs=1e-12)
    one = exhibit.plan.content[0]
    runs = {name: configs for (name, _), configs in one.reported.items()}
    scores = {name: [source.summary(config)["test_bleu"] for config in runs[name]] for name in ("asam", "adamw")}
    assert data.minus_bleu["asam"] == pytest.approx(paired_difference(scores["asam"], scores["adamw"]).mean)
    assert data.chrf["asam"] == pytest.approx(2 * data.bleu["asam"])
    assert data.bleu["precond-sam"] == 0  # it diverged
    assert data.verdict_baseline["precond-sam"] == "worse (diverged)"


def test_losses_are_one_family(quick):
    data = quick[0].frame[quick[0].frame.entry != "placebo"]
    rows = [data.iloc[i] for i in range(len(data))]
    found = [difference(row, other) for other in ("baseline", "double") for row in rows]
    words = [row[f"verdict_{other}"] for other in ("baseline", "double") for row in rows]
    tested = [i for i, one in enumerate(found) if one.n and math.isfinite(one.mean)]
    assert len(tested) == 5 + 4  # of 6 and 5, Precond SAM has diverged
    for i, p in zip(tested, holm([found[i].p for i in tested]), strict=True):
        assert (words[i] in ("better", "worse")) == (p < 0.05), (i, p)
    assert {"better", "worse"} <= set(words)


def test_a_cell_that_chooses_nothing_is_refused(quick):
    """Of several trials of an entry the last one's scores were shown beside the loss of each."""
    one = quick[0].plan.content[0]
    (name, trial), configs = next(item for item in one.reported.items() if item[0][0] == "sam")
    again = Trial((*trial.values, ("method.rho", 9.0)))
    several = dataclasses.replace(one, reported=one.reported | {(name, again): configs})
    with pytest.raises(UserError, match=r"bible-ja-en .* several trials of sam"):
        table_7._cell(several, quick[1])


def test_words_and_signs(quick):
    exhibit, _ = quick
    page = exhibit.page
    header = next(line for line in page.splitlines() if line.startswith("| method"))
    assert header.count("|") - 1 <= 9
    assert "| SAM | +0.18 | \N{MINUS SIGN}0.08 |" in page  # validation, test
    assert "| ASAM | +0.32 | +0.16 | below |" in page
    assert "worse: SAM" in exhibit.caption
    assert exhibit.answer == answer(exhibit.frame.query("entry == 'asam'").verdict_baseline, Verdict.BETTER)
    assert "at equal compute" in exhibit.caption
    assert "too little to judge by" not in exhibit.caption  # the made-up BLEU is 10
    assert "Japanese to English" in exhibit.caption
    assert "label smoothing 0.1" in exhibit.caption
    text = module_of("table-7").headline(as_written(exhibit.frame))
    assert text == exhibit.headline
    assert "at equal steps" in text


def test_a_table_a_cell_at_laptop_scale():
    exhibit, _ = drawn("laptop")
    assert [line for line in exhibit.page.splitlines() if line.startswith("**debian")] == [
        "**debian-de-en**",
        "**debian-de-en-800**",
        "**debian-it-en**",
    ]
    data = exhibit.frame[exhibit.frame.cell == "debian-de-en-800"]
    assert set(data.units / data.unique_units) == {16, 32}  # AdamW with twice the steps meets the same pairs twice as often
    assert set(exhibit.frame.n) == {5}
    assert "Italian to English" in exhibit.caption


def test_pairs_that_do_not_fit_are_not_counted_as_met():
    class Long(Translated):
        """With 2,000 pairs to train on, of which 1,000 fit; AdamW at quick meets 1,600, with twice the steps 3,200."""

        def read(self, config, file):
            found = super().read(config, file)
            return {**found, "data": {**found["data"], "pairs": {"train": 2000}, "fitting": {"train": 1000}}}

    source, study = Long(loss), load_study("translation", "quick")
    cell = study.cells["bible-ja-en"]
    while source.do(plan_cell(study, cell, source).configs):
        pass
    assert set(draw_plan(planned("table-7", "quick", source=source)).frame.unique_units) == {1000}


def test_a_comparison_without_a_mean_stays_in_the_family():
    """SAM diverged at one seed, AdamW with twice the steps at another."""
    first = min(load_study("translation", "quick").cells["bible-ja-en"].seeds)

    def diverging(config):
        name, seed = config.method.name, config.training.init_seed - first
        longer = name == "adamw" and config.training.steps == 400
        return None if config.training.test and ((name == "sam" and seed == 0) or (longer and seed == 1)) else loss(config)

    row = drawn("quick", diverging)[0].frame.set_index("entry").loc["sam"]
    assert math.isnan(row.minus_double)
    assert row.verdict_double == "inconclusive"
    assert row.verdict_baseline == "worse (diverged)"


def test_a_score_of_zero_everywhere_is_no_sign():
    assert table_7._sign(Estimate(0.0, 0.0, 3)) == "not significant"
    assert table_7._sign(Estimate(-1.0, 0.1, 3)) == "below"
    assert table_7._sign(Estimate(1.0, 0.1, 3)) == "above"

"""The exhibits of the language study, drawn from made-up records: every cell appears, words follow the verdicts."""

import dataclasses
import functools
import math

import pandas as pd
import pytest
from made_up import MadeUp, bowl

from functional_sam.errors import UserError
from functional_sam.exhibits import draw_plan, figure_3, figure_7, figure_11, foreseen, module_of, planned
from functional_sam.exhibits.comparison import changed, differences, same_runs, seen, to_come
from functional_sam.exhibits.figure_3 import DOSE_AT_FIRST, judged_paths, path_alone
from functional_sam.exhibits.markdown import MINUS
from functional_sam.exhibits.output import write
from functional_sam.exhibits.spec import load_spec
from functional_sam.exhibits.words import answer, so_far, tally
from functional_sam.study.compare import Estimate, Verdict, judged
from functional_sam.study.design import load_study
from functional_sam.study.report import judge
from functional_sam.study.tune import plan_cell

EXHIBITS = ("figure-3", "figure-5", "figure-7", "figure-11", "table-1", "table-2", "table-3", "table-8")


@pytest.fixture(scope="module")
def complete():
    """All runs of the quick study, done: functional methods a little better than SAM, SAM worse than AdamW at large radii."""

    def loss(config):
        value = bowl()(config)
        if config.method.rho is not None and "functional" not in config.method.name:
            value += 0.5 * config.method.rho
        return None if config.method.rho == 0.5 and config.method.name == "precond-sam" and not config.data.unique_tokens else value

    source, study = MadeUp(loss), load_study("language", "quick")
    for cell in study.cells.values():
        while source.do(plan_cell(study, cell, source).configs):
            pass
    return source


@functools.lru_cache(maxsize=16)
def drawn(name, source):
    """Of one source once: no test changes what it is given."""
    plan = planned(name, "quick", source=source)
    return draw_plan(plan)


def shown_cells(name, study):
    """Those of the exhibit's parts that it has a place for."""
    has_a_place = getattr(module_of(name), "has_a_place", lambda *_: True)
    return [cell for cell in study.part(*load_spec(name, study.scale).parts) if has_a_place(study, cell)]


@pytest.mark.parametrize("name", EXHIBITS)
def test_every_cell_is_drawn(name, complete, tmp_path):
    exhibit = drawn(name, complete)
    plan = exhibit.plan
    assert plan.drawable
    assert not plan.missing
    study = load_study("language", "quick")
    wanted = {cell.name for cell in shown_cells(name, study)}
    assert {one.cell.name for one in plan.content} == wanted
    assert "Not shown" not in exhibit.caption
    files = write(exhibit, tmp_path)
    assert all(file.stat().st_size > 0 for file in files)
    assert {file.suffix for file in files} >= ({".pdf", ".png"} if name.startswith("figure") else {".md"}) | {".csv", ".json"}
    numbers = pd.read_csv(next(file for file in files if file.suffix == ".csv"))
    assert set(numbers.cell) <= wanted if "cell" in numbers else len(numbers)


@pytest.mark.parametrize("name", EXHIBITS)
def test_what_is_not_complete_is_named_and_the_rest_drawn(name, complete):
    study = load_study("language", "quick")
    cells = shown_cells(name, study)
    runs = {cell.name: {config.name for config in plan_cell(study, cell, complete).configs} for cell in cells}

    def of_others(cell):
        return set().union(*(names for other, names in runs.items() if other != cell))

    last = next(cell for cell in reversed(runs) if runs[cell] - of_others(cell))  # with runs of its own
    source = MadeUp(complete.loss)
    source.records = {key: value for key, value in complete.records.items() if key not in runs[last] - of_others(last)}
    plan = planned(name, "quick", source=source)
    assert plan.drawable == (len(cells) > 1)
    assert {one.cell.name for one in plan.content} == set(runs) - {last}
    if plan.drawable:
        assert last in module_of(name).draw(plan).caption


@functools.lru_cache(maxsize=1)
def shifted(complete):
    """The same with clear verdicts: SAM is much worse, preconditioned Functional-SAM much better; nothing else is chosen."""
    more = {"sam": 0.3, "precond-functional-sam": -0.3}
    source = MadeUp(lambda config: complete.loss(config) + more.get(config.method.name, 0.0))
    source.records = {
        name: (config, None if loss is None else loss + more.get(config.method.name, 0.0))
        for name, (config, loss) in complete.records.items()
    }
    return source


def tuned_once(exhibit):
    """Of cells with the same runs the first one's."""
    data = exhibit.frame[~exhibit.frame.cell.isin(same_runs(exhibit.plan.content))]
    return data[data.part.isin(["fixed", "chinchilla"]) & data.entry.eq("precond-functional-sam")].verdict_baseline


def hard_for_sam(exhibit):
    """Of the changes that the protocol calls hard."""
    hard = [("rounding", 3), ("rounding", 4), ("noise", 0.1), ("noise", 0.2), ("forgetting", 200)]
    return [row.verdict for row in exhibit.frame.itertuples() if row.entry == "sam" and (row.kind, row.level) in hard]


ASKED = {  # exhibit -> the verdicts that its claim is about, and what it claims
    "figure-3": (lambda exhibit: exhibit.frames["path"].query("at_equal == 'rho'").verdict, Verdict.BETTER),
    "figure-5": (tuned_once, Verdict.BETTER),
    "figure-7": (lambda exhibit: exhibit.frame.verdict_compute, Verdict.WORSE),
    "figure-11": (hard_for_sam, Verdict.BETTER),
    "table-1": (lambda exhibit: exhibit.frame.query("entry == 'sam'").verdict_baseline, Verdict.WORSE),
    "table-2": (
        lambda exhibit: exhibit.frame.query("entry in ('precond-sam', 'precond-functional-sam')").verdict_sam,
        Verdict.BETTER,
    ),
    "table-8": (lambda exhibit: exhibit.frame.query("entry == 'sam' and part == 'equal compute'").verdict_baseline, Verdict.WORSE),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_answer_has_the_rows_and_the_sign_of_the_claim(name, complete):
    """README's verdict: it is neither that of other rows nor of the other sign."""
    rows, wanted = ASKED[name]
    exhibit = drawn(name, shifted(complete) if name in ("figure-5", "table-1", "table-8") else complete)
    assert exhibit.answer == answer(rows(exhibit), wanted)
    assert exhibit.answer != answer(rows(exhibit), Verdict.WORSE if wanted is Verdict.BETTER else Verdict.BETTER)


def test_what_would_have_been_seen_is_said_of_the_inconclusive_alone():
    verdicts = ["inconclusive", "better", "inconclusive", "no difference", "inconclusive", ""]
    data = pd.DataFrame({"verdict_sam": verdicts, "detectable_sam": [0.02, 0.5, 0.11, 0.001, math.inf, math.nan]})
    assert "inconclusive, an effect of 0.02 to 0.11 would have been seen in 4 of 5" in seen(data, "sam")
    assert "an effect of 2 to 11 points would" in seen(data, "sam", 100, "points")
    assert seen(data[1:2], "sam") == ""


def test_verdicts_without_some_cells_are_so_far(complete):
    """Those that more comparisons, as many as the missing cells add, could leave open are named; and the answer is marked."""
    study, name = load_study("language", "quick"), "figure-5"
    first, *others = study.part(*load_spec(name, "quick").parts)
    source = MadeUp(complete.loss)
    source.records = {config.name: complete.records[config.name] for config in plan_cell(study, first, complete).configs}
    exhibit, whole = drawn(name, source), drawn(name, complete)
    assert set(exhibit.plan.left) == {cell.name for cell in others} - {one.cell.name for one in exhibit.plan.content}
    own = whole.frame[~whole.frame.cell.isin(same_runs(whole.plan.content))]  # one comparison is one, in whichever regime
    added = own.verdict_baseline.ne("").sum() - exhibit.frame.verdict_baseline.ne("").sum()
    most = to_come(exhibit.plan)
    assert most >= added > 0
    assert f"Were their comparisons with AdamW null, at most {most}, " in exhibit.caption
    assert exhibit.answer.endswith(" so far") == (exhibit.answer not in ("inconclusive", "not tested"))
    again = judge(exhibit.frame, study.margin, more=most).verdict_baseline
    lost = sum(a != b for a, b in zip(again, exhibit.frame.verdict_baseline, strict=True))
    assert ("change no verdict" in exhibit.caption) == (lost == 0)


def test_an_answer_is_so_far_where_cells_are_missing(complete):
    plan = planned("figure-3", "quick", source=complete)
    assert so_far("holds in 2 of 3", plan) == "holds in 2 of 3"
    without = dataclasses.replace(plan, left=("a-cell",), growing=True)
    assert [so_far(said, without) for said in ("holds", "not seen", "inconclusive", "not tested", "")] == [
        "holds so far",
        "not seen so far",
        "inconclusive",
        "not tested",
        "",
    ]


def test_cells_that_were_not_asked_for_are_missing_too(complete):
    """cells=NAME on the command line: the exhibit is drawn of that cell alone, and says so."""
    cells = [cell.name for cell in load_study("language", "quick").part(*load_spec("figure-5", "quick").parts)]
    exhibit = draw_plan(planned("figure-5", "quick", (f"cells={cells[0]}",), complete))
    assert {one.cell.name for one in exhibit.plan.content} == {cells[0]}
    assert set(exhibit.plan.left) == set(cells[1:])
    assert f"Not shown, their runs are not complete: {cells[1]}" in exhibit.caption


def test_verdicts_that_more_comparisons_change_are_named_with_what_becomes_of_them():
    before, after = ["worse", "worse", "better"], ["inconclusive", "no difference", "better"]
    assert changed(["A", "B", "C"], before, after) == "leave open A, B (no difference)"
    assert changed(["A"], ["worse"], ["worse"]) == "change no verdict"


def test_the_path_alone_says_what_cells_to_come_could_leave_open(complete):
    exhibit = drawn("figure-3", complete)
    (cell,) = (one.cell for one in exhibit.plan.content)
    study = dataclasses.replace(
        exhibit.plan.content[0].study, cells={cell.name: cell, "next": dataclasses.replace(cell, name="next")}
    )
    content = [dataclasses.replace(exhibit.plan.content[0], study=study)]
    plan = dataclasses.replace(exhibit.plan, content=content, left=("next",), growing=True)
    caption = draw_plan(plan).caption
    assert f"as many as {4 * len(cell.rho)} more null comparisons would " in caption


def test_figure_7_judges_all_that_it_shows_in_one_family(complete):
    """Of both sides; AdamW's longer runs, which it does not show, are not counted."""
    exhibit = drawn("figure-7", complete)
    data, margin = exhibit.frame, exhibit.plan.content[0].study.margin
    sides = [("equal_steps", "verdict"), ("equal_compute", "verdict_compute")]
    shown = [
        (getattr(row, key), getattr(row, f"{key}_stderr"), row.n, getattr(row, word))
        for key, word in sides
        for row in data.itertuples()
    ]
    shown = [one for one in shown if not math.isnan(one[0])]
    assert len(shown) > len(data)
    assert [str(word) for word in judged([Estimate(*one[:3]) for one in shown], margin=margin)] == [one[3] for one in shown]


@pytest.mark.parametrize("part", ["variants", "compute"])
def test_figure_7_refuses_an_entry_that_two_cells_report(complete, part):
    """SAM of fixed length, and again beside the variants or at equal compute: it has one row, and would have two values."""
    plan = planned("figure-7", "quick", source=complete)
    fixed = next(one for one in plan.content if one.cell.part == "fixed")
    (sam,) = [item for item in fixed.reported.items() if item[0][0] == "sam"]
    content = [
        dataclasses.replace(one, reported=one.reported | dict([sam])) if one.cell.part == part else one for one in plan.content
    ]
    cells = {one.cell.part: one.cell.name for one in content}
    with pytest.raises(UserError, match=f"figure-7: sam is reported 2 times .*{cells[part]}"):
        figure_7.forest(dataclasses.replace(plan, content=content), 0.005)


def test_divergence_is_marked_and_counted(complete):
    exhibit = drawn("figure-3", complete)
    seeds = exhibit.frames["seeds"]
    lost = seeds[(seeds.entry == "precond-sam") & (seeds.rho == 0.5)]
    assert lost.diverged.all()
    assert (lost.minus_baseline == math.inf).all()
    data = exhibit.frame
    assert set(data[(data.entry == "precond-sam") & (data.rho == 0.5)].verdict_baseline) == {str(Verdict.LOST)}


def test_the_path_alone_at_equal_rho_and_at_equal_dose():
    """SAM's loss is 2 dose, its dose 4 rho; the functional path's 2 dose + 1 at dose rho: at equal dose 1 worse.

    What was called the dose at first is twice the dose of the functional path: there its loss is that of half the dose.
    """
    rows = []
    for entry, slope, more, first in (("sam", 4.0, 0.0, 1.0), ("functional-sam", 1.0, 1.0, 2.0)):
        for rho in (0.01, 0.1, 1.0):
            for seed in range(4):
                dose = slope * rho
                test = 2 * dose + more + 0.001 * math.sin(seed + 3 * rho)
                row = {"cell": "c", "entry": entry, "rho": rho, "seed": seed, "test": test, "minus_baseline": test - 0.001 * seed}
                rows.append(row | {"dose": dose, "dose_at_measured_steps": first * dose})
    found = judged_paths(path_alone(pd.DataFrame(rows)), 0.005)
    equal_rho = found[found.at_equal == "rho"]
    assert list(equal_rho.rho) == [0.01, 0.1, 1.0]
    assert list(equal_rho.difference) == pytest.approx([1 - 6 * rho for rho in (0.01, 0.1, 1.0)], abs=0.01)
    equal_dose = found[found.at_equal == "dose"]
    assert list(equal_dose.rho) == [0.01, 0.1, 1.0]  # below SAM's smallest dose it is between AdamW, whose loss is 0, and that
    assert list(equal_dose.difference) == pytest.approx([1.0, 1.0, 1.0], abs=0.01)
    assert set(equal_dose.verdict) == {str(Verdict.WORSE)}
    at_first = found[found.at_equal == DOSE_AT_FIRST]
    assert list(at_first.rho) == [0.1, 1.0]  # at 0.01 SAM has no dose so small
    assert list(at_first.difference) == pytest.approx([1 - 2 * rho for rho in (0.1, 1.0)], abs=0.01)
    assert list(at_first.dose) == pytest.approx([0.2, 2.0])


def test_the_path_alone_pairs_seeds_and_not_places():
    """SAM lacks seed 0 and has seed 4: nothing at equal rho. Of the same seeds in another order each has its own twin."""
    own = [{"entry": "functional-sam", "seed": seed, "test": 3.0 + seed} for seed in range(4)]
    theirs = [{"entry": "sam", "seed": seed, "test": 2.0 + seed} for seed in (3, 1, 2, 0)]
    rest = {"cell": "c", "rho": 0.1, "minus_baseline": 0.0, "dose": 0.1, "dose_at_measured_steps": 0.1}
    found = path_alone(pd.DataFrame([row | rest for row in own + theirs]))
    assert [(row["difference"], row["n"]) for row in found if row["at_equal"] == "rho"] == [(1.0, 4)]
    others = [{**row, "seed": row["seed"] or 4} for row in theirs]
    assert path_alone(pd.DataFrame([row | rest for row in own + others])) == []


def test_what_is_described_at_equal_dose_is_not_of_the_family():
    """Another verdict of it moves none of the others; its own is the one that it would have in the place of those at equal dose."""
    one = {"entry": "functional-sam", "other": "sam", "stderr": 0.01, "n": 5}
    kinds = ("rho", "rho", "dose", DOSE_AT_FIRST, DOSE_AT_FIRST, DOSE_AT_FIRST)
    rows = [
        one | {"at_equal": kind, "difference": d} for kind, d in zip(kinds, (-0.05, 0.0, -0.042, -0.042, 0.0, 0.0), strict=True)
    ]
    alone = judged_paths([row for row in rows if row["at_equal"] != DOSE_AT_FIRST], 0.001)
    both = judged_paths(rows, 0.001)
    assert list(both.verdict[:3]) == list(alone.verdict) == ["better", "inconclusive", "better"]
    assert list(both.verdict[3:]) == ["inconclusive"] * 3  # of five, not of three


def test_equal_compute_neither_runs_nor_waits_for_sizes_that_it_does_not_show(complete):
    """Of the cells of fixed length one has the setting of equal compute; runs of 1.2B parameters are table-2's alone."""
    for name in ("figure-7", "table-8"):
        assert {config.task for config in foreseen(name, "paper")} == {"language-42.5M"}
        plan = planned(name, "quick", source=complete)
        fixed = [one.cell.name for one in plan.content if one.cell.part == "fixed"]
        assert (fixed, plan.left) == (["fixed-0.014M"], ())
    waiting = planned("table-8", "laptop", source=MadeUp(bowl())).left
    assert "fixed-4-0.055M" in waiting
    assert not [name for name in waiting if name.startswith("fixed") and name != "fixed-4-0.055M"]


def test_equal_compute_pairs_with_the_baseline_that_takes_as_long(complete):
    exhibit = drawn("table-8", complete)
    compute = exhibit.frame.part == "equal compute"
    at_compute, at_steps = (tally(own.verdict_baseline) for own in (exhibit.frame[compute], exhibit.frame[~compute]))
    assert exhibit.headline.endswith(f" nats (all methods: {at_compute}); at equal steps {at_steps}")
    data = exhibit.frame[compute].set_index("entry")
    assert data.matched["looksam"] == "adamw-looksam"
    assert data.matched["sam"] == "adamw-double"
    assert data.times["momentum-functional-sam"] == 1.29
    assert set(data.index) >= {"sam", "functional-sam", "looksam"}


def test_table_1_has_a_row_a_cell(complete):
    """545 steps are 20 tokens a parameter of the larger model: one comparison, in both regimes, counts once."""
    exhibit = drawn("table-1", complete)
    rows = [line for line in exhibit.page.splitlines() if line.startswith(("| fixed", "| chinchilla"))]
    assert [row.split(" | ")[0] for row in rows] == ["| fixed", "| fixed, chinchilla", "| chinchilla"]
    assert len(exhibit.frame[exhibit.frame.entry == "sam"]) == 3
    both = drawn("figure-5", complete).frame.query("entry == 'sam' and cell in ('fixed-0.014M', 'chinchilla-0.014M')")
    assert both.verdict_baseline.nunique() == 1
    assert list(both.part) == ["fixed", "chinchilla"]
    assert drawn("figure-5", complete).answer != "not tested"


def test_figure_11_says_whose_weights_bear_more(complete):
    exhibit = drawn("figure-11", complete)
    data = exhibit.frame
    sam = data[(data.entry == "sam") & (data.kind != figure_11.TRAINED)]
    assert (sam.minus_baseline > 0).all()
    assert set(data[data.entry == "adamw"].verdict) == {""}
    hard = sam[(sam.kind == "forgetting") & (sam.level == 200)].iloc[0]
    assert hard.increase == pytest.approx(1.5, rel=0.02)
    assert hard.minus_baseline == pytest.approx(1.0, rel=0.03)
    assert hard.verdict == str(Verdict.WORSE)
    assert hard.there == pytest.approx(5.5)
    assert "5 larger" in exhibit.caption


def test_figure_11_compares_the_functional_methods_with_sam_and_shows_the_loss_before(complete):
    """SAM's increase is three times theirs; all are one family. The losses as trained are described, not judged."""
    exhibit = drawn("figure-11", complete)
    data = exhibit.frame
    own = data[data.entry.isin(figure_11.WITH_SAM) & data.kind.ne(figure_11.TRAINED)]
    assert data.minus_sam.notna().sum() == len(own)
    last = own[(own.entry == "functional-sam") & (own.kind == "forgetting") & (own.level == 200)].iloc[0]
    assert last.minus_sam == pytest.approx(-1.0, rel=0.03)
    assert last.verdict_sam == str(Verdict.BETTER)
    judged_rows = data[data.verdict.ne("")]
    found = [Estimate(r.minus_baseline, r.minus_baseline_stderr, r.n) for r in judged_rows.itertuples()]
    found += [Estimate(r.minus_sam, r.minus_sam_stderr, r.n) for r in own.itertuples()]
    margin = exhibit.plan.content[0].study.margin
    assert [str(word) for word in judged(found, margin=margin)] == [*judged_rows.verdict, *own.verdict_sam]
    before = data[data.kind == figure_11.TRAINED].set_index("entry")
    assert set(before.verdict) == {""}
    assert before.minus_baseline["sam"] == pytest.approx(before.increase["sam"] - before.increase["adamw"])
    assert "the loss before minus AdamW's, which is not matched: SAM " in exhibit.caption


def test_figure_11_is_drawn_without_other_text(complete):
    """As at paper scale, where C4 stands alone."""
    source = MadeUp(complete.loss)
    source.records = complete.records
    whole = source.robustness
    source.robustness = lambda config: {key: value for key, value in whole(config).items() if key != "elsewhere"}
    exhibit = drawn("figure-11", source)
    assert set(exhibit.frame.kind) == {figure_11.TRAINED, "rounding", "noise"}
    assert "other text was not trained on" in exhibit.caption


def test_differences_are_said_with_their_interval_or_their_ends():
    nan = math.nan
    verdicts = [nan, "inconclusive", "no difference"]
    data = pd.DataFrame({"minus_sam": [nan, 0.0049, -0.0024], "half_sam": [nan, 0.0071, 0.0028], "verdict_sam": verdicts})
    assert differences(data[:2], "sam") == "+0.0049 ± 0.0071 nats (inconclusive)"
    assert differences(data, "sam") == f"{MINUS}0.0024 to +0.0049 nats (1 no difference, 1 inconclusive)"
    coarse = data.assign(minus_sam=[nan, 0.03, -0.0024], half_sam=[nan, 0.21, 0.0028])
    assert differences(coarse, "sam").startswith(f"{MINUS}0.0024 to +0.030 nats")  # as many digits as the interval of each is worth
    lost = data.assign(minus_sam=[nan, math.inf, math.inf], verdict_sam=[nan, "worse (diverged)", "worse (diverged)"])
    assert differences(lost, "sam") == "(2 worse (diverged))"
    one = data.assign(minus_sam=[nan, math.inf, -0.0024], verdict_sam=[nan, "worse (diverged)", "no difference"])
    assert differences(one, "sam") == f"{MINUS}0.0024 nats (1 no difference, 1 worse (diverged))"
    assert differences(data[:1], "sam") == "(nothing to compare)"


def without(complete, diverged):
    """The same records, but for runs on reported seeds that diverged."""
    source = MadeUp(complete.loss)
    source.records = {
        name: (config, None if config.measure.robustness and diverged(config) else loss)
        for name, (config, loss) in complete.records.items()
    }
    return source


def test_figure_11_counts_divergences_among_the_larger(complete):
    exhibit = drawn("figure-11", without(complete, lambda config: config.method.name == "sam"))
    own = exhibit.frame[exhibit.frame.entry.eq("sam") & exhibit.frame.kind.ne(figure_11.TRAINED)]
    assert set(own.verdict) == {str(Verdict.LOST)}
    cases, *counts = exhibit.headline.split(": ")[1].split(", ")
    assert int(cases.split()[0]) == sum(int(count.split()[0]) for count in counts)
    assert int(counts[1].split()[0]) >= 5


def test_figure_11_keeps_a_comparison_with_sam_that_has_no_mean(complete):
    """SAM diverged at one seed and Functional-SAM at another: the comparison is of the family, and open."""
    seeds = {"sam": 0, "functional-sam": 1}
    first = min(c.training.init_seed for c, _ in complete.records.values() if c.measure.robustness)
    lost = without(complete, lambda c: c.training.init_seed - first == seeds.get(c.method.name))
    data = drawn("figure-11", lost).frame
    own = data[data.entry.eq("functional-sam") & data.kind.ne(figure_11.TRAINED)]
    assert own.minus_sam.isna().all()
    assert set(own.verdict_sam) == {str(Verdict.OPEN)}


def test_figure_11_is_drawn_where_every_run_of_adamw_or_all_diverged(complete):
    alone = drawn("figure-11", without(complete, lambda config: config.method.name == "adamw"))
    assert set(alone.frame[alone.frame.entry.eq("sam") & alone.frame.kind.eq("noise")].verdict) == {str(Verdict.WON)}
    every = drawn("figure-11", without(complete, lambda config: True))
    assert set(every.frame.kind) == {figure_11.TRAINED}
    assert "0 cases" in every.headline


def test_figure_3_says_where_no_path_is_compared():
    assert figure_3._finding(pd.DataFrame()) == "No path is compared with another."
    row = {"cell": "c", "entry": "functional-sam", "other": "sam", "at_equal": "rho", "rho": 0.5, "n": 3, "verdict": "inconclusive"}
    lost = pd.DataFrame([row | {"difference": math.nan, "stderr": math.inf}])  # each diverged at a seed of its own
    assert figure_3._finding(lost) == "c, Functional-SAM against SAM at equal rho: inconclusive at rho 0.5."


def test_figure_5_has_no_panel_of_batches_where_none_is_complete(complete):
    study = load_study("language", "quick")
    cells = [cell.name for cell in study.part(*load_spec("figure-5", "quick").parts) if cell.part in ("chinchilla", "repeated")]
    exhibit = draw_plan(planned("figure-5", "quick", (f"cells={','.join(cells)}",), complete))
    assert not [axis.get_title() for axis in exhibit.figure.axes if "nan" in axis.get_title()]
    assert "SAM" in [text.get_text() for text in exhibit.figure.legends[0].get_texts()]

"""figure-2 by batch, from made-up losses: the functional part's harm is noise, and shrinks with the batch."""

import math
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from made_up import MadeUp

from functional_sam.errors import UserError
from functional_sam.exhibits import draw_plan, held_dose_tests, planned
from functional_sam.exhibits.held_dose import AGAINST_LOGIT, AGAINST_SMALLEST, FUNCTIONAL, LOGIT, draw_by_batch
from functional_sam.exhibits.output import write
from functional_sam.exhibits.spec import load_spec
from functional_sam.exhibits.words import answer
from functional_sam.study.compare import Verdict, holm, paired_difference

ROOT = Path(__file__).resolve().parents[1]
ROWS = (8, 64, 256, 1024)
RATES = {0.005: 0.1, 0.02: -0.05, 0.04: 0.0}  # AdamW's loss, minus that at 0.01


def loss(config):
    """The logit part is .02 worse than AdamW, the functional part 1 / rows better or worse; seeds differ by .3 and wobble.

    Of the tests: AdamW's other rates as RATES, twice the steps .5 better, Functional-SAM .01 better than AdamW.
    """
    seed, rows, phi = config.training.init_seed, config.training.batch, config.method.options.get("phi")
    harm = 0.0 if phi is None else 0.02 if phi else 0.02 + (1.0 if rows < 256 else -1.0) / rows
    if config.task == "language" and rows == 256:
        harm += RATES.get(config.optimizer.lr, 0.0) - 0.5 * (config.training.steps == 200)
        harm -= (0.01 + 1e-4 * math.sin(7 * seed)) * (config.method.name == "functional-sam")
    return 4.0 + 0.3 * seed + harm + 1e-4 * math.sin(seed * 5 + rows + (-1 if phi is None else phi))


class Measured(MadeUp):
    """At the last step a tenth of the square of H_F eps is no noise; at the first all of it is."""

    def metrics(self, config, kind=None):
        if kind != "targets" or not config.measure.targets:
            return []
        whole = {"norm_func": 2.0, "norm_logit": 3.0, "share": 0.4, "cosine": 0.0}
        found = {"same": whole | {"square_func": math.nan, "square_logit": math.nan}}
        lines = []
        for step, square in ((1, -1.0), (config.training.steps, 0.4)):
            found = found | {"independent": whole | {"square_func": square, "square_logit": 8.0}}
            seen = {"loss": 4.0, "entropy": 4.0, "norm": 1.0, "norm_gradient": 1.0, "square_gradient": 0.5}
            lines.append({"step": step, "targets": config.measure.targets[0], "temperature": 1.0, **seen, "gradient": found})
        return lines


def drawn(left_out=()):
    source = Measured(loss)
    configs = planned("figure-2", "laptop", source=source).configs
    source.do(config for config in configs if config.task == "vision" or config.training.batch not in left_out)
    return draw_plan(planned("figure-2", "laptop", source=source))


@pytest.fixture(scope="module")
def exhibit():
    return drawn()


def test_the_parts_are_compared_at_each_batch_in_one_family(exhibit):
    table = exhibit.frames["batches"]
    own = table[table.what == AGAINST_LOGIT].set_index("batch")
    assert list(own.index) == list(ROWS)
    assert list(own.n) == [5, 5, 5, 3]
    wobble = lambda rows, phi: [1e-4 * math.sin(seed * 5 + rows + phi) for seed in range(3 if rows == 1024 else 5)]  # noqa: E731
    by_hand = [
        paired_difference([(1.0 if rows < 256 else -1.0) / rows + one for one in wobble(rows, 0)], wobble(rows, 90))
        for rows in ROWS
    ]
    assert list(own.difference) == pytest.approx([one.mean for one in by_hand])
    assert list(own.half_width) == pytest.approx([one.half_width for one in by_hand])
    assert all(p < 0.05 for p in holm([one.p for one in by_hand])[:3])
    assert list(own.verdict[:3]) == ["worse", "worse", "better"]
    assert own.verdict[1024] in ("no difference", "better")
    assert set(table[table.what != AGAINST_LOGIT].verdict) == {""}
    assert table[table.what == LOGIT].difference.to_list() == pytest.approx([0.02] * 4, abs=2e-4)
    assert table[table.what == FUNCTIONAL].difference.iloc[0] == pytest.approx(0.145, abs=2e-4)


def test_each_batch_is_compared_with_the_smallest_seed_by_seed(exhibit):
    """Described: no verdict. The most rows have three of the five seeds."""
    table = exhibit.frames["batches"]
    own = table[table.what == AGAINST_SMALLEST].set_index("batch")
    assert list(own.index) == list(ROWS[1:])

    def d(seed, rows):
        wobble = [1e-4 * math.sin(seed * 5 + rows + phi) for phi in (0, 90)]
        return (1.0 if rows < 256 else -1.0) / rows + wobble[0] - wobble[1]

    by_hand = {}
    for rows in ROWS[1:]:
        seeds = range(3 if rows == 1024 else 5)
        by_hand[rows] = paired_difference([d(seed, rows) for seed in seeds], [d(seed, 8) for seed in seeds])
    assert list(own.difference) == pytest.approx([one.mean for one in by_hand.values()])
    assert list(own.half_width) == pytest.approx([one.half_width for one in by_hand.values()])
    assert set(own.verdict) == {""}


def test_tests_on_fresh_seeds_are_families_of_their_own(exhibit):
    """Eight other seeds: each cell's comparisons, paired by seed, with Holm's correction among them and in no other table."""
    table = exhibit.frames["tests"].set_index(["cell", "run", "other"])
    assert list(table.groupby("cell", sort=False).size()) == [1, 3, 1, 4, 2, 2, 2, 2, 2, 3, 3, 2, 1, 2, 1, 5, 2, 2]
    seeds = range(5, 13)

    def losses(phi=None, more=0.0):
        harm = 0.0 if phi is None else 0.02 - 1 / 256
        return [4.0 + 0.3 * seed + harm + more + 1e-4 * math.sin(seed * 5 + 256 + (-1 if phi is None else phi)) for seed in seeds]

    others = {
        "AdamW": 0.0,
        "AdamW at rate 0.005": RATES[0.005],
        "AdamW at rate 0.02": RATES[0.02],
        "AdamW at rate 0.04": RATES[0.04],
    }
    by_hand = {name: paired_difference(losses(0), losses(None, more)) for name, more in others.items()}
    for name, found in by_hand.items():
        row = table.loc[("fresh-256" if name == "AdamW" else "rates-256", "functional part", name)]
        assert (row.batch, row.n) == (256, 8)
        assert (row.difference, row.half_width, row.p) == pytest.approx((found.mean, found.half_width, found.p))
    rates = table.loc["rates-256"]
    assert list(rates.p_holm) == pytest.approx(holm([by_hand[name].p for name in others if name != "AdamW"]))
    assert list(rates.verdict) == ["better", "worse", "worse"]
    assert list(table.p_all) == pytest.approx(holm(list(table.p)))
    told, together = (int((table[column] < 0.05).sum()) for column in ("p_holm", "p_all"))
    assert f": {told} of {len(table)} significant within their families, {together} by Holm over all of them" in exhibit.caption
    method = table.loc["method-256"].reset_index()
    assert list(zip(method.run, method.other, strict=True)) == [
        (f"Functional-SAM at rho {rho}", other) for rho in ("0.5", "0.15") for other in ("AdamW", "AdamW with twice the steps")
    ]
    assert list(method.verdict) == ["better", "worse", "better", "worse"]
    tuned = table.loc["tuned-256"].iloc[0]
    assert f"minus AdamW at rate 0.02, warm-up 90, 256 rows a step: +{tuned.difference:.4f}" in exhibit.caption
    title = exhibit.more["tests"].texts[-1].get_text().replace("-\n", "-").replace("\n", " ")
    assert title.startswith(
        "Functional-SAM at rho 0.15, rate 0.04, warm-up 90 minus AdamW at rate 0.02, warm-up 90, 256 rows a step: +"
    )
    assert [int(n) for n in re.findall(r"(\d+) fresh seeds\)", title)] == [8, 16]
    drawn_text = [text.get_text() for text in exhibit.more["tests"].axes[0].texts]
    assert drawn_text[0] == "Does the functional part gain on other seeds?"
    assert "functional part\nminus AdamW at rate 0.02" in drawn_text
    assert len(drawn_text) == len(table) + table.reset_index().cell.nunique()
    assert set(exhibit.frames["batches"].n) == {5, 3}
    alone = drawn(left_out=(64, 1024))  # whatever other batches are complete
    own, of_all = (frame.drop(columns="p_all") for frame in (alone.frames["tests"], exhibit.frames["tests"].query("batch == 256")))
    assert own.equals(of_all)


def test_runs_that_tests_share_are_one_row(exhibit):
    own = exhibit.frame[exhibit.frame.part == "tests"]
    assert len(own) == 34 * 8 + 4 * 16 + 54 * 3  # AdamW and the functional part are in several cells; the trials are on three seeds
    assert set(own[own.run == "AdamW"].minus_adamw) == {0.0}
    assert list(own[own.run == "AdamW at rate 0.02"].minus_adamw) == pytest.approx([RATES[0.02]] * 8)


@pytest.mark.parametrize(("rows", "more"), [(256, ""), (64, ""), (64, "-short")])
def test_what_is_tested_as_tuned_is_what_was_best_of_the_trials(rows, more):
    """In the released runs: of AdamW and of Functional-SAM the lowest mean over the tuning seeds."""
    cells = load_spec("figure-2", "laptop").cells
    trials, test = cells[f"tune-{rows}{more}"], cells[f"tuned-{rows}{more}"]
    released = pd.read_csv(ROOT / "paper" / "figures" / "figure-2-laptop.csv")
    released = released[(released.batch == rows) & released.run.isin(trials["runs"]) & released.seed.isin(trials["seeds"])]
    means = released.groupby(["method", "run"]).value.mean()
    assert released.groupby("run").size().to_dict() == dict.fromkeys(trials["runs"], 3)
    (tuned, (adamw, _)), *others = test["tests"].items()
    assert not others
    assert means["adamw"].idxmin() == adamw
    assert means["functional-sam"].idxmin() == tuned
    for name in (tuned, adamw):
        assert test["runs"][name] == trials["runs"][name]
    assert not {*trials["seeds"]} & {*test["seeds"]}


def test_radii_of_their_own_are_the_best_of_the_trials():
    """In the released runs, of SAM and of Precond Functional-SAM at 256 rows; all others of own-256 are those of again-256."""
    cells = load_spec("figure-2", "laptop").cells
    trials, test = cells["tune-own-256"], cells["own-256"]
    released = pd.read_csv(ROOT / "paper" / "figures" / "figure-2-laptop.csv")
    released = released[(released.batch == 256) & released.run.isin(trials["runs"]) & released.seed.isin(trials["seeds"])]
    assert released.groupby("run").size().to_dict() == dict.fromkeys(trials["runs"], 3)
    best = set(released.groupby(["method", "run"]).value.mean().groupby("method").idxmin().map(lambda key: key[1]))
    assert len(best) == 2
    assert {name for name in test["runs"] if name not in cells["again-256"]["runs"]} == best
    assert not {*trials["seeds"]} & {*test["seeds"]}


def test_readme_says_what_the_tuned_tests_found():
    """The numbers that are typed there, of which verdicts decide the sign."""
    tests = pd.read_csv(ROOT / "paper" / "figures" / "figure-2-laptop-tests.csv")
    tests = tests[tests.run.str.startswith("Functional-SAM at rho") & tests.other.str.startswith("AdamW")].groupby("cell").last()
    readme = (ROOT / "README.md").read_text().replace("\n  ", " ")
    expected = {
        "again-256": ("better", "is {} nats below AdamW after 100 steps", 2),
        "longer-256": ("better", "{} after 200", 2),
        "longest-256": ("inconclusive", "{} after 400", 3),
        "tuned-64": ("worse", "{} above after 400", 2),
    }
    for cell, (verdict, words, digits) in expected.items():
        row = tests.loc[cell]
        assert row.verdict == verdict
        assert words.format(f"{abs(row.difference):.{digits}f} ± {row.half_width:.{digits}f}") in readme
    assert tests.loc["tuned-64-short"].verdict == "inconclusive"
    tests = pd.read_csv(ROOT / "paper" / "figures" / "figure-2-laptop-tests.csv")
    own = tests[tests.cell == "own-256"]
    own = own.set_index(own.run.str.split(" at ").str[0] + " minus " + own.other.str.split(" at ").str[0])
    sam, precond = own.loc["Functional-SAM minus SAM"], own.loc["Precond Functional-SAM minus Functional-SAM"]
    assert (sam.verdict, precond.verdict) == ("better", "worse")
    assert f"by {-sam.difference:.2f} ± {sam.half_width:.2f} when each has the radius that suits it" in readme
    assert f"{precond.difference:.2f} ± {precond.half_width:.2f} above Functional-SAM where that gains" in readme
    given = tests.query("cell == 'longer-256'").iloc[0]
    assert f"AdamW given the time is {given.difference:.2f} ± {given.half_width:.2f} below it" in readme


def test_noise_is_that_of_the_first_and_the_last_step(exhibit):
    table = exhibit.frames["batches"]
    assert table.noise_func.to_list() == pytest.approx([0.9] * len(table))
    assert table.noise_func_first.to_list() == pytest.approx([1.25] * len(table))
    assert sorted(set(table.targets)) == [1024, 8192, 32768, 131072]
    assert "noise 1.25 at the first step, 0.90 at the last" in exhibit.caption


def test_the_sweep_of_the_figure_does_not_know_the_batches(exhibit):
    """Same families, same numbers, whether cells are complete or not; one that is not is named."""
    without = drawn(left_out=ROWS[1:])
    assert without.frames["comparisons"].equals(exhibit.frames["comparisons"])
    assert set(without.frames["batches"].batch) == {8}
    left = "rows-64, rows-256, fresh-256, rates-256, rate-256, method-256, method-rate-256, sam-256, "
    left += "higher-256, start-256, double-256, only-start-256, warmup-256, tune-256, tuned-256, again-256, longer-256, "
    left += "longest-256, tune-own-256, own-256, tune-64, tuned-64, tune-64-short, tuned-64-short, rows-1024"
    assert f"Not shown, their runs are not complete: {left}" in without.caption
    assert "Not shown" not in exhibit.caption
    keys = ["part", "run", "task", "batch", "method", "dose", "phi", "seed"]
    assert not exhibit.frame.duplicated(keys).any()
    assert without.answer.endswith(" so far")
    ends = exhibit.frames["comparisons"].query("task == 'language' and against == 'logit part'")
    assert exhibit.answer == answer([*ends.verdict, *exhibit.frames["batches"].verdict], Verdict.BETTER)
    assert "worse" in set(exhibit.frames["batches"].verdict)
    assert len(exhibit.frame) == 220 + 54 + 232 + 64 + 162 + 40


def test_cells_can_be_run_alone_and_are_drawn_with_the_figure():
    """cells=NAME on the command line: a wrong name is refused, and runs that a cell shares with others are among its own."""
    source = Measured(loss)
    asked = ("cells=rates-256",)
    configs = planned("figure-2", "laptop", asked, source).configs
    assert len(configs) == 8 * 5
    assert {config.optimizer.lr for config in configs} == {0.005, 0.01, 0.02, 0.04}
    with pytest.raises(UserError, match=r"cell of configs/exhibits/figure-2.yaml, scale laptop: 'rates-25'.*rates-256"):
        planned("figure-2", "laptop", ("cells=rates-25",), source)
    source.do(configs)
    alone = planned("figure-2", "laptop", asked, source)
    assert not alone.missing
    assert not alone.drawable
    source.do(planned("figure-2", "laptop", ("cells=rows-8",), source).configs)
    source.do(config for config in planned("figure-2", "laptop", source=source).configs if config.training.batch < 256)
    assert list(draw_plan(planned("figure-2", "laptop", asked, source)).frames["tests"].cell.unique()) == [
        "fresh-256",
        "rates-256",
        "tuned-64",
        "tuned-64-short",
    ]


def test_it_is_written(exhibit, tmp_path):
    written = {path.name for path in write(exhibit, tmp_path)}
    assert {"figure-2-laptop.png", "figure-2-laptop-tests.png", "figure-2-laptop-batches.csv"} <= written


def test_tests_of_two_cells_may_call_other_runs_alike():
    """Two batches on the same seeds, each with an AdamW and a functional part of its own."""
    seeds = [5, 6, 7]

    def cell(batch):
        runs = {"functional part": {"method": "angle-sam"}, "AdamW": {"method": "adamw"}}
        tests = {"functional part": ["AdamW"]}
        return {"question": "?", "runs": runs, "tests": tests, "settings": {"training": {"batch": batch}}, "seeds": seeds}

    def runs(gain):
        values = {"AdamW": 0.0, "functional part": gain}
        return pd.DataFrame(
            [{"run": name, "seed": s, "value": 4 + s + more + 0.01 * s * more} for name, more in values.items() for s in seeds]
        )

    cells = {"at-64": cell(64), "at-256": cell(256)}
    table = held_dose_tests.tested({"at-64": runs(0.1), "at-256": runs(-0.2)}, cells, 0.005)
    assert list(table.difference) == pytest.approx([0.106, -0.212])
    assert set(table.n) == {3}
    title = held_dose_tests.tests_figure(table, cells, 0.01).texts[-1].get_text()
    assert title == "On 3 fresh seeds at 64/256 rows a step: 2 of 2 comparisons are significant"


def test_one_seed_and_a_diverged_one_are_drawn_without_a_bar():
    rows = {"batch": 8, "targets": 1024, "n": 1, "verdict": "inconclusive", "noise_func_first": 1.0, "noise_func": 0.5}
    what = {FUNCTIONAL: 0.1, LOGIT: math.inf, AGAINST_LOGIT: -0.1}
    table = pd.DataFrame([rows | {"what": name, "difference": mean, "half_width": math.inf} for name, mean in what.items()])
    figure, axes = plt.subplots(2)
    draw_by_batch(axes, table, 0.2, 100)
    limits = [limit for axis in axes for limit in axis.get_ylim()]
    plt.close(figure)
    assert all(math.isfinite(limit) and abs(limit) < 1 for limit in limits)

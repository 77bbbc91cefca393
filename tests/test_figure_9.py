"""figure-9 from made-up losses whose frontier is known."""

import math

import numpy as np
import pandas as pd
import pytest
from made_up import MadeUp

from functional_sam.exhibits import breaking, draw_plan, figure_9, planned
from functional_sam.exhibits.breaking import ABOUT, ADAMW, AT_LEAST, AT_MOST, compared, first_broken, sides_of_slope
from functional_sam.exhibits.output import write
from functional_sam.study.compare import Verdict


@pytest.mark.parametrize(
    ("losses", "radius", "bound"),
    [
        ([4.0, 4.2, 9.0], 10**0.5, ""),  # half of the rise lies in half of the logarithm
        ([4.0, 4.05, math.inf], math.sqrt(10 * 100), ""),
        ([4.2, 4.0, 4.0], 1.0, AT_MOST),
        ([4.0, 4.1, 4.0], 100.0, AT_LEAST),
    ],
)
def test_the_frontier_of_one_line(losses, radius, bound):
    found = first_broken([1.0, 10.0, 100.0], losses, [0.1, 1.0, 10.0], 4.1)
    assert found == (pytest.approx(radius), pytest.approx(radius / 10), bound)


def breaks_at(method, width, seed):
    """SAM earlier with width, its functional twin always at the same radius."""
    return 0.9 * (1 + 0.003 * math.sin(5 * seed + width + len(method))) * ((width / 16) ** -0.5 if method == "sam" else 1.0)


def loss(config):
    """Rises by .1 up to the frontier, linear in log rho near it; preconditioned SAM diverges from rho 1 on, its twin nowhere."""
    method, width, rho, seed = config.method.name, config.model.width, config.method.rho, config.training.init_seed
    base = 4.0 + 0.2 * seed + (0.5 if width == 48 and config.optimizer.lr == 0.04 and method != "precond-functional-sam" else 0.0)
    if method == "precond-sam":
        return None if rho >= 1 else base
    if method in ("adamw", "precond-functional-sam"):
        return base
    return base + 0.05 * max(0.0, 2 + math.log(rho / breaks_at(method, width, seed)))


class Dosed(MadeUp):
    def metrics(self, config, kind=None):
        if kind != "dose" or not config.method.rho:
            return []
        return [{"step": step, "dose": dose} for step, dose in ((1, 2 * config.method.rho), (5, math.inf), (80, None))]


@pytest.fixture(scope="module")
def exhibit():
    source = Dosed(loss)
    source.do(planned("figure-9", source=source).configs)
    return draw_plan(planned("figure-9", source=source))


def test_the_frontier_is_found(exhibit):
    found = exhibit.frames["frontier"].set_index(["method", "width", "lr", "seed"])
    for method in ("sam", "functional-sam"):
        for width in (16, 48):
            row = found.loc[(method, width, 0.01, 1)]
            assert row.rho_b == pytest.approx(breaks_at(method, width, 1), rel=1e-6)
            assert row.dose_b == pytest.approx(2 * row.rho_b)  # the average of the doses that are numbers
            assert row.bound == ""
    assert found.loc[("sam", 48, 0.04, 0), "bound"] == ADAMW  # at four times the rate AdamW itself is .5 above its best
    assert np.isnan(found.loc[("sam", 48, 0.04, 0), "rho_b"])
    assert found.loc[("precond-sam", 16, 0.01, 0), "rho_b"] == pytest.approx(math.sqrt(0.3))
    assert found.loc[("precond-functional-sam", 16, 0.04, 0)].to_list()[0::2] == [3.0, AT_LEAST]


def test_pairs_are_compared_and_judged(exhibit):
    pairs = exhibit.frames["pairs"].set_index(["method", "what", "width"])
    ours = [math.log(breaks_at("functional-sam", 48, s) / breaks_at("sam", 48, s)) for s in range(3)]
    row = pairs.loc[("functional-sam", "log radius", 48)]
    assert row.difference == pytest.approx(np.mean(ours), rel=1e-5)
    assert row.verdict == "later"
    assert pairs.loc[("functional-sam", "log radius", 16), "verdict"] == "the frontiers coincide"
    slopes = exhibit.frames["pairs"].query("what == 'slope in log width'").set_index("method")
    assert slopes.difference["functional-sam"] == pytest.approx(0.5, abs=0.01)
    assert slopes.verdict["functional-sam"] == "grows with width"
    row = pairs.loc[("precond-functional-sam", "log radius", 48)]
    assert row.difference == pytest.approx(math.log(3 / math.sqrt(0.3)))
    assert row.bound == AT_LEAST  # it breaks nowhere on the grid
    assert "Precond Functional-SAM over Precond SAM at least 5.5" in figure_9.headline(exhibit.frame)  # a bound has no interval
    assert pairs.loc[("functional-sam", "log radius", 48), "bound"] == ""
    assert slopes.bound.to_dict() == {"functional-sam": "", "precond-functional-sam": ABOUT}  # at least, at both widths
    assert slopes.verdict["precond-functional-sam"] == "inconclusive"
    assert list(pairs.loc[(slice(None), "log radius", 48), "verdict"]) == ["later", "inconclusive"]  # all seeds have the same bound
    assert exhibit.answer == "holds in 1 of 2"  # at the largest width


@pytest.mark.parametrize(
    ("sides", "found"),
    [
        ({16: set(), 32: set(), 64: set()}, set()),
        ({16: set(), 32: set(), 64: {AT_LEAST}}, {AT_LEAST}),  # more at the largest width: a steeper rise
        ({16: {AT_LEAST}, 32: set(), 64: set()}, {AT_MOST}),  # more at the smallest: a flatter one
        ({16: {AT_MOST}, 32: set(), 64: {AT_LEAST}}, {AT_LEAST}),
        ({16: {AT_LEAST}, 32: set(), 64: {AT_LEAST}}, {AT_MOST, AT_LEAST}),
        ({16: set(), 32: {AT_LEAST}, 64: set()}, set()),  # the mean width has no arm
        ({16: {AT_LEAST}}, set()),  # one width has no slope
    ],
)
def test_the_side_on_which_a_slope_is_bounded(sides, found):
    assert sides_of_slope(sides) == found


def test_a_bound_moves_the_slope_to_the_side_that_is_said():
    """The slope with what the bound stands for, larger by what you like, against the slope with the bound itself."""
    values = {16: 0.3, 48: -0.2, 96: 0.1, 128: 0.4}
    for width in values:
        moved = breaking.slope(values | {width: values[width] + 0.7}) - breaking.slope(values)
        assert sides_of_slope({at: {AT_LEAST} if at == width else set() for at in values}) == {AT_LEAST if moved > 0 else AT_MOST}


@pytest.mark.parametrize(
    ("bound", "word", "warranted"),
    [
        (AT_MOST, Verdict.WORSE, True),
        (AT_MOST, Verdict.BETTER, False),
        (AT_MOST, Verdict.SAME, False),
        (AT_LEAST, Verdict.BETTER, True),
        (AT_LEAST, Verdict.WORSE, False),
        (ABOUT, Verdict.WORSE, False),
        ("", Verdict.SAME, True),
    ],
)
def test_a_bound_gives_no_verdict_that_it_does_not_warrant(bound, word, warranted):
    assert breaking._warranted(word, bound) is warranted


def test_a_ratio_that_is_bounded_on_the_other_side_is_inconclusive():
    """At least so much of a radius, over one that is known: later stands. Were it at most so much, it would not."""
    seeds, lrs = range(3), (0.01, 0.04)

    def found(bound):
        ours = {"method": "functional-sam", "rho_b": 3.0, "bound": bound}
        theirs = {"method": "sam", "rho_b": 0.3, "bound": ""}
        rows = [
            {"width": 48, "lr": lr, "seed": s, **one, "rho_b": one["rho_b"] * (1 + 0.01 * s)}
            for s in seeds
            for lr in lrs
            for one in (ours, theirs)
        ]
        rows = [row | ({"rho_b": row["rho_b"] * (1 + 0.02 * row["seed"])} if row["method"] == "sam" else {}) for row in rows]
        pairs = compared(pd.DataFrame(rows)).set_index(["method", "what"])
        return pairs.loc[("functional-sam", "log radius")]

    assert found(AT_LEAST).verdict == "later"
    assert found(AT_MOST).verdict == "inconclusive"
    assert found("").verdict == "later"


def test_two_bounds_on_one_side_are_no_comparison():
    source = Dosed(lambda config: 4.0 + 0.1 * config.training.init_seed)  # nothing breaks
    source.do(planned("figure-9", source=source).configs)
    exhibit = draw_plan(planned("figure-9", source=source))
    assert (exhibit.frames["frontier"].bound == AT_LEAST).all()
    assert (exhibit.frames["pairs"].n == 0).all()
    assert "coincide" not in exhibit.verdict
    assert "not compared" in exhibit.caption


def test_figure_9_is_drawn(exhibit, tmp_path):
    files = write(exhibit, tmp_path)
    assert next(file for file in files if file.suffix == ".png").stat().st_size > 20_000
    assert "Precond SAM 24" in exhibit.caption  # 2 of 4 radii x 2 learning rates x 2 widths x 3 seeds
    assert figure_9.headline(exhibit.frame).startswith("radius that costs 0.1 nats: Functional-SAM over SAM 1.7 [")


@pytest.fixture(scope="module")
def in_bf16():
    """At laptop; in bf16 SAM breaks at a third of its radius, the functional path about where it did."""

    def rounded(config):
        method, seed = config.method.name, config.training.init_seed
        if config.training.precision != "bf16" or method not in ("sam", "functional-sam"):
            return loss(config)
        breaks = breaks_at(method, config.model.width, seed) / (3 if method == "sam" else 1) * (1 + 0.01 * math.sin(seed))
        return 4.0 + 0.2 * seed + 0.05 * max(0.0, 2 + math.log(config.method.rho / breaks))

    source = Dosed(rounded)
    source.do(planned("figure-9", "laptop", source=source).configs)
    return draw_plan(planned("figure-9", "laptop", source=source)), source


def test_bf16_is_compared_with_float32_where_both_were_run(in_bf16):
    exhibit, _ = in_bf16
    assert len(exhibit.frame[exhibit.frame.precision == "bf16"]) == 125
    table = exhibit.frames["bf16"].set_index(["what", "method"])
    row = table.loc[("bf16 over float32", "sam")]
    assert row.difference == pytest.approx(-math.log(3), rel=0.05)
    assert (row.n, row.verdict) == (5, "earlier in bf16")
    assert table.loc[("bf16 over float32", "functional-sam"), "verdict"] == "the frontiers coincide"
    assert table.loc[("functional over SAM's path, in bf16", "functional-sam"), "verdict"] == "later"
    assert "In bf16 (width 128, lr 0.01; " in exhibit.caption
    assert set(exhibit.frames["frontier"].width) == {24, 48, 96, 128}  # float32's, which bf16 moves nowhere
    assert len(exhibit.frames["frontier"]) == 4 * 2 * 4 * 5


def test_figure_9_is_drawn_without_bf16(in_bf16):
    """For a processor that is slow in it: what is missing is listed, and the finding is the same."""
    whole, source = in_bf16
    without = Dosed(source.loss)
    without.do([config for config in planned("figure-9", "laptop", source=source).configs if config.training.precision != "bf16"])
    plan = planned("figure-9", "laptop", source=without)
    assert plan.drawable
    assert len(plan.missing) == 125
    exhibit = draw_plan(plan)
    assert exhibit.headline == whole.headline
    assert "bf16" not in exhibit.frames
    assert "Not shown, its runs are not complete: bf16." in exhibit.caption
    assert "Not shown" not in whole.caption


@pytest.mark.parametrize("scale", ["quick", "laptop"])
def test_an_override_of_the_precision_is_of_the_whole_grid(scale):
    overrides = ("training.precision=bf16",)
    source = Dosed(loss)
    plan = planned("figure-9", scale, overrides, source)
    assert len({config.name for config in plan.configs}) == len(plan.configs) == {"quick": 204, "laptop": 1000}[scale]
    source.do(plan.configs)
    exhibit = draw_plan(planned("figure-9", scale, overrides, source))
    assert set(exhibit.frame.precision) == {"bf16"}
    assert "bf16" not in exhibit.frames
    assert "Not shown" not in exhibit.caption


def drawn(of):
    source = Dosed(of)
    source.do(planned("figure-9", source=source).configs)
    return draw_plan(planned("figure-9", source=source))


def test_a_grid_on_which_all_diverges_has_no_frontier(tmp_path):
    exhibit = drawn(lambda config: None)
    assert set(exhibit.frames["frontier"].bound) == {ADAMW}
    assert exhibit.headline.endswith("Functional-SAM over SAM not compared, Precond Functional-SAM over Precond SAM not compared")
    assert exhibit.answer == "not tested"
    assert "diverged of 204 runs: AdamW 12, Functional-SAM 48" in exhibit.caption
    assert write(exhibit, tmp_path)


def test_a_seed_that_is_not_compared_is_said():
    """Of seed 2 AdamW itself is broken at both rates: its ratio is not known, and the interval is that of two seeds."""

    def loss_of(config):
        broken = config.method.name == "adamw" and config.training.init_seed == 2
        return loss(config) + (5.0 if broken else 0.0) if config.method.name != "precond-sam" else 4.0

    exhibit = drawn(loss_of)
    pairs = exhibit.frames["pairs"]
    assert set(pairs[pairs.method.eq("functional-sam") & pairs.what.eq(breaking.RADIUS)].n) == {2}
    assert "at width 48 (later, in 2 of 3 seeds)" in exhibit.caption
    assert "at width 16: 1 [0.97, 1], the frontiers coincide, in 2 of 3 seeds" in exhibit.verdict


def test_an_exponent_is_none_where_it_is_zero_alone():
    """A best radius that every seed has at the same point of the grid may move with the width all the same."""
    pairs = pd.DataFrame(
        columns=["method", "other", "what", "width", "n", "difference", "stderr", "half_width", "bound", "verdict"]
    )
    data = pd.DataFrame({"seed": [0, 1], "diverged": [False, False]})

    def said(value, half):
        row = {"method": "sam", "of": "best", "n": 1 if math.isinf(half) else 2, "exponent": value, "half_width": half}
        return figure_9._verdict(data, pairs, pd.DataFrame([row]))

    assert f"in width: SAM {figure_9.UNMOVED}." in said(6e-18, 7e-17)
    assert "in width: SAM -1.00 \N{PLUS-MINUS SIGN} 0.00." in said(-1.0, 0.0)
    assert "in width: SAM -0.50." in said(-0.5, math.inf)  # of one seed there is no interval

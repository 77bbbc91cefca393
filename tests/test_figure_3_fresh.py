"""figure-3 on fresh seeds, from made-up losses: a family of its own, which leaves those of the other cells as they are."""

import math

import pytest
from made_up import MadeUp

from functional_sam.exhibits import draw_plan, planned
from functional_sam.exhibits.fresh_seeds import COMPARED
from functional_sam.exhibits.output import write
from functional_sam.study.compare import holm, paired_difference

SEEDS, RADII = range(8, 16), (0.015, 0.05, 0.15)
HARM = {"sam": 0.5, "functional-sam": 0.05}  # times rho: that of the functional path is small, at .015 within the margin


def loss(config):
    """Seeds differ by .3, methods by HARM, and each by a wobble of its own; AdamW's best rate is .01."""
    seed, name, rho = config.training.init_seed, config.method.name, config.method.rho or 0.0
    wobble = 1e-3 * math.sin(7 * seed + 31 * rho + len(name))
    return 4.0 + 0.3 * math.sin(seed) + 0.1 * math.log(config.optimizer.lr / 0.01) ** 2 + HARM.get(name, 0.3) * rho + wobble


def difference(name, other, rho):
    """By hand, over the fresh seeds."""
    of = {}
    for one in {name, other}:
        at = rho if one != "adamw" else 0.0
        of[one] = [HARM.get(one, 0.3) * at + 1e-3 * math.sin(7 * seed + 31 * at + len(one)) for seed in SEEDS]
    return paired_difference(of[name], of[other])


def drawn(*cells):
    """The exhibit once these cells are complete, with those whose learning rate they take."""
    source = MadeUp(loss)
    of = (f"cells={','.join(cells)}",) if cells else ()
    while source.do(planned("figure-3", "laptop", of, source).configs):
        pass
    return draw_plan(planned("figure-3", "laptop", of, source))


@pytest.fixture(scope="module")
def exhibit():
    return drawn()


def test_nine_comparisons_by_hand(exhibit):
    fresh = exhibit.frames["fresh"]
    by_hand = [difference(name, other, rho) for name, other in COMPARED for rho in RADII]
    assert list(zip(fresh.entry, fresh.other, fresh.rho, strict=True)) == [(*pair, rho) for pair in COMPARED for rho in RADII]
    assert set(fresh.n) == {len(SEEDS)}
    assert list(fresh.difference) == pytest.approx([one.mean for one in by_hand])
    assert list(fresh.half_width) == pytest.approx([one.half_width for one in by_hand])
    assert list(fresh.p_holm) == pytest.approx(holm([one.p for one in by_hand]))
    told = fresh.set_index(["entry", "other", "rho"]).verdict
    assert all(told["sam", "adamw", rho] == "worse" for rho in RADII)
    assert all(told["functional-sam", "sam", rho] == "better" for rho in RADII[1:])
    assert told["functional-sam", "adamw", 0.015] == "no difference"


def test_other_families_do_not_know_them(exhibit):
    without = drawn("batch-4", "dose-4", "batch-64", "dose-64", "dose-4-0.22M")
    data = exhibit.frame
    swept = data[data.cell != "fresh-64"].reset_index(drop=True)
    assert swept.equals(without.frame.reset_index(drop=True))
    assert exhibit.frames["path"].equals(without.frames["path"])
    assert "fresh" not in without.frames
    assert set(without.plan.left) == {"fresh-64"}
    assert not without.plan.growing
    assert not without.answer.endswith("so far")


def test_verdicts_against_adamw_are_those_of_their_family(exhibit):
    rows = exhibit.frame[exhibit.frame.cell.eq("fresh-64") & exhibit.frame.rho.notna()]
    told = exhibit.frames["fresh"].set_index(["entry", "other", "rho"]).verdict
    assert [told[row.entry, "adamw", row.rho] for row in rows.itertuples()] == list(rows.verdict_baseline)


def test_the_headline_is_of_the_seeds_that_tested_it(exhibit):
    found = difference("functional-sam", "sam", 0.05)
    assert exhibit.caption.startswith(f"Functional-SAM minus SAM \N{MINUS SIGN}{abs(found.mean):.4f}")
    assert "On fresh seeds (64 rows, n = 8), 9 comparisons" in exhibit.caption


def test_the_headline_says_the_verdict_of_its_number(exhibit):
    """README's answer counts all comparisons; the one that it shows may be inconclusive among them."""
    told = exhibit.frames["fresh"].set_index(["entry", "other", "rho"]).verdict["functional-sam", "sam", 0.05]
    assert f"(64 rows, rho 0.05, {told})" in exhibit.headline
    swept = exhibit.frames["path"]
    swept = swept[swept.at_equal.eq("rho")].set_index(["cell", "entry", "rho"]).verdict
    rows = exhibit.frame[exhibit.frame.cell.ne("fresh-64") & exhibit.frame.entry.str.contains("functional")]
    assert list(rows.verdict_path) == [swept[row.cell, row.entry, row.rho] for row in rows.itertuples()]


def test_the_answer_asks_both(exhibit):
    paths = exhibit.frames["path"]
    number = int(paths.at_equal.eq("rho").sum()) + len(RADII)
    assert exhibit.answer == "holds" or exhibit.answer.endswith(f"of {number}")


def test_alone_it_is_drawn_and_written(tmp_path):
    alone = drawn("fresh-64")
    assert set(alone.frame.cell) == {"fresh-64"}
    assert {"figure-3-laptop.png", "figure-3-laptop-fresh.csv"} <= {path.name for path in write(alone, tmp_path)}

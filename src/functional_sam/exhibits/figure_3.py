"""figure-3: test loss minus AdamW's against the radius, and against the dose, which is what it does to the gradient."""

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from functional_sam.exhibits import markdown, style
from functional_sam.exhibits.comparison import changed, label, left_out, pair_at_radius, place, plan, setting
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.words import answer, sentence
from functional_sam.study.compare import Estimate, Verdict, estimate, judged, paired_difference
from functional_sam.study.report import by_seed, frame, judge

__all__ = ["draw", "headline", "plan"]

PAIRS = (("functional-sam", "sam"), ("precond-functional-sam", "precond-sam"))  # the path alone differs
LINEAR = 0.01  # nats: within it the axis is linear


def draw(plan: Plan) -> Exhibit:
    """A row a cell; left against rho, right against the measured dose; bars are 95 % intervals, the grey band is the placebo's."""
    seeds = by_seed(plan.content, plan.source)
    margin = plan.content[0].study.margin
    data = judge(frame(plan.content, plan.source), margin)
    pairs = [row for _, part in seeds.groupby("cell", sort=False) for row in path_alone(part)]
    paths = judged_paths(pairs, margin)
    style.use()
    cells = list(dict.fromkeys(seeds.cell))
    figure, axes = plt.subplots(len(cells), 2, figsize=(style.PAGE, 2.4 * len(cells) + 0.4), squeeze=False, sharey="row")
    for (left, right), cell in zip(axes, cells, strict=True):
        part = seeds[seeds.cell == cell]
        _panel(left, part, "rho")
        _panel(right, part, "dose")
        name = f"{place(next(data[data.cell == cell].itertuples()))}, n = {part.seed.nunique()}"
        left.set(title=f"{name}: by radius", ylabel="test loss minus AdamW's\n(nats per token)")
        right.set(title="by dose")
        left.set_xlabel(r"radius $\rho$")
        right.set_xlabel(r"dose $|g_{method} - g|\,/\,|g|$, mean over the run")
        style.signed_log(left, LINEAR)
    style.legend_above(figure, axes[0, 0], columns=4)
    style.finding_above(figure, sentence(headline(data)))
    caption = (
        f"{sentence(headline(data))} Bars are 95 % intervals of paired differences, marks moved aside so that none covers "
        f"another; linear within {LINEAR:g} nats, logarithmic beyond; crosses at the top edge diverged; the grey band is that "
        f"of the placebo (AdamW whose initial weights were changed by 1e-6). {setting(plan, data)}{left_out(plan, data)}"
        f"{_still_open(plan, pairs, paths, margin)}"
    )
    wanted = paths[paths.at_equal == "rho"] if len(paths) else paths
    found = answer(wanted.verdict if len(wanted) else (), Verdict.BETTER)
    return Exhibit(plan, {"": data, "seeds": seeds, "path": paths}, caption, _finding(paths), figure, answer=found)


def headline(data: pd.DataFrame) -> str:
    """The path alone at one radius, in a few words."""
    return pair_at_radius(data, "functional-sam", "sam")


def _panel(axis: Axes, part: pd.DataFrame, x: str) -> None:
    axis.axhline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8, label="AdamW")
    placebo = part[part.entry == "placebo"]
    if len(placebo) > 1:
        own = estimate(list(placebo.minus_baseline))
        band = (own.mean - own.half_width, own.mean + own.half_width)
        axis.axhspan(*band, color=style.PLACEBO_COLOR, alpha=0.5, linewidth=0, label="placebo")
    groups = list(part[part.rho.notna()].groupby("entry", sort=False))
    for (name, rows), offset in zip(groups, style.offsets(len(groups), 0.12), strict=True):
        aside = 1.0 + offset if x == "rho" else 1.0  # doses differ by themselves
        places, found = [], []
        for rho, at in rows.groupby("rho"):
            place = float(rho if x == "rho" else at.dose.mean()) * aside
            one = estimate(list(at.minus_baseline))
            if math.isfinite(one.mean):
                places.append(place)
                found.append(one)
            else:
                style.diverged(axis, place, str(name))
        style.marks(axis, places, found, str(name), label=label(str(name)))
    style.log_ticks(axis, "x", part[x] if x == "rho" else part[part.rho.notna()].dose)


def path_alone(part: pd.DataFrame) -> list[dict[str, Any]]:
    """The functional path minus the plain one, same ascent: at equal rho, and at equal dose (linear in it between radii)."""
    rows: list[dict[str, Any]] = []
    for name, other in PAIRS:
        own, theirs = (part[part.entry == entry] for entry in (name, other))
        for rho, at in own.groupby("rho"):
            twin = theirs[theirs.rho == rho].sort_values("seed")
            at = at.sort_values("seed")
            for kind, values in (("rho", list(twin.test)), ("dose", [_at_dose(theirs, row) for row in at.itertuples()])):
                pairs = [(a, b) for a, b in zip(at.test, values, strict=False) if not math.isnan(b)]
                if len(pairs) == len(at):
                    found = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
                    row = {
                        "cell": at.cell.iloc[0],
                        "entry": name,
                        "other": other,
                        "at_equal": kind,
                        "rho": rho,
                        "dose": at.dose.mean(),
                    }
                    rows.append(row | {"n": found.n, "difference": found.mean, "stderr": found.stderr})
    return rows


def judged_paths(rows: list[dict[str, Any]], margin: float, more: int = 0) -> pd.DataFrame:
    """The rows of every cell with their verdicts, one family; more: comparisons of it that are still to come, counted as null."""
    words = judged([Estimate(row["difference"], row["stderr"], row["n"]) for row in rows], margin=margin, more=more)
    return pd.DataFrame([row | {"verdict": str(word)} for row, word in zip(rows, words, strict=True)])


def _still_open(plan: Plan, pairs: list[dict[str, Any]], paths: pd.DataFrame, margin: float) -> str:
    """Which verdicts on the path alone would not stand if those of the cells to come were null."""
    if not plan.left or paths.empty:
        return ""
    study = plan.content[0].study
    more = 2 * len(PAIRS) * sum(len(study.cells[name].rho) for name in plan.left)  # at equal rho and at equal dose
    names = [
        f"{label(row.entry)} against {label(row.other)} at equal {row.at_equal}, rho {row.rho:g}" for row in paths.itertuples()
    ]
    moved = changed(names, paths.verdict, judged_paths(pairs, margin, more).verdict)
    return f" Of the functional path against the plain one, as many as {more} more null comparisons would {moved}."


def _at_dose(theirs: pd.DataFrame, row: Any) -> float:
    """The other method's test loss at this row's dose and seed; nan outside the doses that its radii gave."""
    own = theirs[(theirs.seed == row.seed) & np.isfinite(theirs.test)].sort_values("dose")
    if own.empty or not own.dose.min() <= row.dose <= own.dose.max():
        return math.nan
    return float(np.interp(row.dose, own.dose, own.test))


def _finding(paths: pd.DataFrame) -> str:
    sentences = []
    for (cell, name, kind), part in paths.groupby(["cell", "entry", "at_equal"], sort=False) if len(paths) else ():
        words = [
            f"{word} at rho {', '.join(f'{r:g}' for r in part[part.verdict == word].rho)}"
            for word in Verdict
            if word in set(part.verdict)
        ]
        other = label(part.other.iloc[0])
        best = part.loc[part.difference.idxmin()]
        sentences.append(
            f"{cell}, {label(name)} against {other} at equal {kind}: {'; '.join(words)} (lowest "
            f"{markdown.interval(best.difference, Estimate(best.difference, best.stderr, int(best.n)).half_width, sign=True)})"
        )
    return ". ".join(sentences) + "."

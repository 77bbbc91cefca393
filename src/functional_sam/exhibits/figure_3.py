"""figure-3: test loss minus AdamW's against the radius, and against the dose, which is what it does to the gradient."""

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from functional_sam.exhibits import markdown, style
from functional_sam.exhibits.comparison import at_radius, label, left_out, place, plan, setting
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.study.compare import Estimate, Verdict, estimate, judged, paired_difference
from functional_sam.study.report import by_seed, frame, judge

__all__ = ["draw", "headline", "plan"]

PAIRS = (("functional-sam", "sam"), ("precond-functional-sam", "precond-sam"))  # the path alone differs
LINEAR = 0.01  # nats: within it the axis is linear


def draw(plan: Plan) -> Exhibit:
    """A row a cell; left against rho, right against the measured dose; bands are 95 % intervals, the grey one is the placebo's."""
    seeds = by_seed(plan.content, plan.source)
    margin = plan.content[0].study.margin
    data = judge(frame(plan.content, plan.source), margin)
    paths = judged_paths([row for _, part in seeds.groupby("cell", sort=False) for row in path_alone(part)], margin)
    style.use()
    cells = list(dict.fromkeys(seeds.cell))
    figure, axes = plt.subplots(len(cells), 2, figsize=(style.PAGE, 2.2 * len(cells) + 0.4), squeeze=False, sharey="row")
    for (left, right), cell in zip(axes, cells, strict=True):
        part = seeds[seeds.cell == cell]
        _panel(left, part, "rho")
        _panel(right, part, "dose")
        left.set(title=place(next(data[data.cell == cell].itertuples())), ylabel="test loss minus AdamW's\n(nats per token)")
        left.set_xlabel(r"radius $\rho$")
        right.set_xlabel(r"dose $|g_{method} - g|\,/\,|g|$, mean over the run")
        style.signed_log(left, LINEAR)
    style.legend_above(figure, axes[0, 0], columns=3)
    finding = _finding(paths)
    caption = (
        f"{finding} Linear within {LINEAR:g} nats, logarithmic beyond; crosses at the top edge diverged; grey, the placebo's "
        f"interval (AdamW whose initial weights were changed by 1e-6). {setting(plan, data)}{left_out(plan)}"
    )
    return Exhibit(plan, {"": data, "seeds": seeds, "path": paths}, caption, finding, figure)


def headline(data: pd.DataFrame) -> str:
    """What the curves say at one radius, in a few words."""
    return at_radius(data)


def _panel(axis: Axes, part: pd.DataFrame, x: str) -> None:
    axis.axhline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8)
    placebo = part[part.entry == "placebo"]
    if len(placebo) > 1:
        half = estimate(list(placebo.minus_baseline)).half_width
        axis.axhspan(
            placebo.minus_baseline.mean() - half, placebo.minus_baseline.mean() + half, color="#bbbbbb", alpha=0.5, linewidth=0
        )
    for name, own in part[part.rho.notna()].groupby("entry", sort=False):
        color = style.METHOD_COLOR[str(name)]
        xs, means, halves = [], [], []
        for rho, at in own.groupby("rho"):
            found = estimate(list(at.minus_baseline))
            if math.isfinite(found.mean):
                xs.append(float(at[x].mean()))
                means.append(found.mean)
                halves.append(found.half_width if math.isfinite(found.half_width) else 0.0)
            else:
                axis.plot(
                    [float(rho if x == "rho" else at.dose.mean())], [0.98], "x", color=color, transform=axis.get_xaxis_transform()
                )
        axis.plot(xs, means, color=color, marker="o", label=label(str(name)))
        axis.fill_between(xs, np.subtract(means, halves), np.add(means, halves), color=color, alpha=0.15, linewidth=0)
    axis.set_xscale("log")


def path_alone(part: pd.DataFrame) -> list[dict[str, Any]]:
    """The functional path minus the plain one, same ascent: at equal rho, and at equal dose (log-linear between radii)."""
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


def judged_paths(rows: list[dict[str, Any]], margin: float) -> pd.DataFrame:
    """The rows of every cell with their verdicts, one family."""
    words = judged([Estimate(row["difference"], row["stderr"], row["n"]) for row in rows], margin=margin)
    return pd.DataFrame([row | {"verdict": str(word)} for row, word in zip(rows, words, strict=True)])


def _at_dose(theirs: pd.DataFrame, row: Any) -> float:
    """The other method's test loss at this row's dose and seed; nan outside the doses that its radii gave."""
    own = theirs[(theirs.seed == row.seed) & np.isfinite(theirs.test)].sort_values("dose")
    if own.empty or not own.dose.min() <= row.dose <= own.dose.max():
        return math.nan
    return float(np.interp(math.log(row.dose), np.log(own.dose), own.test))


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

"""figure-3: test loss minus AdamW's against the radius, and against the dose, which is what it does to the gradient."""

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from functional_sam.exhibits import markdown, style
from functional_sam.exhibits.comparison import DESCRIBED, by_family, changed, differs, label, left_out, place, plan, seen, setting
from functional_sam.exhibits.fresh_seeds import PART, in_words, on_fresh_seeds, with_verdicts
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.words import answer, sentence
from functional_sam.study.compare import Estimate, Verdict, estimate, judged, paired_difference
from functional_sam.study.report import by_seed, frame, judge

__all__ = ["draw", "headline", "plan"]

PAIRS = (("functional-sam", "sam"), ("precond-functional-sam", "precond-sam"))  # the path alone differs
LINEAR = 0.01  # nats: within it the axis is linear
MANY = 3  # cells, from which on two stand side by side
SHOWN = 0.05  # the radius of the headline
DOSE, DOSE_AT_FIRST = "dose", "dose, plain mean of the measured steps"  # the second is described: paper/PROTOCOL.md, 2026-11-29


def draw(plan: Plan) -> Exhibit:
    """Two panels a cell: against rho, and against the measured dose; bars are 95 % intervals, the grey band is the placebo's."""
    seeds = by_seed(plan.content, plan.source)
    margin = plan.content[0].study.margin
    tests = [one.cell.name for one in plan.content if one.cell.part == PART]
    pairs = [row for _, part in seeds.groupby("cell", sort=False) for row in path_alone(part)]
    swept = [row for row in pairs if row["cell"] not in tests]
    paths, fresh = judged_paths(swept, margin), on_fresh_seeds(seeds[seeds.cell.isin(tests)], margin)
    data = frame(plan.content, plan.source)
    families = [judge(own, margin) for own in by_family(data)]
    data = with_equal_dose(with_verdicts(pd.concat(families).sort_index(), fresh), pairs)
    data = with_path_verdict(data, paths, fresh)
    style.use()
    cells = list(dict.fromkeys(seeds.cell))
    figure, panels = _panels(len(cells))
    for (left, right), cell in zip(panels, cells, strict=True):
        part = seeds[seeds.cell == cell]
        for axis, x in ((left, "rho"), (right, "dose")):
            _panel(axis, part, x, data[data.cell == cell], ticks=6 if len(cells) < MANY else 4)
        n = f"n = {part.seed.nunique()}" + (" fresh seeds" if cell in tests else "")
        left.set_title(f"{place(next(data[data.cell == cell].itertuples()))}, {n}", loc="left")
        left.set_xlabel(r"radius $\rho$")
        right.set_xlabel(r"dose $|g_{method} - g|\,/\,|g|$")
        right.tick_params(labelleft=False)
        style.signed_log(left, LINEAR)
    panels[0][0].plot([], [], "o", color=style.OTHER_COLOR, markerfacecolor="white", label="hollow: not significant")
    style.legend_above(figure, panels[0][0], columns=4)
    style.finding_above(figure, sentence(headline(data)))
    caption = (
        f"{sentence(headline(data))} Left of each two panels by the radius, right by the dose, its average "
        "over the steps. Bars are 95 % intervals of paired differences, marks moved aside so that none covers another, hollow "
        f"where the difference is not significant by Holm; linear within {LINEAR:g} nats, logarithmic beyond; "
        f"crosses at the top edge diverged; the grey band is that of the placebo (AdamW whose initial weights were changed by "
        "1e-6); at equal dose a functional method is compared with the plain one interpolated, linear in the dose, between AdamW "
        f"and its radii. {setting(plan, data)}{seen(data)}{left_out(plan, data[~data.part.isin(DESCRIBED)])}"
        f"{in_words(fresh)}{_significant_at_first(paths)}{_still_open(plan, swept, paths, margin)}"
    )
    wanted = [*paths[paths.at_equal == "rho"].verdict] if len(paths) else []
    wanted += [*fresh[fresh.other == "sam"].verdict] if len(fresh) else []
    frames = {"": data, "seeds": seeds, "path": paths} | ({"fresh": fresh} if len(fresh) else {})
    return Exhibit(plan, frames, caption, _finding(paths) + in_words(fresh), figure, answer=answer(wanted, Verdict.BETTER))


def _panels(cells: int) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Two panels with one y axis for each cell; two cells side by side where there are MANY."""
    across = 1 if cells < MANY else 2
    rows = math.ceil(cells / across)
    figure = plt.figure(figsize=(style.PAGE, 2.4 * rows + 0.4))
    found = []
    for number in range(cells):
        first = 1 + 2 * number
        left = figure.add_subplot(rows, 2 * across, first)
        found.append((left, figure.add_subplot(rows, 2 * across, first + 1, sharey=left)))
        if number % across == 0:
            left.set_ylabel("test loss minus AdamW's\n(nats per token)")
    return figure, found


def headline(data: pd.DataFrame) -> str:
    """The path alone at one radius and AdamW's learning rate, in the cell of the most seeds (and rows), in a few words."""
    name, other = PAIRS[0]
    own = data[data.rho.sub(SHOWN).abs().lt(1e-9) & data.lr_over_centre.sub(1).abs().lt(0.01) & data.entry.eq(name)]
    if own.empty:
        return f"nothing at rho {SHOWN:g}"
    row = own.sort_values(["n", "batch"]).iloc[-1]
    said = f", {row.verdict_path}" if isinstance(row.verdict_path, str) and row.verdict_path else ""  # nan where a CSV was read
    words = f"{label(name)} minus {label(other)} {differs(row, other)} nats ({row.batch} rows, rho {SHOWN:g}{said})"
    if math.isnan(row.plain_at_dose):
        return words
    at_dose = Estimate(row.plain_at_dose, row.plain_at_dose_stderr, int(row.n))
    return f"{words}, at equal dose {markdown.interval(at_dose.mean, at_dose.half_width, sign=True)}"


def with_equal_dose(data: pd.DataFrame, pairs: list[dict[str, Any]]) -> pd.DataFrame:
    """Add columns plain_at_dose and plain_at_dose_stderr: a functional method minus its plain twin at equal dose."""
    found = {(row["cell"], row["entry"], row["rho"]): row for row in pairs if row["at_equal"] == DOSE}
    keys = list(zip(data.cell, data.entry, data.rho, strict=True))
    columns = {"plain_at_dose": "difference", "plain_at_dose_stderr": "stderr"}
    return data.assign(
        **{column: [found[key][field] if key in found else math.nan for key in keys] for column, field in columns.items()}
    )


def with_path_verdict(data: pd.DataFrame, paths: pd.DataFrame, fresh: pd.DataFrame) -> pd.DataFrame:
    """Add column verdict_path: of a functional method minus its plain twin at equal rho, in the family that tested it."""
    found = {(row.cell, row.entry, row.rho): row.verdict for row in paths.itertuples() if row.at_equal == "rho"}
    found |= {(row.cell, row.entry, row.rho): row.verdict for row in fresh.itertuples() if row.other != "adamw"}
    return data.assign(verdict_path=[found.get(key, "") for key in zip(data.cell, data.entry, data.rho, strict=True)])


def _panel(axis: Axes, part: pd.DataFrame, x: str, verdicts: pd.DataFrame, ticks: int) -> None:
    """One cell against x, "rho" or "dose": a mark an entry and radius, hollow where its verdict says neither better nor worse."""
    axis.axhline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8, label="AdamW")
    placebo = part[part.entry == "placebo"]
    if len(placebo) > 1:
        own = estimate(list(placebo.minus_baseline))
        band = (own.mean - own.half_width, own.mean + own.half_width)
        axis.axhspan(*band, color=style.PLACEBO_COLOR, alpha=0.5, linewidth=0, label="placebo")
    groups = list(part[part.rho.notna()].groupby("entry", sort=False))
    for (name, rows), offset in zip(groups, style.offsets(len(groups), 0.06), strict=True):
        aside = 1.0 + offset if x == "rho" else 1.0  # doses differ by themselves
        places, found, radii = [], [], []
        for rho, at in rows.groupby("rho"):
            place = float(rho if x == "rho" else at.dose.mean()) * aside
            one = estimate(list(at.minus_baseline))
            if math.isfinite(one.mean):
                places.append(place)
                found.append(one)
                radii.append(rho)
            else:
                style.diverged(axis, place, str(name))
        style.marks(axis, places, found, str(name), label=label(str(name)))
        own_verdicts = verdicts[verdicts.entry == name].set_index("rho").verdict_baseline
        significant = own_verdicts.isin([Verdict.BETTER, Verdict.WORSE])
        hollow = [(place, one.mean) for place, one, rho in zip(places, found, radii, strict=True) if not significant[rho]]
        look: dict[str, Any] = {"color": style.color(str(name)), "markerfacecolor": "white", "markeredgewidth": 0.8}
        axis.plot(*zip(*hollow, strict=True) if hollow else ([], []), style.marker(str(name)), zorder=3, **look)
    shown = sorted(set(part[part.rho.notna()][x]))
    if x == "rho" and len(shown) > ticks:
        shown = shown[::2]
    style.log_ticks(axis, "x", shown, ticks)


def path_alone(part: pd.DataFrame) -> list[dict[str, Any]]:
    """Compare the functional path with the plain one in a cell, same ascent: at equal rho, and at equal dose.

    At equal dose the plain path's loss is interpolated, linear in the dose, between its radii and AdamW's at dose 0; with
    DOSE_AT_FIRST between its radii alone. A comparison that lacks a seed's twin is left out.
    """
    rows: list[dict[str, Any]] = []
    for name, other in PAIRS:
        own, theirs = (part[part.entry == entry] for entry in (name, other))
        for rho, at in own.groupby("rho"):
            twins_at_rho = theirs[theirs.rho == rho].set_index("seed").test.reindex(at.seed)  # nan where a seed is not among theirs
            values = {
                "rho": list(twins_at_rho),
                DOSE: [_at_dose(theirs, row.seed, row.dose) for row in at.itertuples()],
                DOSE_AT_FIRST: [_at_first(theirs, row.seed, row.dose_at_measured_steps) for row in at.itertuples()],
            }
            for kind, twins in values.items():
                if not any(map(math.isnan, twins)):
                    found = paired_difference(list(at.test), twins)
                    dose = (at.dose_at_measured_steps if kind == DOSE_AT_FIRST else at.dose).mean()
                    row = {"cell": at.cell.iloc[0], "entry": name, "other": other, "at_equal": kind, "rho": rho, "dose": dose}
                    rows.append(row | {"n": found.n, "difference": found.mean, "stderr": found.stderr})
    return rows


def judged_paths(rows: list[dict[str, Any]], margin: float, more: int = 0) -> pd.DataFrame:
    """Judge the rows of path_alone of all cells as one family; more: comparisons still to come, counted as null.

    Rows at equal DOSE_AT_FIRST are judged as if they stood in the place of those at equal dose.
    """
    found: dict[int, Verdict] = {}
    for kind in (DOSE_AT_FIRST, DOSE):  # the verdicts at equal rho are those of the last
        family = [place for place, row in enumerate(rows) if row["at_equal"] in ("rho", kind)]
        estimates = [Estimate(rows[place]["difference"], rows[place]["stderr"], rows[place]["n"]) for place in family]
        found |= dict(zip(family, judged(estimates, margin=margin, more=more), strict=True))
    return pd.DataFrame([row | {"verdict": str(found[place])} for place, row in enumerate(rows)])


def _significant_at_first(paths: pd.DataFrame) -> str:
    """What would be significant at equal dose by the plain mean of the measurements, in words."""
    found = paths[(paths.at_equal == DOSE_AT_FIRST) & paths.verdict.isin([Verdict.BETTER, Verdict.WORSE])] if len(paths) else paths
    if found.empty:
        return ""
    words = [
        f"{label(str(name))} {verdict} at rho {', '.join(f'{rho:g}' for rho in part.rho)}"
        for (name, verdict), part in found.groupby(["entry", "verdict"], sort=False)
    ]
    return (
        " The dose is averaged over the steps; by the plain mean of its log-spaced measurements, half of them in warm-up, which "
        f"the protocol had at first, these would differ significantly from SAM's path at equal dose: {'; '.join(words)}."
    )


def _still_open(plan: Plan, pairs: list[dict[str, Any]], paths: pd.DataFrame, margin: float) -> str:
    """Which verdicts on the path alone would not stand if those of the cells to come were null."""
    if not plan.growing or paths.empty:
        return ""
    study = plan.content[0].study
    swept = [cell for cell in (study.cells[name] for name in plan.left) if cell.part not in DESCRIBED]
    more = 2 * len(PAIRS) * sum(len(cell.rho) for cell in swept)  # at equal rho and at equal dose
    own, after = paths[paths.at_equal != DOSE_AT_FIRST], judged_paths(pairs, margin, more)
    names = [f"{label(row.entry)} against {label(row.other)} at equal {row.at_equal}, rho {row.rho:g}" for row in own.itertuples()]
    moved = changed(names, own.verdict, after.verdict[own.index])
    return f" Of the functional path against the plain one, as many as {more} more null comparisons would {moved}."


def _at_dose(theirs: pd.DataFrame, seed: int, dose: float) -> float:
    """Interpolate the other method's test loss at a dose and seed, AdamW's at dose 0; nan above the doses of its radii."""
    own = theirs[(theirs.seed == seed) & np.isfinite(theirs.test)].sort_values("dose")
    if own.empty or not dose <= own.dose.max():
        return math.nan
    adamw = own.test.iloc[0] - own.minus_baseline.iloc[0]
    return float(np.interp(dose, [0.0, *own.dose], [adamw, *own.test]))


def _at_first(theirs: pd.DataFrame, seed: int, dose: float) -> float:
    """Interpolate it in the plain mean of the measured doses; nan above and below those of its radii."""
    own = theirs[(theirs.seed == seed) & np.isfinite(theirs.test)].sort_values("dose_at_measured_steps")
    doses = own.dose_at_measured_steps
    return float(np.interp(dose, doses, own.test)) if len(own) and doses.min() <= dose <= doses.max() else math.nan


def _finding(paths: pd.DataFrame) -> str:
    """Each pair of paths in each cell: its verdicts by radius, and the lowest difference."""
    if paths.empty:
        return "No path is compared with another."
    sentences = []
    for (cell, name, kind), part in paths.groupby(["cell", "entry", "at_equal"], sort=False):
        words = [
            f"{word} at rho {', '.join(f'{r:g}' for r in part[part.verdict == word].rho)}"
            for word in Verdict
            if word in set(part.verdict)
        ]
        other = label(part.other.iloc[0])
        known = part[np.isfinite(part.difference)].sort_values("difference", kind="stable")
        found = [Estimate(row.difference, row.stderr, row.n) for row in known[:1].itertuples()]
        lowest = "".join(f" (lowest {markdown.interval(one.mean, one.half_width, sign=True)})" for one in found)
        sentences.append(f"{cell}, {label(name)} against {other} at equal {kind}: {'; '.join(words)}{lowest}")
    return ". ".join(sentences) + "."

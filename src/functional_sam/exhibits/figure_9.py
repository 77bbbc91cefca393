"""figure-9: where training breaks: the frontier in learning rate and radius, per width and method, and how it moves with width."""

import itertools
import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from functional_sam.exhibits import style
from functional_sam.exhibits.breaking import (
    ADAMW,
    BETWEEN,
    PAIRS,
    RADIUS,
    RISE,
    SLOPE,
    WORDS,
    compared,
    exponents,
    frame,
    frontier,
    grid,
    of_seeds,
    radii,
    times,
)
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.rounding import BF16, compared_in_bf16, configs_in_bf16, first_precision, in_words
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import answer, firsts
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, Verdict, estimate
from functional_sam.tasks import TASKS

UNMOVED = "none that this grid of radii shows"  # of an exponent that is zero in every seed: the best radius is one of the grid
ROUNDING = 1e-6  # an exponent below it is zero
NOT_COMPARED = "not compared"


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """AdamW at each learning rate, each method at each learning rate and radius, on each width and seed; seeds first.

    Then the same in bf16 where the scale has cells of it: a drawing can do without, for some processors are slow in it.
    """
    configs = [config for seed in spec.seeds for task in spec.tasks for config in grid(spec, task, seed, spec.lr, overrides)]
    done, known = all(source.done(config) for config in configs), {config.name for config in configs}
    low = [
        config for config in configs_in_bf16(spec, overrides) if config.name not in known
    ]  # known where an override set the precision
    whole = all(source.done(config) for config in low)
    shown = configs + low if whole else configs
    return Plan(spec, configs + low, None, source, done, shown if done else None, () if whole else (BF16,))


def draw(plan: Plan) -> Exhibit:
    """Above the frontier against lr, a panel a width; below, against width, frontier, its ratios, its dose and the best radius."""
    data = frame(plan)
    full, in_bf16 = first_precision(data), compared_in_bf16(data)
    found = frontier(full)
    pairs, table = compared(found), radii(full, found)
    slopes, low = exponents(table), data.drop(full.index)
    rounded_table = radii(low, frontier(low)) if len(low) else table[:0]
    style.use()
    figure = plt.figure(figsize=(style.PAGE, 4.3), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    top, bottom = parts
    widths = sorted(full.width.unique())
    above = top.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for axis, width in zip(above, widths, strict=True):
        _against_lr(axis, found[found.width == width], plan.spec)
        axis.set_title(f"width {width}")
    above[0].set_ylabel("radius $\\rho$ that\nbreaks training")
    labels = {
        "frontier": "radius $\\rho$ that\nbreaks training",
        "ratio": "that radius,\nfunctional over SAM's",
        "dose": "dose there,\n|correction| / |g|",
        "best": "radius $\\rho$ of\nthe lowest loss",
    }
    for axis, (field, label) in zip(bottom.subplots(1, len(labels)), labels.items(), strict=True):
        if field == "ratio":
            _ratios(axis, pairs, widths)
        else:
            _against_width(axis, table, field, widths)
            _in_bf16(axis, rounded_table, field)
        axis.set_ylabel(label)
    figure.legend(
        handles=_legend(plan.spec.methods, bool((found.bound == ADAMW).any()), bool(len(low))),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncol=3,
    )
    finding = _finding(pairs, full.seed.nunique())
    style.finding_above(figure, finding)
    frames = {"": data, "frontier": found, "pairs": pairs, "radii": table, "exponents": slopes}
    largest = pairs[(pairs.what == RADIUS) & (pairs.width == pairs.width.max())]
    meant = {word: verdict for verdict, word in WORDS[RADIUS].items()}
    said = answer([meant.get(word, word) for word in largest.verdict], Verdict.BETTER)
    frames |= {} if in_bf16.empty else {"bf16": in_bf16}
    rounded = " Not shown, its runs are not complete: bf16." if plan.left else in_words(data, in_bf16)
    caption, verdict = _caption(plan, full, finding) + rounded, _verdict(full, pairs, slopes) + rounded
    return Exhibit(plan, frames, caption, verdict, figure, answer=said)


def headline(data: pd.DataFrame) -> str:
    """The radius that breaks training at the largest width, of the functional path over SAM's, in a few words."""
    pairs, label = compared(frontier(first_precision(data))), style.METHOD_LABEL
    own = pairs[(pairs.what == RADIUS) & (pairs.width == pairs.width.max())].set_index("method")
    found = [
        f"{label[name]} over {label[other]} {times(own.loc[name]) if name in own.index else NOT_COMPARED}"
        for name, other in PAIRS.items()
    ]
    return f"radius that costs {RISE:g} nats: {', '.join(found)}"


def _against_lr(axis: Axes, found: pd.DataFrame, spec: Spec) -> None:
    for number, method in enumerate(spec.methods):
        own = found[found.method == method]
        points = [(lr, own[own.lr == lr]) for lr in spec.lr]
        points = [(lr, at[at.bound != ADAMW]) for lr, at in points]
        beside = 1.03 ** (number - (len(spec.methods) - 1) / 2)
        _line(axis, [(lr * beside, _of_logs(at.rho_b), at.bound.ne(BETWEEN).any()) for lr, at in points if len(at)], method)
    gone = [lr for lr in spec.lr if (found[found.lr == lr].bound == ADAMW).all()]
    for lr in gone:
        axis.axvspan(lr / 1.15, lr * 1.15, color="#bbbbbb", alpha=0.5, linewidth=0)
    axis.set(xscale="log", yscale="log", xlabel="learning rate", ylim=(min(spec.rho) / 2, max(spec.rho) * 2))
    style.plain_log(axis)
    axis.set_xlim(min(spec.lr) / 1.3, max(spec.lr) * 1.3)
    axis.set_xticks(spec.lr, [f"{lr:g}" for lr in spec.lr])
    axis.xaxis.set_minor_locator(NullLocator())


def _against_width(axis: Axes, table: pd.DataFrame, field: str, widths: list[int]) -> None:
    methods = list(table.method.unique())
    for number, method in enumerate(methods):
        beside = 1.03 ** (number - (len(methods) - 1) / 2)
        points = []
        for width in widths:
            at = table[(table.method == method) & (table.width == width)]
            points.append((width * beside, at[field].dropna(), field != "best" and bool(at.bounded.any())))
        _line(axis, [(x, _of_logs(values), bounded) for x, values, bounded in points if len(values)], method)
    values = table[field].dropna()
    axis.set(xscale="log", xlabel="width")
    if len(values):
        axis.set(yscale="log", ylim=(values.min() / 2, values.max() * 2))
        style.plain_log(axis)
    _ticks_of(axis, widths)


def _ratios(axis: Axes, pairs: pd.DataFrame, widths: list[int]) -> None:
    """The figure's question: the radius of a functional method over its plain twin's; above 1 it bears more."""
    axis.axhline(1.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8)
    for name, shift in zip(PAIRS, (0.97, 1.03), strict=True):
        own = pairs[(pairs.method == name) & (pairs.what == RADIUS) & (pairs.n > 0)]
        points = [
            (row.width * shift, Estimate(row.difference, row.stderr, row.n), row.bound != BETWEEN) for row in own.itertuples()
        ]
        _line(axis, points, name)
    axis.set(xscale="log", yscale="log", xlabel="width")
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, 0.01), min(high, 100.0))  # wider intervals are cut: their ends say nothing more
    style.plain_log(axis)
    _ticks_of(axis, widths)


def _ticks_of(axis: Axes, widths: list[int]) -> None:
    """A tick a width, with its number unless that of the next would touch it."""
    near = [below * 1.5 > above for below, above in itertools.pairwise(widths)]
    axis.set_xticks(widths, ["" if close else str(width) for width, close in zip(widths, [*near, False], strict=True)])
    axis.xaxis.set_minor_locator(NullLocator())


def _in_bf16(axis: Axes, table: pd.DataFrame, field: str) -> None:
    """Crosses right of the float32 marks of their width: geometric means over seeds."""
    for number, ((method, width), part) in enumerate(table.groupby(["method", "width"], sort=False)):
        known = part[field].dropna()
        if len(known):
            place, mean = width * 1.12 * 1.03**number, math.exp(float(np.mean(np.log(known))))
            axis.plot([place], [mean], "x", color=style.METHOD_COLOR[str(method)], zorder=3)


def _of_logs(values: pd.Series) -> Estimate:
    return estimate(list(np.log(values)))


def _line(axis: Axes, points: list[tuple[float, Estimate, bool]], method: str) -> None:
    """Geometric means over seeds with 95 % t intervals, of estimates of logarithms; hollow where a seed's is only a bound."""
    color = style.METHOD_COLOR[method]
    found = [one for _, one, _ in points]
    xs, ys = [x for x, _, _ in points], [math.exp(one.mean) for one in found]
    halves = [style.bar(one.half_width) for one in found]
    errors = [[y - y * math.exp(-half) for y, half in zip(ys, halves, strict=True)]]
    errors.append([y * math.exp(min(half, 50.0)) - y for y, half in zip(ys, halves, strict=True)])
    axis.errorbar(xs, ys, errors, color=color, elinewidth=0.7)
    for x, y, (_, _, bounded) in zip(xs, ys, points, strict=True):
        axis.plot([x], [y], style.marker(method), color=color, markerfacecolor="white" if bounded else color, zorder=3)


def _legend(methods: list[str], adamw: bool, in_bf16: bool) -> list[Line2D]:
    grey: dict[str, Any] = {"color": "#777777", "linestyle": "none"}
    marks = [
        *(
            Line2D([], [], color=style.METHOD_COLOR[name], marker=style.marker(name), label=style.METHOD_LABEL[name])
            for name in methods
        ),
        Line2D([], [], marker="o", markerfacecolor="white", label="of some seeds a bound, the end of the grid", **grey),
    ]
    marks += [Line2D([], [], marker="s", markersize=7, alpha=0.5, label="AdamW itself breaks", **grey)] if adamw else []
    return [*marks, Line2D([], [], marker="x", label="in bf16", **grey)] if in_bf16 else marks


# ---------------------------------------------------------------------- words


def _finding(pairs: pd.DataFrame, seeds: int) -> str:
    """The ratio of radii at the largest width at which it is known; seeds: of the runs, not all of which may be compared."""
    parts = []
    for name, other in PAIRS.items():
        own = pairs[(pairs.method == name) & (pairs.what == RADIUS)]
        label = f"{style.METHOD_LABEL[name]} / {style.METHOD_LABEL[other]}"
        if own.empty:
            parts.append(f"{label} {NOT_COMPARED}, both beyond the grid or AdamW itself broken")
            continue
        row = own.loc[own.width.idxmax()]
        parts.append(f"{label} {times(row)} at width {row.width:.0f} ({row.verdict}{of_seeds(row, seeds)})")
    return f"Radius that breaks training, functional path over SAM's: {'; '.join(parts)}"


def _caption(plan: Plan, data: pd.DataFrame, finding: str) -> str:
    spec, config = plan.spec, next(iter(firsts(plan.configs).values()))
    gone = data[data.diverged].groupby("method").size()
    lost = ", ".join(f"{style.METHOD_LABEL[name]} {count}" for name, count in gone.items()) or "none"
    lrs, rhos = (", ".join(f"{value:g}" for value in values) for values in (spec.lr, spec.rho))
    size = f"{config.training.batch} rows, {config.training.steps} steps in {config.training.precision}"
    return (
        f"{finding}. A run is broken where it diverged or ended more than {RISE:g} nats above the best of its width, seed and "
        "method; the frontier is interpolated in log rho, and the end of the grid counts where it lies beyond; decoders of depth "
        f"{config.model.depth} on {TASKS[config.kind].data_name(config)}, {size}, scale {spec.scale}, not the paper's models; lr "
        f"{lrs}, rho {rhos}; diverged of {len(data)} runs: {lost}. Geometric means over n={len(spec.seeds)} seeds, below over "
        "learning rates too, 95 % t intervals, verdicts by Holm over pairs and widths."
    )


def _verdict(data: pd.DataFrame, pairs: pd.DataFrame, slopes: pd.DataFrame) -> str:
    label, seeds = style.METHOD_LABEL, data.seed.nunique()
    at = [
        f"{label[row.method]} over {label[row.other]} at width {row.width:.0f}: {times(row)}, {row.verdict}{of_seeds(row, seeds)}"
        for row in pairs[pairs.what == RADIUS].itertuples()
    ]
    turns = [
        f"{label[row.method]} {_exponent(row.difference, row.half_width)} "
        f"({', '.join(filter(None, (row.bound, row.verdict)))}{of_seeds(row, seeds)})"
        for row in pairs[(pairs.what == SLOPE) & (pairs.n > 0)].itertuples()
    ]
    grows = [
        f"{label[row.method]} "
        + (UNMOVED if max(abs(row.exponent), row.half_width) < ROUNDING else _exponent(row.exponent, row.half_width))
        for row in slopes[(slopes.of == "best") & (slopes.n > 0)].itertuples()
    ]
    return (
        f"{'; '.join(at)}. Slope of the logarithm in log width: {'; '.join(turns) or 'not known'}. Exponent of the best radius in "
        f"width: {'; '.join(grows) or 'not known'}. {int(data.diverged.sum())} of {len(data)} runs diverged."
    )


def _exponent(value: float, half: float) -> str:
    """To a hundredth, with the interval where two seeds or more have one."""
    return f"{value:+.2f}" + (f" \N{PLUS-MINUS SIGN} {half:.2f}" if math.isfinite(half) else "")

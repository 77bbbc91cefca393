"""figure-5: the methods' loss minus AdamW's against the batch, the size of the model, and the repetition of the data."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from functional_sam.exhibits import style
from functional_sam.exhibits.comparison import at_radius, counted, label, left_out, plan, seen, setting
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.study.report import difference, frame, judge

__all__ = ["draw", "headline", "plan"]

LINEAR = 0.01  # nats: within it the axes are linear
PARTS = {"fixed": "Fixed length", "chinchilla": "20 tokens per parameter", "repeated": "Repeated data, best checkpoint"}


def draw(plan: Plan) -> Exhibit:
    """Above the batch, one panel a radius; below size in both regimes, and epochs. Bars are 95 % intervals; placebo in grey."""
    margin = plan.content[0].study.margin
    data = judge(frame(plan.content, plan.source), margin)
    data["epochs"] = data.units / data.unique_units
    batch = data[(data.part == "batch") & (data.lr_over_centre.sub(1).abs() < 0.01)]
    radii = sorted(batch.rho.dropna().unique()) or [math.nan]
    style.use()
    columns = max(3, len(radii))
    figure, axes = plt.subplots(2, columns, figsize=(style.PAGE, 4.2), squeeze=False)
    for axis, rho in zip(axes[0], radii, strict=False):
        lines(axis, batch[batch.rho.eq(rho) | batch.entry.eq("placebo")], "batch")
        axis.set(title=rf"Batch, $\rho$ = {rho:g}", xlabel="rows of a step")
    for axis, (part, title) in zip(axes[1], PARTS.items(), strict=False):
        x = "epochs" if part == "repeated" else "parameters"
        own = data[data.part == part]
        lines(axis, own[own.batch == own.batch.max()] if part == "fixed" else own, x)
        axis.set(title=title, xlabel="epochs over the data" if part == "repeated" else "non-embedding parameters")
    for axis in axes.flat:
        if not axis.lines:
            axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("test loss minus AdamW's\n(nats per token)")
    if len(radii) < columns:
        figure.tight_layout()
        axes[0, len(radii)].legend(*axes[0, 0].get_legend_handles_labels(), loc="center left")
    else:
        style.legend_above(figure, axes[0, 0], columns=3)
    finding = _finding(data, batch)
    caption = (
        f"{finding} Above nothing is chosen (AdamW's learning rate at each batch); below every method has as many trials; "
        f"linear within {LINEAR:g} nats, logarithmic beyond. {setting(plan, data)}{left_out(plan)}"
    )
    return Exhibit(plan, {"": data}, caption, finding, figure)


def headline(data: pd.DataFrame) -> str:
    """What the batch panel says at one radius, in a few words."""
    return at_radius(data[data.part == "batch"])


def lines(axis: Axes, part: pd.DataFrame, x: str) -> None:
    """One method a colour, a point with its interval; crosses at the top edge where runs diverged."""
    if part.empty:
        return
    axis.axhline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8)
    ticks = sorted(set(part[x]))
    groups = list(part[part.entry != "adamw"].groupby("entry", sort=False))
    for number, (name, own) in enumerate(groups):
        color = style.METHOD_COLOR.get(str(name), "#999999")
        own = own.sort_values(x)
        finite = own[own.minus_baseline.abs() < math.inf]
        halves = [difference(row).half_width for row in finite.itertuples()]
        beside = 1.0 + 0.04 * (number - (len(groups) - 1) / 2)  # so that marks do not cover each other
        axis.errorbar(
            finite[x] * beside, finite.minus_baseline, halves, color=color, marker="o", label=label(str(name)), elinewidth=0.8
        )
        for value in own[own.minus_baseline.abs() == math.inf][x]:
            axis.plot([value], [0.98], "x", color=color, transform=axis.get_xaxis_transform(), clip_on=False)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [_tick(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    style.signed_log(axis, LINEAR)


def _tick(value: float) -> str:
    return f"{value / 1e6:.2g}M" if value >= 1000 else f"{value:.0f}"


def _finding(data: pd.DataFrame, batch: pd.DataFrame) -> str:
    sentences: Sequence[str] = [
        f"{rows} rows: {counted(part[part.entry != 'placebo'])}" for rows, part in batch.groupby("batch") if len(part)
    ]
    others = data[data.part != "batch"]
    tuned = [f"{name}: {counted(part)}" for name, part in others.groupby("cell", sort=False)]
    return f"Against AdamW, over all radii: {'. '.join(sentences)}. Tuned: {'. '.join(tuned) or 'not complete'}.{seen(data)}"

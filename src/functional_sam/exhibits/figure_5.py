"""figure-5: the methods' loss minus AdamW's against the batch, the size of the model, and the repetition of the data."""

import math
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from functional_sam.exhibits import style
from functional_sam.exhibits.comparison import counted, differs, label, left_out, plan, same_runs, seen, setting
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.words import answer, sentence, tally
from functional_sam.study.compare import Verdict
from functional_sam.study.report import difference, frame, judge

__all__ = ["draw", "headline", "plan"]

LINEAR = 0.01  # nats: within it the axes are linear
BOTH = ("sam", "precond-functional-sam")  # the paper's worst and best
LONG = "long"  # as batch, at its largest length
PARTS = {
    "fixed": "Fixed length",
    "chinchilla": "20 tokens per parameter",
    "repeated": "Repeated data",
    LONG: "200 tokens per parameter",
}


def draw(plan: Plan) -> Exhibit:
    """First the batch, one panel a radius; then size in both regimes, and epochs. Bars are 95 % intervals; placebo in grey."""
    margin = plan.content[0].study.margin
    twins = same_runs(plan.content)
    once = judge(frame([one for one in plan.content if one.cell.name not in twins], plan.source), margin)
    once = judge(once, margin, "sam", family=_at_equal_rho)
    once["verdict_sam"] = [row.verdict_sam if _at_equal_rho(row) else "" for row in once.itertuples()]
    parts = {one.cell.name: one.cell.part for one in plan.content}
    again = [once[once.cell == first].assign(cell=name, part=parts[name]) for name, first in twins.items()]
    data = pd.concat([once, *again], ignore_index=True)
    data["epochs"] = data.units / data.unique_units
    data["swept"] = data.rho.where(data.trials == 0)  # the radius where none was chosen: it names a row
    batch = data[(data.part == "batch") & (data.lr_over_centre.sub(1).abs() < 0.01)]
    radii = sorted(batch.rho.dropna().unique())
    style.use()
    parts_shown = {part: title for part, title in PARTS.items() if data.part.eq(part).any()}
    figure, above, below = _panels(len(radii), len(parts_shown))
    for axis, rho in zip(above, radii, strict=True):
        with_methods = batch[batch.rho.eq(rho)]
        lines(axis, pd.concat([with_methods, batch[batch.entry.eq("placebo") & batch.batch.isin(with_methods.batch)]]), "batch")
        axis.set(title=rf"Batch, $\rho$ = {rho:g}", xlabel="rows of a step")
    for axis, (part, title) in zip(below, parts_shown.items(), strict=True):
        x = "epochs" if part == "repeated" else "parameters"
        own = data[data.part == part]
        lines(axis, own[own.batch == own.batch.max()] if part == "fixed" else own, x)
        axis.set(title=title, xlabel="epochs over the data" if part == "repeated" else "non-embedding\nparameters")
    style.legend_above(figure, (above or below)[0], columns=4)
    style.finding_above(figure, sentence(headline(data)))
    with_sam = f"Against SAM at equal rho, a family of its own: {tally(once.verdict_sam)}."
    caption = (
        f"{sentence(headline(data))} Against the batch nothing is chosen (AdamW's learning rate at each batch)"
        f"{', else every method has as many trials' if below else ''}; 95 % intervals of paired differences; linear within "
        f"{LINEAR:g} nats, logarithmic beyond. "
        f"{setting(plan, data)}{seen(once)} {with_sam}{left_out(plan, once)}"
    )
    tuned = once[once.part.isin(["fixed", "chinchilla"]) & once.entry.eq("precond-functional-sam")]
    found = answer(tuned.verdict_baseline, Verdict.BETTER)
    return Exhibit(plan, {"": data}, caption, _finding(data, batch), figure, answer=found)


def _panels(first: int, others: int) -> tuple[Figure, list[Axes], list[Axes]]:
    """A panel for each radius, and one for each other part: beside them where four are enough, else below."""
    if first + others <= 4:
        columns = max(3, first + others)
        figure = plt.figure(figsize=(style.PAGE, 2.6))
        found = [figure.add_subplot(1, columns, 1 + number) for number in range(first + others)]
    else:
        columns = max(first, others)
        figure = plt.figure(figsize=(style.PAGE, 4.4))
        places = [*range(first), *range(columns, columns + others)]
        found = [figure.add_subplot(2, columns, 1 + place) for place in places]
    for axis in found[:1] if first + others <= 4 else [found[0], found[first]]:
        axis.set_ylabel("test loss minus AdamW's\n(nats per token)")
    return figure, found[:first], found[first:]


def _at_equal_rho(row: Any) -> bool:
    """Whether a row and SAM's were run at one radius, none of them chosen."""
    return int(row.trials) == 0


def headline(data: pd.DataFrame) -> str:
    """The paper's best method at the largest size, of fixed length and by tokens per parameter, in a few words."""
    found = []
    for part, words in (("fixed", "fixed length"), ("chinchilla", "20 tokens per parameter")):
        own = data[data.part.eq(part) & data.entry.eq("precond-functional-sam")]
        own = own[(own.parameters == own.parameters.max()) & (own.batch == own.batch.max())]  # the panel shows that batch
        found += [f"{differs(row, 'baseline')} at {style.count(row.parameters)} parameters ({words})" for row in own.itertuples()]
    if found:
        return f"Precond Functional-SAM minus AdamW, nats: {', '.join(found)}"
    swept = data[(data.part == "batch") & data.rho.sub(0.05).abs().lt(1e-9) & data.entry.isin(BOTH)]
    swept = swept[swept.lr_over_centre.sub(1).abs().lt(0.01) & (swept.batch == swept.batch.max())]
    words = ", ".join(f"{label(row.entry)} {differs(row, 'baseline')}" for row in swept.itertuples())
    return f"minus AdamW at {swept.batch.iloc[0]} rows, rho 0.05: {words}" if words else "no size is complete"


def lines(axis: Axes, part: pd.DataFrame, x: str) -> None:
    """One method a colour and marker, a point with its interval at each value of x, evenly spaced; crosses where runs diverged."""
    if part.empty:
        return
    axis.axhline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8, label="AdamW")
    values = sorted(set(part[x]))
    groups = list(part[part.entry != "adamw"].groupby("entry", sort=False))
    for (name, own), offset in zip(groups, style.offsets(len(groups), 0.6 / max(len(groups), 1)), strict=True):
        rows = list(own.sort_values(x).itertuples())
        places = [values.index(getattr(row, x)) + offset for row in rows]
        style.marks(axis, places, [difference(row) for row in rows], str(name), label=label(str(name)))
        for place, row in zip(places, rows, strict=True):
            if math.isinf(row.minus_baseline):
                style.diverged(axis, place, str(name))
    axis.set_xticks(range(len(values)), [f"{value:.0f}" if x != "parameters" else style.count(value) for value in values])
    axis.set_xlim(-0.5, len(values) - 0.5)
    style.signed_log(axis, LINEAR)


def _finding(data: pd.DataFrame, batch: pd.DataFrame) -> str:
    sentences = [f"{rows} rows: {counted(part[part.entry != 'placebo'])}" for rows, part in batch.groupby("batch") if len(part)]
    others = data[~data.part.isin(["batch", LONG])]
    tuned = [f"{name}: {counted(part)}" for name, part in others.groupby("cell", sort=False)]
    long = data[data.part.eq(LONG) & data.entry.ne("placebo")]
    sentences += [f"200 tokens per parameter: {counted(long)}"] if len(long) else []
    with_sam = [f"{rows} rows: {counted(part, 'sam')}" for rows, part in batch.groupby("batch") if part.minus_sam.notna().any()]
    found = f"Against AdamW, over all radii: {'. '.join(sentences)}. Tuned: {'. '.join(tuned) or 'not complete'}.{seen(data)}"
    return f"{found} Against SAM at equal rho: {'. '.join(with_sam)}." if with_sam else found

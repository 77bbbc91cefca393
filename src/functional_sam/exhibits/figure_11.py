"""figure-11: what flatness buys when the loss does not show it: rounded weights, jittered weights, training on other text."""

import math
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from functional_sam.exhibits import style
from functional_sam.exhibits.comparison import differs, label, left_out, plan, setting, would_have_seen
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.words import answer, sentence, tally
from functional_sam.records import Source
from functional_sam.study.compare import Verdict, estimate, judged, paired_difference
from functional_sam.study.report import check, difference, frame
from functional_sam.study.tune import Planned

__all__ = ["draw", "headline", "plan"]

TRAINED = "as trained"  # no change: the loss itself, which is to be matched where increases are compared
KINDS = {TRAINED: "", "rounding": "bits", "noise": "noise / RMS of a tensor", "forgetting": "steps on other text"}
WITH_SAM = ("functional-sam", "precond-functional-sam")  # whose increase the protocol compares with SAM's as well
PHRASES = {  # a run that diverged has an infinite increase
    "smaller": (Verdict.BETTER, Verdict.WON),
    "larger": (Verdict.WORSE, Verdict.LOST),
    "no different": (Verdict.SAME,),
    "inconclusive": (Verdict.OPEN,),
}
HARD: dict[str, tuple[float, ...]] = {
    TRAINED: (),
    "rounding": (4, 3),
    "noise": (0.1, 0.2),
    "forgetting": (200,),
}  # where the protocol predicts a difference
HOW = {"rounding": "{} bits", "noise": "noise {}", "forgetting": "{} steps elsewhere"}


def draw(plan: Plan) -> Exhibit:
    """A row a cell, a panel a kind of change: the increase of the loss minus AdamW's increase, paired by seed.

    First the loss before any change, minus AdamW's. A kind that no run was measured on (other text at paper scale) has no panel.
    """
    rows = [row for one in plan.content for row in increases(one, plan.source)]
    baseline = plan.content[0].cell.entries[0]
    data = _judged(pd.DataFrame(rows), baseline, plan.content[0].study.margin)
    style.use()
    cells, kinds = list(dict.fromkeys(data.cell)), [kind for kind in KINDS if data.kind.eq(kind).any()]
    figure, axes = plt.subplots(
        len(cells),
        len(kinds),
        figsize=(style.PAGE, 2.2 * len(cells) + 0.3),
        squeeze=False,
        sharey="row",
        gridspec_kw={"width_ratios": [0.4 if kind == TRAINED else 1.0 for kind in kinds]},
    )
    for line, cell in zip(axes, cells, strict=True):
        for axis, kind in zip(line, kinds, strict=True):
            _panel(axis, data[(data.cell == cell) & (data.kind == kind)])
            axis.set(title=kind, xlabel=KINDS[kind])
        line[0].set_ylabel("loss, or its increase,\nminus AdamW's (nats per token)")
    style.legend_above(figure, axes[0, -1])
    finding = sentence(headline(data))
    style.finding_above(figure, finding)
    base = data[data.entry == baseline]
    scale = "; ".join(f"{kind} {_own(base, kind)}" for kind in kinds if HARD[kind])
    other = (
        "other text is AWS documentation, cut by the same tokenizer" if "forgetting" in kinds else "other text was not trained on"
    )
    caption = (
        f"{finding} AdamW's own increase in nats: {scale}; {other}; {_before(data)}; functional methods minus SAM, of the same "
        f"family: {tally(data.verdict_sam)}. "
        f"{setting(plan, frame(plan.content, plan.source))}{_seen(data)}{left_out(plan)}"
    )
    hard = [row.verdict for row in data.itertuples() if row.entry == "sam" and row.level in HARD[row.kind]]
    return Exhibit(plan, {"": data}, caption, finding, figure, answer=answer(hard, Verdict.BETTER))


def increases(one: Planned, source: Source) -> list[dict[str, Any]]:
    """A row an entry, kind and level: the loss on the run's own text after the change minus that before.

    minus_baseline, minus_sam: minus AdamW's increase, and of the functional methods minus SAM's.
    """
    check([one], source)
    runs, base = one.by_entry, one.cell.entries[0]
    records = {name: [source.read(c, "robustness.json") if _finished(c, source) else None for c in of] for name, of in runs.items()}
    sam = records.get("sam")
    rows = []
    for name, own in records.items():
        for kind, level in [(TRAINED, 0.0), *_levels(record for of in records.values() for record in of)]:
            after, theirs = ([_increase(record, kind, level) for record in of] for of in (own, records[base]))
            mean, minus = estimate(after), paired_difference(after, theirs)
            row = {"cell": one.cell.name, "task": one.cell.task, "entry": name, "kind": kind, "level": level, "n": len(own)}
            row |= {"increase": mean.mean, "increase_stderr": mean.stderr}
            row |= {"there": estimate([_there(record, kind, level) for record in own]).mean}
            row |= {"minus_baseline": minus.mean, "minus_baseline_stderr": minus.stderr}
            compared = sam is not None and name in WITH_SAM and kind != TRAINED
            against = paired_difference(after, [_increase(record, kind, level) for record in sam or ()]) if compared else None
            row |= {"minus_sam": math.nan if against is None else against.mean}
            rows.append(row | {"minus_sam_stderr": math.nan if against is None else against.stderr})
    return rows


def headline(data: pd.DataFrame) -> str:
    """How the increases compare with AdamW's where the change is hard, in a few words."""
    told = [row for row in data.itertuples() if isinstance(row.verdict, str) and row.verdict]  # nan where a CSV was read
    hard = [row.verdict for row in told if row.level in HARD[row.kind]]
    counts = [f"{sum(word in words for word in hard)} {phrase}" for phrase, words in PHRASES.items()]
    kinds = [kind for kind in HARD if HARD[kind] and any(row.kind == kind for row in told)]
    how = ", ".join(HOW[kind].format(" or ".join(f"{level:g}" for level in HARD[kind])) for kind in kinds)
    return f"loss increase ({how}) against AdamW's: {len(hard)} cases, {', '.join(counts)}"


def _finished(config: Any, source: Source) -> bool:
    return not source.summary(config).get("diverged")


def _levels(records: Iterable[dict[str, Any] | None]) -> list[tuple[str, float]]:
    """(kind, level) of the changes that were measured, by the first run that did not diverge; none where all did."""
    record = next((record for record in records if record is not None), None)
    if record is None:
        return []
    found = [(kind, float(level)) for kind in ("rounding", "noise") for level in record[kind]]
    return found + [("forgetting", float(level)) for level in record.get("elsewhere", {}) if level != "0"]


def _increase(record: dict[str, Any] | None, kind: str, level: float) -> float:
    """Of the loss (of no change the loss itself); inf for a run that diverged or a loss that is not finite."""
    if record is None:
        return math.inf
    if kind == TRAINED:
        return float(record["loss"])
    value = record["elsewhere"][f"{level:g}"]["here"] if kind == "forgetting" else record[kind][f"{level:g}"]
    return math.inf if value is None else float(value) - float(record["loss"])


def _there(record: dict[str, Any] | None, kind: str, level: float) -> float:
    """The loss on the other text; nan where none was trained on."""
    if record is None or kind != "forgetting":
        return math.nan
    value = record["elsewhere"][f"{level:g}"]["there"]
    return math.inf if value is None else float(value)


def _judged(data: pd.DataFrame, baseline: str, margin: float) -> pd.DataFrame:
    """With verdicts, Holm over the exhibit: increases minus the baseline's, which is not compared to itself, and minus SAM's."""
    own = data.kind.ne(TRAINED) & data.entry.ne(baseline)
    with_sam = [difference(row, "sam").n > 0 for row in data.itertuples()]
    found = [difference(row) for row in data[own].itertuples()]
    found += [difference(row, "sam") for row in data[with_sam].itertuples()]
    words = iter(map(str, judged(found, margin=margin)))
    data = data.assign(verdict=[next(words) if compared else "" for compared in own])
    return data.assign(verdict_sam=[next(words) if compared else "" for compared in with_sam])


def _panel(axis: Axes, data: pd.DataFrame) -> None:
    axis.axhline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8)
    entries = [name for name in dict.fromkeys(data.entry) if name != "adamw"]
    levels = sorted(set(data.level), reverse=data.kind.iloc[0] == "rounding")  # from gentle to hard
    for shift, name in zip(np.linspace(-0.18, 0.18, len(entries)), entries, strict=True):
        own = data[data.entry == name].set_index("level").loc[levels]
        found = [difference(row) for row in own.itertuples()]
        style.marks(axis, list(np.arange(len(levels)) + shift), found, name, label=label(name), joined=False)
    axis.set_xticks(range(len(levels)), [f"{level:g}" if data.kind.iloc[0] != TRAINED else "" for level in levels])
    axis.set_xlim(-0.5, len(levels) - 0.5)
    style.signed_log(axis, 0.01)


def _before(data: pd.DataFrame) -> str:
    """How far the methods' losses are from AdamW's to begin with, in words."""
    own = data[data.kind.eq(TRAINED) & data.entry.ne("adamw")]
    several = own.cell.nunique() > 1
    each = [f"{label(row.entry)} {differs(row, 'baseline')}{f' ({row.cell})' if several else ''}" for row in own.itertuples()]
    return f"the loss before minus AdamW's, which is not matched: {', '.join(each)}"


def _seen(data: pd.DataFrame) -> str:
    found = [(difference(row), row.verdict) for row in data.itertuples()]
    found += [(difference(row, "sam"), row.verdict_sam) for row in data.itertuples()]
    return would_have_seen(one.detectable for one, word in found if word == Verdict.OPEN)


def _own(base: pd.DataFrame, kind: str) -> str:
    own = base[base.kind == kind]
    return ", ".join(f"{row.increase:.3g} at {row.level:g}" for row in own.itertuples() if row.level in HARD[kind])

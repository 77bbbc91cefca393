"""table-1: SAM and Functional-SAM against AdamW at equal steps, a row a cell; the runs are table-2's and table-3's."""

from typing import Any

import pandas as pd

from functional_sam.exhibits import markdown
from functional_sam.exhibits.comparison import (
    counted,
    differences,
    label,
    left_out,
    level,
    place,
    plan,
    same_runs,
    seen,
    setting,
    with_verdict,
)
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.words import answer, sentence
from functional_sam.study.compare import Verdict
from functional_sam.study.report import frame, judge

__all__ = ["draw", "headline", "plan"]

SHOWN = ("sam", "functional-sam")


def draw(plan: Plan) -> Exhibit:
    """One row a cell; Holm over the differences of the two methods to AdamW."""
    margin = plan.content[0].study.margin
    twins = same_runs(plan.content)
    data = frame([one for one in plan.content if one.cell.name not in twins], plan.source)
    data = data[data.entry.isin(["adamw", *SHOWN])].reset_index(drop=True)
    parts = {one.cell.name: one.cell.part for one in plan.content}
    for name, first in twins.items():  # one comparison is one, in whichever regime
        data.loc[data.cell == first, "part"] += f", {parts[name]}"
    data = judge(judge(data, margin), margin, "sam")
    cells = "; ".join(f"{name}: {counted(part)}" for name, part in data.groupby("cell", sort=False))
    caption = f"{sentence(headline(data))}{seen(data)} {setting(plan, data)}{left_out(plan)}"
    found = answer(data[data.entry == "sam"].verdict_baseline, Verdict.WORSE)
    return Exhibit(plan, {"": data}, caption, f"Against AdamW: {cells}.{seen(data)}", markdown=_markdown(data), answer=found)


def headline(data: pd.DataFrame) -> str:
    """How both methods compare with AdamW, in a few words."""
    return ", ".join(f"{label(name)} minus AdamW {differences(data[data.entry == name])}" for name in SHOWN)


def _markdown(data: pd.DataFrame) -> str:
    columns = ["training", "setting", *(f"{label(name)} against AdamW" for name in SHOWN), "Functional-SAM against SAM"]
    columns += ["AdamW's test loss (nats per token)", "n"]
    lines = []
    for _, part in data.groupby("cell", sort=False):
        rows: dict[str, Any] = {row.entry: row for row in part.itertuples()}
        base = rows["adamw"]
        cells = [base.part, place(base), *(with_verdict(rows[name], "baseline") if name in rows else "" for name in SHOWN)]
        cells.append(with_verdict(rows["functional-sam"], "sam") if "functional-sam" in rows else "")
        lines.append([*cells, level(base), f"{base.n}"])
    return markdown.table(columns, lines, text=columns[1:-2])

"""table-1: SAM and Functional-SAM against AdamW at equal steps, a row a cell; the runs are table-2's and table-3's."""

from typing import Any

import pandas as pd

from functional_sam.exhibits import markdown
from functional_sam.exhibits.comparison import counted, headline, label, left_out, place, plan, seen, setting, with_verdict
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.study.compare import Estimate
from functional_sam.study.report import frame, judge

__all__ = ["draw", "headline", "plan"]

SHOWN = ("sam", "functional-sam")


def draw(plan: Plan) -> Exhibit:
    """One row a cell; Holm over the differences of the two methods to AdamW."""
    margin = plan.content[0].study.margin
    data = frame(plan.content, plan.source)
    data = data[data.entry.isin(["adamw", *SHOWN])].reset_index(drop=True)
    data = judge(judge(data, margin), margin, "sam")
    finding = (
        f"Against AdamW: {'; '.join(f'{name}: {counted(part)}' for name, part in data.groupby('cell', sort=False))}.{seen(data)}"
    )
    caption = f"{finding} {setting(plan, data)}{left_out(plan)}"
    return Exhibit(plan, {"": data}, caption, finding, markdown=_markdown(data))


def _markdown(data: pd.DataFrame) -> str:
    columns = ["training", "setting", "AdamW's test loss (nats per token)"]
    columns += [f"{label(name)} minus AdamW, verdict" for name in SHOWN] + ["Functional-SAM minus SAM, verdict", "n"]
    lines = []
    for _, part in data.groupby("cell", sort=False):
        rows: dict[str, Any] = {row.entry: row for row in part.itertuples()}
        base = rows["adamw"]
        half = Estimate(base.test, base.test_stderr, base.n).half_width
        cells = [base.part, place(base), markdown.interval(base.test, half)]
        cells += [with_verdict(rows[name], "baseline") if name in rows else "" for name in SHOWN]
        cells.append(with_verdict(rows["functional-sam"], "sam") if "functional-sam" in rows else "")
        lines.append([*cells, f"{base.n}"])
    return markdown.table(columns, lines, text=columns[1:-1])

"""table-2: the five methods at every size, the same number of steps at each; table-3 is the same of another part of the study."""

from functional_sam.exhibits.comparison import counted, headline, left_out, plan, rows_of, seen, setting
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.study.report import frame, judge

__all__ = ["draw", "headline", "plan"]


def draw(plan: Plan) -> Exhibit:
    """One row an entry and cell; Holm over all differences to AdamW, and over all to SAM."""
    margin = plan.content[0].study.margin
    data = judge(judge(frame(plan.content, plan.source), margin), margin, "sam")
    words = "; ".join(f"{name}: {counted(part)}" for name, part in data.groupby("cell", sort=False))
    finding = f"Against AdamW, tuned with as many trials: {words}.{seen(data)}"
    against_sam = f"Against SAM: {counted(data, 'sam')}."
    return Exhibit(
        plan, {"": data}, f"{finding} {setting(plan, data)}{left_out(plan)}", f"{finding} {against_sam}", markdown=rows_of(data)
    )

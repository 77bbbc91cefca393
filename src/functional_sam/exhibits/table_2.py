"""table-2: the five methods at every size, the same number of steps at each; table-3 is the same of another part of the study."""

import pandas as pd

from functional_sam.exhibits.comparison import counted, differences, left_out, plan, rows_of, seen, setting
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.words import answer, sentence
from functional_sam.study.compare import Verdict
from functional_sam.study.report import frame, judge

__all__ = ["draw", "headline", "plan"]

PRECOND = ("precond-sam", "precond-functional-sam")


def draw(plan: Plan) -> Exhibit:
    """One row an entry and cell; Holm over all differences to AdamW, and over all to SAM."""
    margin = plan.content[0].study.margin
    data = judge(judge(frame(plan.content, plan.source), margin), margin, "sam")
    words = "; ".join(f"{name}: {counted(part)}" for name, part in data.groupby("cell", sort=False))
    verdict = f"Against AdamW, tuned with as many trials: {words}.{seen(data)} Against SAM: {counted(data, 'sam')}."
    caption = f"{sentence(headline(data))}{seen(data)} {setting(plan, data)}{left_out(plan, data)}"
    found = answer(data[data.entry.isin(PRECOND)].verdict_sam, Verdict.BETTER)
    return Exhibit(plan, {"": data}, caption, verdict, markdown=rows_of(data), answer=found)


def headline(data: pd.DataFrame) -> str:
    """How the preconditioned methods compare with SAM, and all with AdamW, in a few words."""
    against = differences(data[data.entry.isin(PRECOND)], "sam")
    return f"preconditioned methods minus SAM {against}; all methods minus AdamW {differences(data)}"

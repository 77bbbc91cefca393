"""table-8: equal compute, other variants at equal steps, and repeated data with every method tuned and stopped alike."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from functional_sam.exhibits import markdown
from functional_sam.exhibits.comparison import counted, headline, label, left_out, of_part, plan, rows_of, seen, setting
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, judged, paired_difference
from functional_sam.study.report import frame, judge, tested
from functional_sam.study.tune import Planned

__all__ = ["draw", "equal_compute", "headline", "plan"]


def draw(plan: Plan) -> Exhibit:
    """One table a block; Holm within each block."""
    margin = plan.content[0].study.margin
    compute = equal_compute(plan.content, plan.source, margin)
    blocks = {"variants": "Variants, equal steps", "repeated": "Repeated data, best validation checkpoint"}
    frames, tables, words = [], [], []
    if len(compute):
        tables += [
            "**Equal compute**: each method against AdamW with the steps that its time buys, tuned again\n",
            _compute(compute),
        ]
        words.append(f"At equal compute {counted(compute.rename(columns={'verdict': 'verdict_baseline'}))}")
    for part, title in blocks.items():
        own = of_part(plan.content, part)
        if own:
            data = judge(frame(own, plan.source), margin)
            frames.append(data)
            tables += [f"\n**{title}**\n", rows_of(data.drop(columns=["minus_sam"]))]
            words += [f"{name}: {counted(of)}" for name, of in data.groupby("cell", sort=False)]
    everything = pd.concat(frames, ignore_index=True) if frames else judge(frame(plan.content, plan.source), margin)
    finding = f"Against AdamW: {'. '.join(words)}.{seen(everything)}"
    caption = f"{finding} {setting(plan, everything)}{left_out(plan)}"
    return Exhibit(plan, {"": everything, "compute": compute}, caption, finding, markdown="\n".join(tables))


def equal_compute(planned: Sequence[Planned], source: Source, margin: float) -> pd.DataFrame:
    """A row a method of the cells "compute", and of those cells "fixed" that have its setting: against AdamW with as much time."""
    rows: list[dict[str, Any]] = []
    for cell in of_part(planned, "compute"):
        longer = {name: configs for (name, _), configs in cell.reported.items()}
        for one in [cell, *[other for other in of_part(planned, "fixed") if _same_setting(other, cell)]]:
            for (name, trial), configs in one.reported.items():
                matched = one.study.entries[name].matched
                if name.startswith("adamw") or matched not in longer:
                    continue
                own, theirs, equal = (
                    tested(of, source, one.cell.best) for of in (configs, longer[matched], longer[cell.cell.entries[0]])
                )
                found, at_equal_steps = paired_difference(own, theirs), paired_difference(own, equal)
                rows.append(
                    {
                        "cell": cell.cell.name,
                        "entry": name,
                        "label": one.study.entries[name].label,
                        "rho": trial.get("method.rho"),
                        "matched": matched,
                        "times": one.study.entries[matched].steps,
                        "n": found.n,
                        "minus_matched": found.mean,
                        "minus_matched_stderr": found.stderr,
                        "minus_equal_steps": at_equal_steps.mean,
                        "minus_equal_steps_stderr": at_equal_steps.stderr,
                    }
                )
    words = judged([Estimate(row["minus_matched"], row["minus_matched_stderr"], row["n"]) for row in rows], margin=margin)
    return pd.DataFrame([row | {"verdict": str(word)} for row, word in zip(rows, words, strict=True)])


def _same_setting(one: Planned, cell: Planned) -> bool:
    """Whether two cells differ in their entries alone, so that their runs can be paired."""
    first, second = (next(iter(of.reported.values()))[0] for of in (one, cell))
    same = (first.task, first.training.batch, first.training.steps) == (second.task, second.training.batch, second.training.steps)
    return same and one.cell.seeds == cell.cell.seeds


def _compute(data: pd.DataFrame) -> str:
    columns = ["method", "rho", "AdamW's steps", "n", "minus AdamW, equal steps", "minus AdamW, equal compute", "verdict"]
    lines = []
    for row in data.itertuples():
        both = (Estimate(getattr(row, key), getattr(row, f"{key}_stderr"), row.n) for key in ("minus_equal_steps", "minus_matched"))
        differences = [
            "diverged" if math.isinf(one.mean) else markdown.interval(one.mean, one.half_width, sign=True) for one in both
        ]
        lines.append([label(row.entry, row.label), f"{row.rho:g}", f"{row.times:g} times", f"{row.n}", *differences, row.verdict])
    return markdown.table(columns, lines, text=["verdict"])

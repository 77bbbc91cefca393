"""table-8: equal compute, other variants at equal steps, and repeated data with every method tuned and stopped alike."""

from collections.abc import Sequence

import pandas as pd

from functional_sam.exhibits import markdown
from functional_sam.exhibits.comparison import counted, differs, label, left_out, of_part, plan, rows_of, seen, setting
from functional_sam.exhibits.comparison import headline as tally
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.records import Source
from functional_sam.study.compare import paired_difference
from functional_sam.study.report import frame, judge, tested
from functional_sam.study.tune import Planned

__all__ = ["draw", "equal_compute", "headline", "plan", "same_setting"]


BLOCKS = {"variants": "Variants, equal steps", "repeated": "Repeated data, best validation checkpoint"}
EQUAL_COMPUTE = "equal compute"  # the part of rows whose baseline has more steps


def draw(plan: Plan) -> Exhibit:
    """One table a block; Holm over all comparisons of the exhibit."""
    margin = plan.content[0].study.margin
    parts = [frame(own, plan.source) for own in (of_part(plan.content, part) for part in BLOCKS) if own]
    parts += [equal_compute(plan.content, plan.source)] if of_part(plan.content, "compute") else []
    data = judge(pd.concat(parts, ignore_index=True) if parts else frame(plan.content, plan.source), margin)
    compute = data[data.part == EQUAL_COMPUTE]
    tables, words = [], []
    if len(compute):
        what = "each method against AdamW with the steps that its time buys, tuned again"
        tables += [f"**Equal compute**: {what}\n", _compute(compute)]
        words.append(f"at equal compute {counted(compute)}")
    for part, title in BLOCKS.items():
        own = data[data.part == part]
        if len(own):
            tables += [f"\n**{title}**\n", rows_of(own.drop(columns=["minus_sam"]))]
            words += [f"{name}: {counted(of)}" for name, of in own.groupby("cell", sort=False)]
    finding = f"Against AdamW: {'. '.join(words)}.{seen(data)}"
    caption = f"{finding} {setting(plan, data)}{left_out(plan)}"
    return Exhibit(plan, {"": data}, caption, finding, markdown="\n".join(tables))


def headline(data: pd.DataFrame) -> str:
    """How the comparisons came out, those at equal compute by name, in a few words."""
    compute = data[data.part == EQUAL_COMPUTE]
    return f"{tally(data)}" + (f"; at equal compute {counted(compute)}" if len(compute) else "")


def equal_compute(planned: Sequence[Planned], source: Source) -> pd.DataFrame:
    """A row a method of the cells "compute", and of those cells "fixed" that have its setting: minus AdamW with as much time."""
    frames = []
    for cell in of_part(planned, "compute"):
        longer = {name: configs for (name, _), configs in cell.reported.items()}
        for one in [cell, *[other for other in of_part(planned, "fixed") if same_setting(other, cell)]]:
            data, entries = frame([one], source), one.study.entries
            data = data[[entries[name].matched in longer for name in data.entry]].copy()
            pairs = [one.reported[key] for key in one.reported if entries[key[0]].matched in longer]
            matched = [entries[name].matched for name in data.entry]
            found = [
                paired_difference(*(tested(of, source, one.cell.best) for of in (configs, longer[name])))
                for configs, name in zip(pairs, matched, strict=True)
            ]
            data["minus_equal_steps"], data["minus_equal_steps_stderr"] = data.minus_baseline, data.minus_baseline_stderr
            data["minus_baseline"], data["minus_baseline_stderr"] = [e.mean for e in found], [e.stderr for e in found]
            data["matched"], data["times"] = matched, [entries[name].steps for name in matched]
            data["part"], data["cell"] = EQUAL_COMPUTE, cell.cell.name
            frames.append(data)
    return pd.concat(frames, ignore_index=True)


def same_setting(one: Planned, cell: Planned) -> bool:
    """Whether two cells differ in their entries alone, so that their runs can be paired."""
    first, second = (next(iter(of.reported.values()))[0] for of in (one, cell))
    same = (first.task, first.training.batch, first.training.steps) == (second.task, second.training.batch, second.training.steps)
    return same and one.cell.seeds == cell.cell.seeds


def _compute(data: pd.DataFrame) -> str:
    columns = ["method", "rho", "AdamW's steps", "n", "minus AdamW, equal steps", "minus AdamW, equal compute", "verdict"]
    lines = []
    for row in data.itertuples():
        own = [label(row.entry, row.label), f"{row.rho:g}", f"{row.times:g} times", f"{row.n}"]
        lines.append([*own, differs(row, "equal_steps"), differs(row, "baseline"), row.verdict_baseline])
    return markdown.table(columns, lines, text=["verdict"])

"""table-8: equal compute, other variants at equal steps, and repeated data with every method tuned and stopped alike."""

from collections.abc import Sequence

import pandas as pd

from functional_sam.exhibits import comparison, markdown
from functional_sam.exhibits.comparison import counted, differs, label, left_out, of_part, rows_of, seen, setting
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import answer, sentence, tally
from functional_sam.records import Source
from functional_sam.study.compare import Verdict, paired_difference
from functional_sam.study.design import Cell, Study
from functional_sam.study.report import frame, judge, tested
from functional_sam.study.tune import Planned

BLOCKS = {"variants": "Variants, equal steps", "repeated": "Repeated data, best validation checkpoint"}
EQUAL_COMPUTE = "equal compute"  # the part of rows whose baseline has more steps


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """The cells of the exhibit's parts; of those of fixed length the ones that equal compute is compared with."""
    return comparison.plan(spec, source, overrides, has_a_place)


def has_a_place(study: Study, cell: Cell) -> bool:
    """Whether the exhibit shows a cell: of fixed length those with the setting of equal compute, for table-2 has them all."""
    alike = [same_setting(cell, other) for other in study.cells.values() if other.part == "compute"]
    return cell.part != "fixed" or not alike or any(alike)


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
    verdict = f"Against AdamW: {'. '.join(words)}.{seen(data)}"
    caption = f"{sentence(headline(data))}{seen(data)} {setting(plan, data)}{left_out(plan, data)}"
    found = answer(compute[compute.entry == "sam"].verdict_baseline, Verdict.WORSE)
    return Exhibit(plan, {"": data}, caption, verdict, markdown="\n".join(tables), answer=found)


def headline(data: pd.DataFrame) -> str:
    """SAM against AdamW with twice the steps, and how all comparisons came out, in a few words."""
    compute = data.part == EQUAL_COMPUTE
    at_compute, at_steps = (tally(own.verdict_baseline) for own in (data[compute], data[~compute]))
    found = [
        f"SAM minus AdamW at equal compute {differs(row, 'baseline')} nats (all methods: {at_compute})"
        for row in data[compute & (data.entry == "sam")].itertuples()
    ]
    found += [f"at equal steps {at_steps}"] if (~compute).any() else []
    return "; ".join(found) or "nothing to compare"


def equal_compute(planned: Sequence[Planned], source: Source) -> pd.DataFrame:
    """A row a method of the cells "compute", and of those cells "fixed" that have its setting: minus AdamW with as much time."""
    frames = []
    for cell in of_part(planned, "compute"):
        longer = cell.by_entry
        for one in [cell, *[other for other in of_part(planned, "fixed") if same_setting(other.cell, cell.cell)]]:
            data, entries = frame([one], source), one.study.entries
            data = data[[entries[name].matched in longer for name in data.entry]].copy()
            pairs = [configs for name, configs in one.by_entry.items() if entries[name].matched in longer]
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


def same_setting(one: Cell, other: Cell) -> bool:
    """Whether two cells differ in their entries and grids alone, so that their runs can be paired."""
    alike = ("task", "settings", "steps", "tokens_per_parameter", "epochs", "seeds")
    return all(getattr(one, name) == getattr(other, name) for name in alike)


def _compute(data: pd.DataFrame) -> str:
    columns = ["method", "at equal compute", "minus AdamW, equal compute", "minus AdamW, equal steps", "AdamW's steps", "rho", "n"]
    lines = []
    for row in data.itertuples():
        own = [label(row.entry, row.label), row.verdict_baseline, differs(row, "baseline"), differs(row, "equal_steps")]
        lines.append([*own, f"{row.times:g} times", f"{row.rho:g}", f"{row.n}"])
    return markdown.table(columns, lines, text=columns[1:4])

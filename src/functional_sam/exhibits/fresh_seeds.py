"""figure-3 on fresh seeds: what three seeds had shown, tested on others in a small family (paper/PROTOCOL.md, `fresh-64`)."""

from typing import Any

import pandas as pd

from functional_sam.exhibits.comparison import label
from functional_sam.exhibits.markdown import interval
from functional_sam.exhibits.pairs import by_seed
from functional_sam.study.compare import Estimate, family

PART = "fresh"
COMPARED = (("sam", "adamw"), ("functional-sam", "sam"), ("functional-sam", "adamw"))


def on_fresh_seeds(seeds: pd.DataFrame, margin: float) -> pd.DataFrame:
    """One row a cell, comparison and radius: test loss minus the other's, paired by seed, p by Holm, verdict; a cell is a family.

    seeds: report.by_seed of the cells; where the other is AdamW, the difference is with its run of the same seed.
    """
    tables = []
    for cell, part in seeds.groupby("cell", sort=False):
        rows: list[dict[str, Any]] = []
        found: list[Estimate] = []
        for name, other in COMPARED:
            for rho, own in part[part.entry == name].groupby("rho"):
                theirs = part[part.entry.eq(other) & (part.rho.eq(rho) | part.rho.isna())]
                found.append(by_seed(own, theirs, "test", f"{cell}: {name} minus {other} at rho {rho:g}"))
                rows.append({"cell": cell, "batch": own.batch.iloc[0], "entry": name, "other": other, "rho": rho})
        tables.append(pd.DataFrame(rows).assign(**family(found, margin)))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def with_verdicts(data: pd.DataFrame, fresh: pd.DataFrame) -> pd.DataFrame:
    """The study's frame, in which rows on fresh seeds have the verdict against AdamW that they have in their own family."""
    if fresh.empty:
        return data
    own = fresh[fresh.other == "adamw"]
    words = {(row.cell, row.entry, row.rho): row.verdict for row in own.itertuples()}
    keys = zip(data.cell, data.entry, data.rho, strict=True)
    told = [words.get(key, old) for key, old in zip(keys, data.verdict_baseline, strict=True)]
    return data.assign(verdict_baseline=told)


def in_words(fresh: pd.DataFrame) -> str:
    """All comparisons with their intervals and verdicts, as a sentence; empty for none."""
    if fresh.empty:
        return ""
    each = []
    for (name, other), part in fresh.groupby(["entry", "other"], sort=False):
        numbers = [f"{interval(r.difference, r.half_width, sign=True)} ({r.verdict}) at rho {r.rho:g}" for r in part.itertuples()]
        each.append(f"{label(str(name))} minus {label(str(other))} {', '.join(numbers)}")
    return (
        f" On fresh seeds ({fresh.batch.iloc[0]} rows, n = {fresh.n.iloc[0]}), {len(fresh)} comparisons written down beforehand, a "
        f"family of their own: {'; '.join(each)}."
    )

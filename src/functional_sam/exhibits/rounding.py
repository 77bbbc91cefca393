"""figure-9 in bf16: does rounding bring the radius that breaks training nearer, and whose more (paper/PROTOCOL.md, 2026-11-29)."""

import math

import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits.breaking import PAIRS, SAME, frontier, grid, log_ratio, of_seeds, row_of, times, together, verdicts
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.style import METHOD_LABEL
from functional_sam.study.compare import Verdict

BF16, FLOAT32 = "bf16", "float32"
AGAINST_FLOAT32, WITHIN = "bf16 over float32", "functional over SAM's path, in bf16"
WORDS = {
    AGAINST_FLOAT32: {Verdict.BETTER: "later in bf16", Verdict.WORSE: "earlier in bf16", Verdict.SAME: "the frontiers coincide"},
    WITHIN: {Verdict.BETTER: "later", Verdict.WORSE: "earlier", Verdict.SAME: "the frontiers coincide"},
}


def configs_in_bf16(spec: Spec, overrides: tuple[str, ...]) -> list[Config]:
    """The runs of the spec's cells, seeds first."""
    low = {"training": {"precision": BF16}}
    cells = [(seed, cell) for seed in spec.seeds for cell in spec.cells.values()]
    return [config for seed, cell in cells for config in grid(spec, cell["task"], seed, cell["lr"], overrides, low)]


def first_precision(data: pd.DataFrame) -> pd.DataFrame:
    """The rows of the figure's own grid: float32, or what an override of the command line made of it."""
    return data[data.precision == data.precision.iloc[0]]


def compared_in_bf16(data: pd.DataFrame) -> pd.DataFrame:
    """G, log rho_b in bf16 minus in float32, of each method, and F of each pair in bf16: one family. Empty without bf16.

    float32 as if it had been run where bf16 was: at its widths and learning rates alone.
    """
    low = data[data.precision == BF16]
    same = data.precision.eq(FLOAT32) & data.width.isin(low.width) & data.lr.isin(low.lr)
    if low.empty or not same.any():
        return pd.DataFrame()
    found, full = frontier(low), frontier(data[same])
    rows = []
    for width, part in found.groupby("width"):
        theirs = full[full.width == width]
        cases = [(AGAINST_FLOAT32, name, name, theirs) for name in dict.fromkeys(part.method)]
        for what, name, other, against in [*cases, *((WITHIN, name, other, part) for name, other in PAIRS.items())]:
            each = [log_ratio(_of(part, name, seed), _of(against, other, seed)) for seed in dict.fromkeys(part.seed)]
            known = [(value, sides) for value, sides in each if not math.isnan(value)]
            row = row_of(name, "" if what == AGAINST_FLOAT32 else other, what, width, [value for value, _ in known])
            rows.append(row | {"bound": together(sides for _, sides in known)})
    table = pd.DataFrame(rows)
    words = verdicts(table, SAME)
    table["verdict"] = [WORDS[what].get(word, str(Verdict.OPEN)) for what, word in zip(table.what, words, strict=True)]
    return table


def _of(found: pd.DataFrame, method: str, seed: int) -> pd.DataFrame:
    return found[(found.method == method) & (found.seed == seed)]


def in_words(data: pd.DataFrame, table: pd.DataFrame) -> str:
    """What bf16 does to the frontier, in a sentence or two; empty without bf16."""
    if table.empty:
        return ""
    low = data[data.precision == BF16]
    parts = {
        what: "; ".join(
            f"{METHOD_LABEL[row.method]}{f' / {METHOD_LABEL[row.other]}' if row.other else ''} {times(row)} ({row.verdict}"
            f"{of_seeds(row, low.seed.nunique())})"
            for row in table[table.what == what].itertuples()
        )
        for what in WORDS
    }
    widths, lrs = (", ".join(f"{value:g}" for value in sorted(set(low[name]))) for name in ("width", "lr"))
    where = f"width {widths}, lr {lrs}; {int(low.diverged.sum())} of {len(low)} runs diverged"
    return f" In bf16 ({where}) over float32: {parts[AGAINST_FLOAT32]}; functional path over SAM's: {parts[WITHIN]}."

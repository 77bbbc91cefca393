"""table-1: SAM and Functional-SAM against AdamW at equal steps, a row a size and regime; the runs are table-2's and table-3's."""

import math

import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits import regime_table
from functional_sam.exhibits.comparison import against, comparison, edges, label, largest_gain, pair, published
from functional_sam.exhibits.output import Exhibit, save_frame, stem
from functional_sam.exhibits.regime_table import lengths, not_shown, opening, tuned
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.study import REGIMES, Planned, configs_of, load_study
from functional_sam.files import write_text

PAIRS = [("sam", "adamw"), ("functional-sam", "adamw"), ("functional-sam", "sam")]  # the first minus the second


def planned(spec: Spec, overrides: tuple[str, ...] = ()) -> dict[str, list[Planned]]:
    """The cells of each regime; of a study in turn the second regime only once the first is complete."""
    study = load_study(spec, overrides)
    found: dict[str, list[Planned]] = {}
    for regime in REGIMES:
        found[regime] = regime_table.planned(spec, regime, overrides)
        if study.in_turn and not all(one.complete for one in found[regime]):
            break
    return found


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """The runs known so far, in order."""
    return configs_of([one for cells in planned(spec, overrides).values() for one in cells])


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """CSV and Markdown table."""
    found = {regime: cells for regime, cells in planned(spec, spec.command).items() if cells}
    both = [one for cells in found.values() for one in cells]
    frame = comparison(both)
    trained = ". ".join(f"{REGIMES[regime].capitalize()} training: {lengths(cells)}" for regime, cells in found.items())
    unsettled = [f"{REGIMES[regime].capitalize()}: {edges(cells).strip()}" for regime, cells in found.items() if edges(cells)]
    left = "".join(not_shown(spec, regime, found.get(regime, [])) for regime in REGIMES)
    caption = " ".join([opening(spec, both), f"{trained}.{left}", tuned(both), *unsettled])
    own = {regime: frame[frame.regime == regime] for regime in found}
    words = (f"{REGIMES[regime].capitalize()}: {against(part)}. {largest_gain(part)}".strip() for regime, part in own.items())
    text = f"Against AdamW at equal steps (paired, 95 %). {' '.join(words)}"
    path = stem(spec).with_suffix(".md")
    write_text(path, "\n".join([*markdown(frame), "", caption, "", text, "", *published()]) + "\n")
    return Exhibit([path, save_frame(spec, frame)], caption, text, frame)


def markdown(frame: pd.DataFrame) -> list[str]:
    """A row a regime and size, a column a pair of methods."""
    pairs = [two for two in PAIRS if set(two) <= set(frame.method)]
    columns = ["training", "size", "AdamW's test loss (nats/token)"]
    columns += [f"{label(name)} minus {label(other)} (paired)" for name, other in pairs]
    lines = [f"| {' | '.join([*columns, 'n'])} |", "|" + "---|" * (len(columns) + 1)]
    for (regime, size), part in frame.groupby(["regime", "size"], sort=False):
        rows = {row.method: row for row in part.itertuples()}
        base = rows["adamw"]
        cells = [REGIMES[str(regime)], str(size).removeprefix("language-"), pair(base.test_loss, base.test_loss_stderr)]
        for name, other in pairs:
            row = rows[name]
            mean, stderr = getattr(row, f"minus_{other}"), getattr(row, f"minus_{other}_stderr")
            if math.isfinite(mean):
                cells.append(f"{pair(mean, stderr, '+')}, {getattr(row, f'verdict_{other}')}")
            else:  # infinite, or the difference of two infinities: whose runs they were says more
                lost = (f"{label(one)} ({rows[one].diverged} of {base.n})" for one in (name, other) if rows[one].diverged)
                cells.append(f"diverged: {', '.join(lost)}")
        lines.append(f"| {' | '.join([*cells, str(base.n)])} |")
    return lines

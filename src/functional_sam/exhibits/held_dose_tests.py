"""figure-2's tests: named runs on seeds that suggested nothing, each cell a family (paper/PROTOCOL.md, "Held dose by batch")."""

from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from functional_sam.config import Config
from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import interval
from functional_sam.exhibits.pairs import by_seed
from functional_sam.exhibits.spec import Spec
from functional_sam.study.compare import Estimate, Verdict, family

SIGNIFICANT = (str(Verdict.BETTER), str(Verdict.WORSE))  # also where one diverged


def is_test(cell: dict[str, Any]) -> bool:
    """Whether a cell of the YAML is one of these: it says what is compared with what."""
    return "tests" in cell


def named_configs(spec: Spec, cell: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, list[Config]]:
    """name -> its runs, one a seed. A run of the cell is a method, its rho and options, and settings over those of the cell."""
    configs: dict[str, list[Config]] = {}
    for name, run in cell["runs"].items():
        own = {key: value for key, value in run.items() if key in ("rho", "options")}
        layers = [cell["settings"], run.get("settings", {})]
        configs[name] = [
            spec.run(cell["task"], run["method"], seed, overrides, *layers, **({"method": own} if own else {}))
            for seed in cell["seeds"]
        ]
    return configs


def tested(data: dict[str, pd.DataFrame], cells: dict[str, Any], margin: float) -> pd.DataFrame:
    """One row a comparison: loss of a run minus the other's, paired by seed, p by Holm within the cell, verdict.

    data: of each cell that is complete "run", "seed" and "value" of its runs: those of two cells may be called alike and be others.
    """
    tables = []
    for name, own in data.items():
        cell, by = cells[name], dict(iter(own.groupby("run")))
        pairs = [(run, other) for run, others in cell["tests"].items() for other in others]
        found = [by_seed(by[run], by[other], "value", f"{name}: {run} minus {other}") for run, other in pairs]
        names = {"run": [run for run, _ in pairs], "other": [other for _, other in pairs], "p": [one.p for one in found]}
        rows = pd.DataFrame(names | family(found, margin))
        tables.append(rows.assign(cell=name, batch=cell["settings"]["training"]["batch"]))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def tests_figure(table: pd.DataFrame, lr: float) -> Figure:
    """figure-2-tests: one row a comparison, families apart; left of zero the first named is better, filled where significant.

    lr: learning rate of the runs whose names say none.
    """
    style.use()
    figure, axis = plt.subplots(figsize=(style.PAGE, 1.0 + 0.19 * len(table)))
    height, heights, labels = 0.0, [], []
    for _, part in table.groupby("cell", sort=False):
        for row in part.itertuples():
            filled, found = row.verdict.startswith(SIGNIFICANT), Estimate(row.difference, row.stderr, row.n)
            look = {"marker": style.OTHER_MARKER}
            style.marks(axis, [height], [found], "angle-sam", joined=False, horizontal=True, filled=filled, look=look)
            heights.append(height)
            labels.append(f"{row.run} minus {row.other}")
            height += 1.0
        height += 0.4
    axis.axvline(0.0, color=style.METHOD_COLOR["adamw"])
    axis.set(yticks=heights, yticklabels=labels, ylim=(height - 0.9, -0.6))
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(f"validation loss, the first minus the other\n(nats per token; rate {lr:g} where none is named)")
    figure.tight_layout()
    n, batch = ("/".join(str(one) for one in sorted(set(values))) for values in (table.n, table.batch))
    style.finding_above(figure, f"On {n} fresh seeds at {batch} rows a step: {_significant(table)}")
    return figure


def _significant(table: pd.DataFrame) -> str:
    """What is significant, in a sentence's part."""
    told = table[table.verdict.str.startswith(SIGNIFICANT)]
    each = [
        f"{run} is {' and '.join(f'{word} than {_listed(own.other)}' for word, own in part.groupby('verdict', sort=False))}"
        for run, part in told.groupby("run", sort=False)
    ]
    return "; ".join(each) or "nothing is significant"


def _listed(names: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def tests_in_words(table: pd.DataFrame) -> str:
    """Every comparison with interval and verdict, as part of a sentence; empty without one."""
    each = []
    for _, part in table.groupby("cell", sort=False) if len(table) else ():
        words = ", ".join(
            f"{row.run} minus {row.other} {interval(row.difference, row.half_width, sign=True)} ({row.verdict})"
            for row in part.itertuples()
        )
        size = "a family of its own" if len(part) == 1 else f"a family of {len(part)}"
        each.append(f"on {part.n.iloc[0]} fresh seeds at {part.batch.iloc[0]} rows {words}, {size}")
    return "; ".join(each)

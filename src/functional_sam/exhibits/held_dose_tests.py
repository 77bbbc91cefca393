"""figure-2's tests: named runs on seeds that suggested nothing, each cell a family (paper/PROTOCOL.md, "Held dose by batch")."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from functional_sam.config import Config
from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import interval
from functional_sam.exhibits.pairs import by_seed
from functional_sam.exhibits.spec import Spec
from functional_sam.study.compare import Estimate, Verdict, adjusted, family, significant

SIGNIFICANT = (str(Verdict.BETTER), str(Verdict.WORSE))  # also where one diverged
LABELS = 0.36  # of the figure's width: the names of what is compared


def is_test(cell: dict[str, Any]) -> bool:
    """Whether a cell of the YAML is one of these: it says what is compared with what (of what is tuned nothing is)."""
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

    p_all is Holm's over all rows, which judges nothing: each cell was planned as a family, but they have become many.
    data: of each cell that is complete "run", "seed" and "value" of its runs: those of two cells may be called alike and be others.
    """
    tables, all_found = [], []
    for name, own in data.items():
        cell, by = cells[name], dict(iter(own.groupby("run")))
        pairs = [(run, other) for run, others in cell["tests"].items() for other in others]
        if not pairs:  # what was tuned: its runs are in the CSV, and nothing is tested
            continue
        found = [by_seed(by[run], by[other], "value", f"{name}: {run} minus {other}") for run, other in pairs]
        names = {"run": [run for run, _ in pairs], "other": [other for _, other in pairs], "p": [one.p for one in found]}
        rows = pd.DataFrame(names | family(found, margin))
        all_found += found
        tables.append(rows.assign(cell=name, batch=cell["settings"]["training"]["batch"]))
    return pd.concat(tables, ignore_index=True).assign(p_all=adjusted(all_found)) if tables else pd.DataFrame()


def tests_figure(table: pd.DataFrame, cells: dict[str, Any], lr: float) -> Figure:
    """figure-2-tests: under each cell's question its comparisons; left of zero the first named is better, filled where significant.

    lr: learning rate of the runs whose names say none.
    """
    style.use()
    rows = len(table) + 1.2 * table.cell.nunique()
    figure, axis = plt.subplots(figsize=(style.PAGE, 0.5 + 0.195 * rows))
    figure.subplots_adjust(left=LABELS + 0.01, right=0.99, bottom=0.55 / figure.get_figheight(), top=1.0)
    at_left = blended_transform_factory(figure.transFigure, axis.transData)
    height, heights = 0.0, []
    for cell, part in table.groupby("cell", sort=False):
        axis.text(0.0, height, cells[cell].get("question", cell), transform=at_left, va="center", fontsize=7, fontweight="bold")
        for row in part.itertuples():
            height += 1.0
            filled, found = row.verdict.startswith(SIGNIFICANT), Estimate(row.difference, row.stderr, row.n)
            method = cells[cell]["runs"][row.run]["method"]
            style.marks(axis, [height], [found], method, joined=False, horizontal=True, filled=filled)
            axis.text(LABELS, height, f"{row.run}\nminus {row.other}", transform=at_left, ha="right", va="center", fontsize=5.5)
            heights.append(height)
        height += 1.2
    axis.axvline(0.0, color=style.METHOD_COLOR["adamw"])
    axis.set(yticks=heights, yticklabels=[], ylim=(height - 0.5, -0.5))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(f"validation loss, the first minus the other (nats per token)\nrate {lr:g} where none is named")
    style.finding_above(figure, _finding(table, cells))
    return figure


def _finding(table: pd.DataFrame, cells: dict[str, Any]) -> str:
    """What stands in the title; how many are significant, where nothing of it is complete."""
    n, rows = ("/".join(map(str, sorted(set(table[key])))) for key in ("n", "batch"))
    told = f"{table.verdict.str.startswith(SIGNIFICANT).sum()} of {len(table)} comparisons are significant"
    return "; ".join(_titled(table, cells)) or f"On {n} fresh seeds at {rows} rows a step: {told}"


def _titled(table: pd.DataFrame, cells: dict[str, Any]) -> list[str]:
    """The first comparison of each cell that the YAML puts into the title; what was asked again on other seeds stands together."""
    first = table.drop_duplicates("cell")
    own = first[[bool(cells[cell].get("in_title")) for cell in first.cell]]
    said = []
    for (run, other, rows), same in own.groupby(["run", "other", "batch"], sort=False):
        found = (
            f"{interval(row.difference, row.half_width, sign=True)} ({row.verdict}, {row.n} fresh seeds)"
            for row in same.itertuples()
        )
        said.append(f"{run} minus {other}, {rows} rows a step: {', '.join(found)}")
    return said


def tests_in_words(table: pd.DataFrame, cells: dict[str, Any]) -> str:
    """How many are significant, and those of the title, as sentences without the last full stop; empty without one."""
    if table.empty:
        return ""
    told, together = (sum(map(significant, table[column])) for column in ("p_holm", "p_all"))
    where = "tests on other seeds, of validation losses (the CSV of tests has each)"
    counted = f"{where}: {told} of {len(table)} significant within their families"
    return ". ".join([f"{counted}, {together} by Holm over all of them at once (described)", *_titled(table, cells)])

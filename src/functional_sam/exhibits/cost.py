"""The cost panel of figure-7: time per step of every method as a ratio to AdamW, from results/benchmark/time.csv."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from functional_sam.exhibits import style
from functional_sam.exhibits.output import paper_directory, save_figure

MARKERS = ("o", "s", "^", "D")
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def draw_cost(csv: Path, directory: Path | None = None) -> list[Path]:
    """One row a method, one marker a model, lines from the first to the third quartile; writes figure-7-cost.pdf and .png
    under DIRECTORY/figures (default: paper/)."""
    data = pd.read_csv(csv)
    style.use()
    methods = list(dict.fromkeys(data.method))
    figure, axes = plt.subplots(figsize=(style.COLUMN, 0.17 * len(methods) + 0.8))
    for index, (case, part) in enumerate(data.groupby("case", sort=False)):
        rows = [methods.index(method) + 0.18 * (index - 1.5) for method in part.method]
        spread = [(part.ratio - part.ratio_q1).clip(lower=0), (part.ratio_q3 - part.ratio).clip(lower=0)]
        axes.errorbar(part.ratio, rows, xerr=spread, fmt=MARKERS[index], color=COLORS[index], label=case, elinewidth=0.8)
    for line in (1, 2):
        axes.axvline(line, color="#bbbbbb", linewidth=0.6, zorder=0)
    axes.set(yticks=range(len(methods)), yticklabels=methods, xlabel="time per step / AdamW's (median, quartiles)")
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.35, 1.0), ncol=3, handletextpad=0.1, columnspacing=0.8)
    return save_figure(figure, (directory or paper_directory()) / "figures" / "figure-7-cost")

"""The cost panel of figure-7: time per step of every method as a ratio to AdamW, from results/benchmark/time.csv."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from functional_sam.exhibits import style
from functional_sam.exhibits.output import paper_directory, save_figure

MARKERS = ("o", "s", "^", "D")
COLORS = ("#332288", "#44AA99", "#999933", "#882255")  # of models: no method has them
CASE_LABEL = {
    "decoder-32k": "decoder, 32,000 pieces",
    "decoder-32k-bf16": "decoder, 32,000 pieces, bf16",
    "decoder-quick": "decoder, 1,024 pieces",
    "vit-quick": "ViT",
}
ROW_LABEL = {
    "plain AdamW": "AdamW, the loop of a tutorial",
    "plain GPT": "AdamW, a public GPT",
    "functional-sam keep u": "Functional-SAM, keeping u",
    "functional-sam naive": "Functional-SAM, logits whole",
    "looksam k=5": "LookSAM, k = 5",
}


def row_label(name: str) -> str:
    """A row of the benchmark as readers know it."""
    if name.startswith("public "):
        return f"{name.removeprefix('public ').replace('k=5', 'k = 5')}, pytorch-optimizer"
    return ROW_LABEL.get(name, style.named(name))


def cost_figure(data: pd.DataFrame) -> Figure:
    """One row a method, cheapest first, one marker a model, lines from the first to the third quartile."""
    style.use()
    methods = list(data.groupby("method").ratio.median().sort_values(kind="stable").index)
    figure, axes = plt.subplots(figsize=(0.85 * style.PAGE, 0.19 * len(methods) + 0.8))
    cases = list(data.groupby("case", sort=False))
    for index, ((case, part), offset) in enumerate(zip(cases, style.offsets(len(cases), 0.78 / len(cases)), strict=True)):
        rows = [methods.index(method) + offset for method in part.method]
        spread = [(part.ratio - part.ratio_q1).clip(lower=0), (part.ratio_q3 - part.ratio).clip(lower=0)]
        name = CASE_LABEL.get(str(case), str(case))
        look: dict[str, Any] = {"fmt": MARKERS[index % len(MARKERS)], "color": COLORS[index % len(COLORS)], "markersize": 2.5}
        axes.errorbar(part.ratio, rows, xerr=spread, label=name, elinewidth=0.7, **look)
    for line in (1, 2):
        axes.axvline(line, color="#bbbbbb", linewidth=0.6, zorder=0)
    axes.set(yticks=range(len(methods)), yticklabels=map(row_label, methods), ylim=(len(methods) - 0.4, -0.6))
    axes.set_xlabel("time per step / AdamW's (median, quartiles)")
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper right", handletextpad=0.1)
    own = data[data.method == "functional-sam"].ratio
    figure.tight_layout()
    style.finding_above(figure, f"Functional-SAM takes {own.min():.2f} to {own.max():.2f} times AdamW's time per step")
    return figure


def draw_cost(csv: Path, directory: Path | None = None) -> list[Path]:
    """Write figure-7-cost.pdf and .png under DIRECTORY/figures (default: paper/), as drawing figure-7 does."""
    figure = cost_figure(pd.read_csv(csv))
    plt.close(figure)
    return save_figure(figure, (directory or paper_directory()) / "figures" / "figure-7-cost")

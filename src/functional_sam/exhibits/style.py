"""How every figure looks: ICML column widths, one colour and marker per method, everywhere."""

import math
import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from functional_sam.study.compare import estimate

COLUMN = 3.25  # inches, one column of the ICML style
PAGE = 6.75  # inches, both

# Okabe-Ito (colour-blind safe). A method keeps its colour in every figure.
METHOD_COLOR = {
    "adamw": "#000000",
    "sam": "#D55E00",
    "functional-sam": "#0072B2",
    "precond-sam": "#E69F00",
    "precond-functional-sam": "#009E73",
    "angle-sam": "#CC79A7",
    "logit-sam": "#56B4E9",
}
METHOD_LABEL = {
    "adamw": "AdamW",
    "sam": "SAM",
    "functional-sam": "Functional-SAM",
    "precond-sam": "Precond SAM",
    "precond-functional-sam": "Precond Functional-SAM",
    "angle-sam": "Angle-SAM",
    "logit-sam": "Logit-SAM",
    "penalty-sam": "Penalty-SAM",
    "asam": "ASAM",
    "sam-on": "SAM-ON",
    "fisher-sam": "Fisher-SAM",
    "gsam": "GSAM",
    "wsam": "WSAM",
    "gnp": "Gradient-norm penalty",
    "looksam": "LookSAM",
    "momentum-sam": "Momentum-SAM",
    "momentum-functional-sam": "Momentum Functional-SAM",
    "tram": "TRAM",
    "adaptive-functional-sam": "Adaptive Functional-SAM",
    "fisher-functional-sam": "Fisher Functional-SAM",
}
PART_COLOR = {"functional": "#0072B2", "logit": "#D55E00"}
MATRIX_COLOR = {"hessian": "#000000", "gauss_newton": "#D55E00", "functional": "#0072B2"}  # the halves as in PART_COLOR
MATRIX_LABEL = {"hessian": "$H$", "gauss_newton": "$H_G$", "functional": "$H_F$"}
TASK_LABEL = {"language": "Language", "vision": "Vision"}


def use() -> None:
    """Set matplotlib's defaults for print: 8 pt text, thin lines, vector text in PDF."""
    sns.set_theme(context="paper", style="ticks")
    mpl.rcParams.update(
        {
            "font.size": 8,
            "axes.labelsize": 8,
            "axes.titlesize": 8,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "legend.fontsize": 7,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.2,
            "lines.markersize": 3.5,
            "pdf.fonttype": 42,
            "savefig.dpi": 300,
            "figure.dpi": 150,
        }
    )


def legend_above(figure: Figure, axis: Axes, columns: int = 5) -> None:
    """Lay the figure out tightly, with the legend of one axis above it: inside of a panel it would cover lines."""
    figure.tight_layout()
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=columns)


def finding_above(figure: Figure, text: str, width: int = 115) -> None:
    """What the figure shows, as a title line over it and over the legends above it. Call it when all is laid out."""
    tops = [1.0]
    for legend in figure.legends:
        tops.append(legend.get_window_extent().transformed(figure.transFigure.inverted()).y1)
    figure.text(0.5, max(tops) + 0.01, textwrap.fill(text, width), ha="center", va="bottom", fontsize=8, fontweight="bold")


def signed_log(axis: Axes, threshold: float) -> None:
    """y linear within +-threshold and logarithmic beyond, with numbers a reader can read. Call it when all is drawn."""
    axis.set_yscale("symlog", linthresh=threshold)
    axis.autoscale(axis="y")
    steps = [threshold / 2, *(threshold * 10**power for power in range(6))]
    low, high = axis.get_ylim()
    ticks = [tick for tick in [*(-step for step in reversed(steps)), 0.0, *steps] if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())


def plain_log(axis: Axes) -> None:
    """A logarithmic y axis with ticks at 1, 2, 5 (over many decades 1 alone) as plain numbers. Call it when its limits are set."""
    low, high = axis.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The band of seaborn's lines: the 95 % t interval, which decides the verdicts; of one seed no band."""
    found = estimate(list(values))
    half = found.half_width if found.n > 1 else 0.0
    return found.mean - half, found.mean + half

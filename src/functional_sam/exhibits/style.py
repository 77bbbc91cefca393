"""How every figure looks: ICML column widths, one colour, marker and name per method, 95 % intervals, axes with readable ticks."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from functional_sam.exhibits.markdown import MINUS
from functional_sam.study.compare import Estimate

PAGE = 6.75  # inches, both columns of the ICML style

# Okabe-Ito (colour-blind safe). A method keeps its colour in every figure.
METHOD_COLOR = {
    "adamw": "#000000",
    "sam": "#D55E00",
    "functional-sam": "#0072B2",
    "precond-sam": "#E69F00",
    "precond-functional-sam": "#009E73",
    "angle-sam": "#CC79A7",
    "logit-sam": "#56B4E9",
    "placebo": "#999999",
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
    "random-sam": "Random SAM",
    "friendly-sam": "Friendly-SAM",
    "vasso": "VaSSO",
    "adaptive-functional-sam": "Adaptive Functional-SAM",
    "fisher-functional-sam": "Fisher Functional-SAM",
}
METHOD_MARKER = {
    "adamw": "o",
    "sam": "s",
    "functional-sam": "o",
    "precond-sam": "D",
    "precond-functional-sam": "^",
    "angle-sam": "P",
    "logit-sam": "v",
}
OTHER_COLOR, OTHER_MARKER = "#666666", "o"  # of a method without its own
PLACEBO_COLOR = "#bbbbbb"
SINGLE = 0.35  # opacity of a mark of one seed, which decides nothing
MODEL_LABEL = {"vit": "ViT", "convnet": "ConvNet"}
DATA_LABEL = {"fashion-mnist": "Fashion-MNIST", "mnist-5k": "MNIST-5k", "imagenet-1k": "ImageNet-1K", "c4": "C4"}
# Of Paul Tol's muted scheme (colour-blind safe too): what is no method has the colour of none.
MATRIX_COLOR = {"hessian": "#777777", "gauss_newton": "#882255", "functional": "#117733"}
MATRIX_LABEL = {"hessian": "$H$", "gauss_newton": "$H_G$", "functional": "$H_F$"}
TASK_COLOR = {"language": "#332288", "vision": "#CC6677"}
TASK_COLOR |= {"language-23.9M": "#44AA99", "language-42.5M": "#999933", "language-117.9M": "#AA4499", "language-1208M": "#661100"}
TASK_LABEL = {"language": "Language", "vision": "Vision"}
TASK_LABEL |= {f"language-{size}": f"Language, {size}" for size in ("23.9M", "42.5M", "117.9M")}
TASK_LABEL["language-1208M"] = "Language, 1.2B"


def use() -> None:
    """Set matplotlib's defaults for print: 8 pt text, thin lines, vector text in PDF."""
    import seaborn as sns  # imports all of scipy.stats, and most commands draw nothing

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
            "axes.unicode_minus": True,
            "pdf.fonttype": 42,
            "savefig.dpi": 300,
            "figure.dpi": 110,  # of notebooks, which are kept small
        }
    )


def color(method: str) -> str:
    """A method's colour; grey for those without one."""
    return METHOD_COLOR.get(method, OTHER_COLOR)


def marker(method: str) -> str:
    """A method's marker."""
    return METHOD_MARKER.get(method, OTHER_MARKER)


def named(name: str) -> str:
    """A method, model or data set as readers know it."""
    return METHOD_LABEL.get(name) or MODEL_LABEL.get(name) or DATA_LABEL.get(name) or name


def count(value: float) -> str:
    """A number of parameters or tokens, short: 6.2k, 0.79M, 1.2B."""
    for least, size, unit in ((1e9, 1e9, "B"), (1e5, 1e6, "M"), (1e3, 1e3, "k")):
        if value >= least:
            return f"{value / size:.2g}{unit}"
    return f"{value:g}"


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
    lines = textwrap.fill(text.replace(" \N{PLUS-MINUS SIGN} ", "\N{NO-BREAK SPACE}\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}"), width)
    figure.text(0.5, max(tops) + 0.01, lines, ha="center", va="bottom", fontsize=8, fontweight="bold")


def offsets(number: int, step: float) -> list[float]:
    """So many offsets around zero, for marks of several methods at one place: they do not cover each other."""
    return [step * (index - (number - 1) / 2) for index in range(number)]


def bar(half: float) -> float:
    """The half width of an interval as it is drawn: no bar where there is no interval."""
    return half if math.isfinite(half) else 0.0


def marks(
    axis: Axes,
    places: Sequence[float],
    found: Sequence[Estimate],
    method: str,
    *,
    label: str | None = None,
    joined: bool = True,
    horizontal: bool = False,
    filled: bool = True,
    look: Mapping[str, str] | None = None,
) -> None:
    """Means and their 95 % t intervals in a method's colour and marker; n = 1 lighter, without a bar; none where diverged.

    joined: a thin line through the means. horizontal: places are heights, means run along x. filled: else hollow.
    look: another color, marker or linestyle (of the line) than the method's.
    """
    given = look or {}
    own, shape, line = given.get("color", color(method)), given.get("marker", marker(method)), given.get("linestyle", "-")
    finite = [(place, one) for place, one in zip(places, found, strict=True) if math.isfinite(one.mean)]
    style: dict[str, Any] = {"color": own, "marker": shape, "markerfacecolor": own if filled else "white"}
    style |= {"linestyle": "none", "elinewidth": 0.9, "markeredgewidth": 0.8}
    for single in (False, True):
        part = [(place, one) for place, one in finite if (one.n < 2) == single]
        if not part:
            continue
        at, means = [place for place, _ in part], [one.mean for _, one in part]
        halves = None if single else [bar(one.half_width) for _, one in part]
        style["alpha"] = SINGLE if single else 1.0
        if horizontal:
            axis.errorbar(means, at, xerr=halves, **style)
        else:
            axis.errorbar(at, means, yerr=halves, **style)
    if joined and len(finite) > 1 and not horizontal:
        axis.plot([place for place, _ in finite], [one.mean for _, one in finite], line, color=own, linewidth=0.7, alpha=0.6)
    if label is not None:
        face = style["markerfacecolor"]
        axis.plot([], [], line if joined else "none", color=own, marker=shape, markerfacecolor=face, label=label, linewidth=0.9)


def plain(value: float) -> str:
    """A tick's number: no power of ten that a reader would have to decode, a true minus sign."""
    return (f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:g}").replace("-", MINUS)


def log_ticks(axis: Axes, which: str, values: Iterable[float], most: int = 6) -> None:
    """A logarithmic axis ("x" or "y") with numbers where the data are: at the values, or at 1-3-10 if they are too many."""
    found = sorted({float(value) for value in values if math.isfinite(value) and value > 0})
    getattr(axis, f"set_{which}scale")("log")
    own = getattr(axis, f"{which}axis")
    own.set_minor_locator(NullLocator())
    if not found:
        return
    ticks = found if len(found) <= most else _steps(found[0], found[-1], most)
    own.set_ticks(ticks, [plain(tick) for tick in ticks])


def _steps(low: float, high: float, most: int) -> list[float]:
    """Round numbers within [low, high]: 1-2-5 a decade, 1-3 or 1 alone, so that at most so many are there."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in digits]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) <= most:
            break
    return found or [low, high]


def signed_log(axis: Axes, threshold: float, which: str = "y") -> None:
    """An axis linear within +-threshold and logarithmic beyond, with numbers a reader can read. Call it when all is drawn."""
    getattr(axis, f"set_{which}scale")("symlog", linthresh=threshold)
    axis.autoscale(axis=which)  # type: ignore[arg-type]
    low, high = getattr(axis, f"get_{which}lim")()
    largest = max(abs(low), abs(high), threshold)
    beyond = _steps(threshold, largest, 4) if largest > threshold else [threshold]
    steps = [*([threshold / 2] if len(beyond) < 3 else []), *beyond]
    ticks = [tick for tick in [*(-step for step in reversed(steps)), 0.0, *steps] if low <= tick <= high]
    own = getattr(axis, f"{which}axis")
    own.set_ticks(ticks, [plain(tick) for tick in ticks])
    own.set_minor_locator(NullLocator())


def diverged(axis: Axes, place: float, method: str) -> None:
    """A cross at the upper edge, in a method's colour: this one diverged."""
    axis.plot([place], [0.98], "x", color=color(method), transform=axis.get_xaxis_transform(), clip_on=False)


def plain_log(axis: Axes) -> None:
    """A logarithmic y axis with ticks at 1, 2, 5 (over many decades 1 alone) as plain numbers. Call it when its limits are set."""
    low, high = axis.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())

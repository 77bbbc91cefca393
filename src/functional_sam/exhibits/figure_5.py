"""figure-5: loss against model size in both regimes, with a power law a method, and against repetition of the data."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter
from scipy import optimize

from functional_sam.config import Config
from functional_sam.exhibits import stopping, style
from functional_sam.exhibits.comparison import comparison, edges, label
from functional_sam.exhibits.output import Exhibit, save_figure, save_frame
from functional_sam.exhibits.regime_table import not_shown, opening
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.statistics import Estimate
from functional_sam.exhibits.study import REGIMES, Planned, Study, cells, configs_of, load_study, plan_cells, repeated

ENOUGH = 3  # sizes that a power law of two parameters needs
LINEAR = 0.01  # nats: differences on repeated data span three decades, and both signs


def planned(study: Study) -> list[Planned]:
    """Both regimes at every size; the middle size on fewer and fewer tokens, once it is known with all of them."""
    found = [one for regime in REGIMES for one in plan_cells(study, cells(study, regime))]
    once = [one for one in found if (one.cell.task, one.cell.regime) == (study.middle, "fixed")]
    if study.in_turn and not all(one.complete for one in once or found[:1]):
        return found
    return [*found, *plan_cells(study, repeated(study), seeds=study.middle_seeds)] if once else found


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """The runs of table-2 and table-3, and those on repeated data."""
    return configs_of(planned(load_study(spec, overrides)))


def power_law(part: pd.DataFrame) -> tuple[Estimate, float] | None:
    """Exponent b of loss = a N^-b with its standard error, and a; None below ENOUGH sizes or where a run diverged.

    Least squares of log loss weighted by the standard errors over seeds; the error is scaled by the misfit (n = sizes).
    """
    if len(part) < ENOUGH or not np.isfinite(part.test_loss).all():
        return None
    x, y = np.log(part.parameters.to_numpy(float)), np.log(part.test_loss.to_numpy(float))
    sigma = (part.test_loss_stderr / part.test_loss).to_numpy(float)
    weights = sigma if np.isfinite(sigma).all() and (sigma > 0).all() else None
    (log_a, b), covariance = optimize.curve_fit(lambda x, log_a, b: log_a - b * x, x, y, p0=(1.5, 0.05), sigma=weights)
    return Estimate(float(b), float(math.sqrt(covariance[1, 1])), len(part)), math.exp(log_a)


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """Above test loss, below its paired difference to AdamW; the two regimes, then repeated data."""
    study = load_study(spec, spec.command)
    found = planned(study)
    data = stopping.with_stopping(comparison(found), found)
    data["epochs"] = data.tokens / data.unique_tokens
    style.use()
    figure, axes = plt.subplots(2, 3, figsize=(style.PAGE, 3.6), sharex="col")
    laws = {}
    for column, (regime, name) in enumerate(REGIMES.items()):
        part = data[data.regime == regime]
        axes[0, column].set_title(name.capitalize())
        if part.empty:
            axes[1, column].set_axis_off()
            axes[0, column].set_axis_off()
            continue
        laws[regime] = lines(axes[:, column], part, "parameters")
        axes[0, column].set(xscale="log", yscale="log")
        axes[1, column].set_xlabel("non-embedding parameters")
        sizes = sorted(set(part.parameters))
        axes[1, column].set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        axes[1, column].xaxis.set_minor_locator(NullLocator())
        plain(axes[0, column])
    part = on_repeated(study, data)
    lines(axes[:, 2], part, "epochs", fit=False)
    early = stopped_lines(axes[1, 2], part)
    style.signed_log(axes[1, 2], LINEAR)
    axes[0, 2].set(title=f"Repeated data, {study.middle.removeprefix('language-')}")
    axes[0, 2].set_xscale("log", base=2)
    ticks = sorted({round(value) for value in part.epochs})
    axes[1, 2].set(xlabel="epochs over the unique tokens", xticks=ticks, xticklabels=[str(tick) for tick in ticks])
    axes[0, 0].set_ylabel("test loss (nats/token)")
    axes[1, 0].set_ylabel("minus AdamW (paired)")
    style.legend_above(figure, axes[0, 0])
    main = [one for one in found if one.cell.regime == "fixed"]
    caption = (
        f"{opening(spec, main)} Fixed length: {study.fixed_steps} steps at every size; Chinchilla-style: "
        f"{study.tokens_per_parameter:g} tokens per parameter; right: {study.fixed_steps} steps on the first tokens of the train "
        "stream only, rho tuned at each number of epochs. Above test loss with standard errors, below differences to AdamW paired "
        f"by seed (n as in table-2 and table-3; right on an axis that is logarithmic beyond {LINEAR:g} nats; repeated data "
        f"n={len(study.middle_seeds)}).{early}{left_out(spec, study, found)} {_fits(laws)} {edges(found)}"
    )
    return Exhibit([*save_figure(spec, figure), save_frame(spec, data)], caption.strip(), _words(data, part), data, figure)


def left_out(spec: Spec, study: Study, found: Sequence[Planned]) -> str:
    """What is not drawn because its runs are not complete, in words; empty when all is."""
    of = {regime: [one for one in found if one.cell.regime == regime] for regime in REGIMES}
    have = {one.cell.regime for one in found}
    epochs = [str(value) for value in study.epochs if f"{value} epochs" not in have]
    words = "".join(not_shown(spec, regime, part) for regime, part in of.items())
    return words + (
        f" Not shown, because their runs are not complete: repeated data of {', '.join(epochs)} epochs." if epochs else ""
    )


def on_repeated(study: Study, data: pd.DataFrame) -> pd.DataFrame:
    """The middle size at fixed length, from one epoch on."""
    return data[(data["size"] == study.middle) & ((data.regime == "fixed") | (data.epochs > 1.5))].sort_values("epochs")


def lines(axes: Sequence[Axes], part: pd.DataFrame, x: str, fit: bool = True) -> dict[str, tuple[Estimate, float] | None]:
    """One method a colour; the fitted power laws as thin lines."""
    above, below = axes
    laws: dict[str, tuple[Estimate, float] | None] = {}
    for method, own in part.groupby("method", sort=False):
        name, color = str(method), style.METHOD_COLOR[str(method)]
        shown = own[np.isfinite(own.test_loss)]
        law = power_law(own) if fit else None
        laws[name] = law
        error = shown.test_loss_stderr.fillna(0)
        above.errorbar(
            shown[x], shown.test_loss, error, color=color, marker="o", linestyle="none" if law else "-", label=label(name)
        )
        if law:
            exponent, a = law
            above.plot(shown[x], a * shown[x] ** -exponent.mean, color=color, linewidth=0.8)
        if name != "adamw":
            error = shown.minus_adamw_stderr.fillna(0)
            below.errorbar(shown[x], shown.minus_adamw, error, color=color, marker="o")
        lost = own[~np.isfinite(own.test_loss)]
        for place in lost[x]:  # none drawn where none is lost: an empty line upsets the layout
            below.plot([place], [0.98], "x", color=color, transform=below.get_xaxis_transform(), clip_on=False)
    below.axhline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8)
    return laws


def stopped_lines(axis: Axes, part: pd.DataFrame) -> str:
    """Hollow: the differences had every run been stopped at its lowest validation loss. Returns the caption's words."""
    if "stopped_loss" not in part or part.stopped_loss.isna().all():
        return ""
    for method, own in part[part.method.ne("adamw") & np.isfinite(part.stopped_minus_adamw)].groupby("method", sort=False):
        error = own.stopped_minus_adamw_stderr.fillna(0)
        color = style.METHOD_COLOR[str(method)]
        axis.errorbar(own.epochs, own.stopped_minus_adamw, error, color=color, marker="o", markerfacecolor="none", linestyle="--")
    return " Hollow: as if every run, AdamW's too, had been stopped at its lowest validation loss."


def plain(axis: Axes) -> None:
    """A log axis over less than a decade, with numbers a reader can read."""
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_locator(NullLocator())
    low, high = axis.get_ylim()
    axis.set_yticks([round(float(value), 2) for value in np.geomspace(low, high, 5)[1:-1]])


def _fits(laws: dict[str, dict[str, tuple[Estimate, float] | None]]) -> str:
    parts = []
    for regime, own in laws.items():
        found = [f"{label(name)} {law[0].mean:.4f} +- {law[0].stderr:.4f}" for name, law in own.items() if law]
        parts.append(f"{REGIMES[regime]} {', '.join(found) or f'no fit: fewer than {ENOUGH} sizes, or a diverged run'}")
    return f"Exponent b of loss = a N^-b, thin lines (standard error of the fit): {'; '.join(parts)}."


def _words(data: pd.DataFrame, part: pd.DataFrame) -> str:
    sentences = []
    for regime, name in REGIMES.items():
        own = data[data.regime == regime]
        counts = {word: int(own.verdict_adamw.str.startswith(word).sum()) for word in ("better", "worse", "inconclusive")}
        sentences.append(f"{name}: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
    main = f"Cells (method x size) against AdamW, paired, 95 %: {'; '.join(sentences)}."
    if part.regime.nunique() < 2:
        return main
    firsts = []
    for method, own in part[part.method != "adamw"].groupby("method", sort=False):
        better = own[own.verdict_adamw.str.startswith("better")]
        at = f"from {better.epochs.iloc[0]:.0f} epochs" if len(better) else "never"
        firsts.append(f"{label(str(method))} {at}")
    base = part[part.method == "adamw"]
    shares = ", ".join(f"{row.share_func:.2f} at {row.epochs:.0f}" for row in base[base.n_curvature > 0].itertuples())
    measured = f" Share of delta_func in AdamW's sharpness gradient at the end, by epochs: {shares}." if shares else ""
    return f"{main} Repeated data, better than AdamW: {', '.join(firsts)}{_stopped_words(part)}.{measured}"


def _stopped_words(part: pd.DataFrame) -> str:
    if "stopped_loss" not in part:
        return ""
    better = part[part.stopped_verdict_adamw.fillna("").str.startswith("better")]
    early = ", ".join(f"{label(row.method)} at {row.epochs:.0f}" for row in better.itertuples())
    return f"; with every run stopped at its lowest validation loss: {early or 'none'}"

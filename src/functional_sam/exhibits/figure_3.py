"""figure-3: validation loss minus AdamW's against the radius, for every method and size at fixed length."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from functional_sam.config import Config
from functional_sam.exhibits import style
from functional_sam.exhibits.comparison import edges, label
from functional_sam.exhibits.output import Exhibit, save_figure, save_frame
from functional_sam.exhibits.regime_table import not_shown, opening
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.statistics import estimate, paired_difference, verdict
from functional_sam.exhibits.study import Planned, Study, cells, configs_of, has_radius, load_study, loss, make, plan_cells
from functional_sam.records import Run


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """The cells of table-2, and the whole grid of one size on more seeds, which choose nothing."""
    study = load_study(spec, overrides)
    planned = plan_cells(study, cells(study, "fixed", spec.tasks))
    more = [config for one in planned for curve in curves(study, one).values() for config in curve.values()]
    return list({config.hash: config for config in [*configs_of(planned), *more]}.values())


def curves(study: Study, one: Planned) -> dict[tuple[int, str], dict[float | None, Config]]:
    """(seed, method) -> radius -> run: the first tuning seed's, at the middle size all; AdamW's radius is None.

    To draw what is complete: the seeds whose runs all are.
    """
    lr = one.lr.best
    if lr is None or any(found.best is None for found in one.rho.values()):
        return {}
    found: dict[tuple[int, str], dict[float | None, Config]] = {}
    for seed in study.tuning_seeds[: study.curve_seeds or None] if one.cell.task == study.middle else study.tuning_seeds[:1]:
        own: dict[tuple[int, str], dict[float | None, Config]] = {}
        for name, entry in one.entries.items():
            radii: Sequence[float | None] = one.rho[name].values if has_radius(name, entry) else [None]
            own[seed, name] = {rho: make(study, one.cell, name, entry, seed, lr, rho) for rho in radii}
        if not study.complete_only or all(Run(config).done for curve in own.values() for config in curve.values()):
            found |= own
    return found


def frame(study: Study, planned: Sequence[Planned]) -> pd.DataFrame:
    """One row per size, method, radius and seed; minus_adamw is inf where the run diverged."""
    rows = []
    for one in planned:
        for (seed, name), curve in curves(study, one).items():
            (base,) = curves(study, one)[seed, "adamw"].values()
            for rho, config in curve.items():
                if rho is None:
                    continue
                rows.append(
                    {
                        "size": one.cell.task,
                        "method": name,
                        "rho": rho,
                        "seed": seed,
                        "lr": config.optimizer.lr,
                        "validation_loss": loss(config),
                        "minus_adamw": loss(config) - loss(base),
                        "diverged": bool(Run(config).summary().get("diverged")),
                        "best": rho == one.rho[name].best,
                        "edge": one.rho[name].edge if rho == one.rho[name].best else "",
                    }
                )
    return pd.DataFrame(rows)


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """One panel a size."""
    study = load_study(spec, spec.command)
    planned = plan_cells(study, cells(study, "fixed", spec.tasks))
    data = frame(study, planned)
    style.use()
    sizes = list(dict.fromkeys(data["size"]))
    columns = min(2, len(sizes))
    lines = math.ceil(len(sizes) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(style.PAGE, 2.1 * lines + 0.3), sharex=True, sharey=True, squeeze=False)
    for axis, size in zip(axes.flat, sizes, strict=False):
        panel(axis, data[data["size"] == size])
        n = data[data["size"] == size].seed.nunique()
        axis.set_title(f"{size.removeprefix('language-')} (n={n})")
    for axis in axes.flat[len(sizes) :]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, len(sizes) - columns) : len(sizes)]:  # nothing below them
        axis.set_xlabel(r"radius $\rho$")
        axis.tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss\nminus AdamW's (nats/token)")
    style.signed_log(axes[0, 0], 0.01)  # shared
    style.legend_above(figure, axes[0, 0])
    others = sorted(set(map(int, data.seed)) - {study.tuning_seeds[0]})
    more = f"; where n > 1, means over it and {', '.join(map(str, others))}, bands are one standard error" if others else ""
    caption = (
        f"{opening(spec, planned)} {planned[0].lr.configs[0].training.steps} steps.{not_shown(spec, 'fixed', planned)} "
        "Validation loss minus AdamW's with the same initialization and data order, against rho, at AdamW's learning rate; the "
        f"radius of preconditioned methods is |eps| too. Tuning seed {study.tuning_seeds[0]}, whose lowest point is the radius of "
        f"table-2 (star){more}. Crosses at the top edge diverged. Linear within 0.01, logarithmic beyond. {edges(planned)}"
    ).strip()
    return Exhibit([*save_figure(spec, figure), save_frame(spec, data)], caption, _words(data), data, figure)


def panel(axis: Axes, part: pd.DataFrame) -> None:
    """The curves of one size."""
    axis.axhline(0.0, color=style.METHOD_COLOR["adamw"], linewidth=0.8)
    for method, own in part.groupby("method", sort=False):
        color = style.METHOD_COLOR[str(method)]
        groups = {rho: list(group.minus_adamw) for rho, group in own.groupby("rho")}
        shown = {rho: estimate(values) for rho, values in groups.items() if all(map(math.isfinite, values))}
        means = [value.mean for value in shown.values()]
        errors = [value.stderr if math.isfinite(value.stderr) else 0.0 for value in shown.values()]
        axis.plot(list(shown), means, color=color, marker="o", label=label(str(method)))
        low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
        axis.fill_between(list(shown), low, high, color=color, alpha=0.15, linewidth=0)
        diverged = [rho for rho in groups if rho not in shown]
        for rho in diverged:
            axis.plot([rho], [0.98], "x", color=color, transform=axis.get_xaxis_transform(), clip_on=False)
        for rho in [rho for rho in own[own.best].rho.unique() if rho in shown]:
            axis.plot([rho], [shown[rho].mean], marker="*", color=color, markersize=9, markeredgecolor="white")
    axis.set(xscale="log")


def _words(data: pd.DataFrame) -> str:
    sentences = []
    for size, part in data.groupby("size", sort=False):
        own = part[part.best & (part.seed == part.seed.min())]
        found = [f"{label(row.method)} {row.rho:g} ({row.minus_adamw:+.4f})" for row in own.itertuples()]
        sentences.append(f"{str(size).removeprefix('language-')} {', '.join(found)}")
    best = f"Best rho, and validation loss minus AdamW's there, on the tuning seed (n=1, chosen by it): {'; '.join(sentences)}."
    return " ".join([best, *at_equal_rho(data)])


def at_equal_rho(data: pd.DataFrame) -> list[str]:
    """What the functional path alone changes at one radius, where there is more than one seed: nothing is chosen for this."""
    sentences = []
    for size, part in data.groupby("size", sort=False):
        n = part.seed.nunique()
        for name, other in (("functional-sam", "sam"), ("precond-functional-sam", "precond-sam")) if n > 1 else ():
            two = part[part.method.isin([name, other])].pivot(index="rho", columns=["method", "seed"], values="validation_loss")
            found = []
            for rho, row in two.dropna().iterrows():
                difference = paired_difference(list(row[name]), list(row[other]))
                found.append(f"{difference.mean:+.4f} +- {difference.stderr:.4f} at {rho:g} ({verdict(difference)})")
            if not found:
                continue
            sentences.append(
                f"{label(name)} minus {label(other)} at equal rho, {str(size).removeprefix('language-')} (n={n}, paired, 95 %): "
                f"{', '.join(found)}."
            )
    return sentences

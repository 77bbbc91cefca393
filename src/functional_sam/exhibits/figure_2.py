"""figure-2: Angle-SAM: validation loss (language) and accuracy (vision) against the angle between the two halves."""

import math

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from functional_sam.config import Config, compose
from functional_sam.exhibits import style
from functional_sam.exhibits.output import Exhibit, save_figure, save_frame
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.statistics import Estimate, estimate, paired_difference, verdict
from functional_sam.exhibits.words import sizes
from functional_sam.records import Run

METRIC = {"decoder": "loss", "vit": "accuracy"}
AXIS = {"loss": "validation loss\n(nats per token)", "accuracy": "validation accuracy"}
DASHES = ("-", "--", ":")  # one per radius


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """AdamW, and Angle-SAM at each radius and angle, on each task and seed; seeds first, so that what exists is a whole sweep."""
    configs = []
    for seed in spec.seeds:
        for task in spec.tasks:
            configs.append(compose(task, "adamw", spec.scale, spec.layers(task, seed), overrides))
            for rho in spec.rho:
                for phi in spec.phi:
                    method = {"rho": rho, "options": {"phi": phi}}
                    configs.append(compose(task, "angle-sam", spec.scale, spec.layers(task, seed, method=method), overrides))
    return configs


def frame(configs: list[Config]) -> pd.DataFrame:
    """One row per run: its metric, and the difference to AdamW's of the same task and seed."""
    rows = []
    for config in configs:
        metric, summary = METRIC[config.model.kind], Run(config).summary()
        worst = math.inf if metric == "loss" else 0.0
        value = summary.get(metric)
        rows.append(
            {
                "task": config.task,
                "method": config.method.name,
                "rho": config.method.rho,
                "phi": config.method.options.get("phi"),
                "seed": config.training.init_seed,
                "metric": metric,
                "value": worst if value is None else value,
                "diverged": bool(summary.get("diverged", False)),
            }
        )
    data = pd.DataFrame(rows)
    base = data[data.method == "adamw"].set_index(["task", "seed"]).value
    data["minus_adamw"] = data.value - [base[task, seed] for task, seed in zip(data.task, data.seed, strict=True)]
    return data


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """Above the metric, below its difference to AdamW, seed by seed; one column per task; bands are standard errors."""
    data = frame(configs)
    style.use()
    figure, axes = plt.subplots(2, len(spec.tasks), figsize=(style.PAGE, 4.0), sharex="col", squeeze=False)
    for column, task in enumerate(spec.tasks):
        part = data[data.task == task]
        metric = part.metric.iloc[0]
        above, below = axes[:, column]
        base = estimate(list(part[part.method == "adamw"].value))
        above.axhline(base.mean, color=style.METHOD_COLOR["adamw"], label="AdamW")
        above.axhspan(base.mean - base.stderr, base.mean + base.stderr, color=style.METHOD_COLOR["adamw"], alpha=0.12, linewidth=0)
        below.axhline(0.0, color=style.METHOD_COLOR["adamw"])
        for rho, dash in zip(spec.rho, DASHES, strict=False):
            _line(above, part[part.rho == rho], "value", dash, rf"Angle-SAM, $\rho$ = {rho:g}")
            _line(below, part[part.rho == rho], "minus_adamw", dash, None)
        model = next(config.model for config in configs if config.task == task)
        above.set(title=f"{style.TASK_LABEL.get(task, task)} ({model.kind} of width {model.width})", ylabel=AXIS[metric])
        below.set(
            xlabel=r"$\phi$ (degrees): functional half 0, logit half 90",
            ylabel=f"{metric} minus\nAdamW's (paired)",
            xticks=spec.phi,
        )
        for axis in (above, below):
            axis.set_xlim(min(spec.phi), max(spec.phi))
    axes[0, 0].legend(loc="best")
    figure.align_ylabels()
    figure.tight_layout()
    caption, text = _words(spec, configs, data)
    return Exhibit([*save_figure(spec, figure), save_frame(spec, data)], caption, text, data, figure)


def _line(axis: Axes, part: pd.DataFrame, field: str, dash: str, label: str | None) -> None:
    shown = part[~part.diverged]  # a mean with a diverged run is not a number that an axis can show: marked instead
    whole = shown.groupby("phi").filter(lambda group: len(group) == part.seed.nunique())
    color = style.METHOD_COLOR["angle-sam"]
    sns.lineplot(
        whole, x="phi", y=field, ax=axis, color=color, linestyle=dash, errorbar="se", marker="o", label=label, legend=False
    )
    for phi in sorted(set(part[part.diverged].phi)):
        axis.annotate("diverged", (phi, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="center", fontsize=6)


def _paired(part: pd.DataFrame, rho: float, phi: float, against: float | None = None) -> Estimate:
    """The metric at an angle minus AdamW's, or minus that at another angle, seed by seed."""
    own = part[(part.rho == rho) & (part.phi == phi)].sort_values("seed")
    base = part[part.method == "adamw"] if against is None else part[(part.rho == rho) & (part.phi == against)]
    return paired_difference(list(own.value), list(base.sort_values("seed").value))


def _words(spec: Spec, configs: list[Config], data: pd.DataFrame) -> tuple[str, str]:
    sentences = []
    for task in spec.tasks:
        part = data[data.task == task]
        metric = part.metric.iloc[0]
        lower = metric == "loss"
        for rho in spec.rho:
            low, high = min(spec.phi), max(spec.phi)
            ends = _paired(part, rho, low, against=high)
            against = {phi: verdict(_paired(part, rho, phi), lower) for phi in spec.phi}
            counts = "; ".join(
                f"{word} at phi {', '.join(f'{phi:g}' for phi in spec.phi if against[phi].startswith(word))}"
                for word in ("better", "worse", "inconclusive")
                if any(value.startswith(word) for value in against.values())
            )
            word = verdict(ends, lower)
            reading = (
                "no side wins"
                if word.startswith("inconclusive")
                else f"the {'functional' if word == 'better' else 'logit'} half wins"
            )
            sentences.append(
                f"{task}, rho {rho:g}: {metric} of the functional half minus the logit half {ends.mean:+.4f} +- {ends.stderr:.4f} "
                f"({reading}); against AdamW {counts}"
            )
    caption = (
        "Angle-SAM: gradient g + sqrt(2) (cos(phi) H_F eps + sin(phi) H_G eps), |eps| = rho, so that phi = 45 is penalty-SAM; the "
        "scaling is ours, the paper's was not seen. Exact second derivatives under bf16 autocast; rho is fixed, not tuned. "
        f"Mean over n={len(spec.seeds)} seeds, bands are one standard error; below, differences to AdamW with the same "
        f"initialization and data order. Scale {spec.scale}, not the paper's: {sizes(configs)}."
    )
    return caption, f"{'. '.join(sentences)} (n={len(spec.seeds)}, paired, 95 %)."

"""figure-2: Angle-SAM: each task's metric against the angle between the two halves of the sharpness gradient."""

import math

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from functional_sam.config import compose
from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import interval
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import firsts, model, sizes
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, estimate, paired_difference, verdict
from functional_sam.tasks import TASKS

DASHES = ("-", "--", ":")  # one per radius


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """AdamW, and Angle-SAM at each radius and angle, on each task and seed; seeds first, so that what exists is a whole sweep."""
    configs = []
    for seed in spec.seeds:
        for task in spec.tasks:
            configs.append(compose(task, "adamw", spec.scale, spec.layers(task, seed), overrides))
            for rho in spec.rho:
                for phi in spec.phi:
                    method = {"rho": rho, "options": {"phi": phi}}
                    configs.append(compose(task, "angle-sam", spec.scale, spec.layers(task, seed, method=method), overrides))
    return Plan.of_known_runs(spec, configs, source)


def frame(plan: Plan) -> pd.DataFrame:
    """One row per run: its metric (infinitely bad where it diverged), and the difference to AdamW's of the same task and seed."""
    rows = []
    for config in plan.configs:
        metric, summary = TASKS[config.kind].metric, plan.source.summary(config)
        value = summary.get(metric.name)
        rows.append(
            {
                "task": config.task,
                "method": config.method.name,
                "rho": config.method.rho,
                "phi": config.method.options.get("phi"),
                "seed": config.training.init_seed,
                "metric": metric.name,
                "value": (math.inf if metric.lower_is_better else -math.inf) if value is None else value,
                "diverged": bool(summary.get("diverged", False)),
            }
        )
    data = pd.DataFrame(rows)
    base = data[data.method == "adamw"].set_index(["task", "seed"]).value
    data["minus_adamw"] = data.value - [base[task, seed] for task, seed in zip(data.task, data.seed, strict=True)]
    return data


def draw(plan: Plan) -> Exhibit:
    """Above the metric, below its difference to AdamW, seed by seed; one column per task; bands are 95 % t intervals."""
    spec, data = plan.spec, frame(plan)
    style.use()
    figure, axes = plt.subplots(2, len(spec.tasks), figsize=(style.PAGE, 4.0), sharex="col", squeeze=False)
    black = style.METHOD_COLOR["adamw"]
    for column, (task, config) in enumerate(firsts(plan.configs).items()):
        part, metric = data[data.task == task], TASKS[config.kind].metric
        above, below = axes[:, column]
        base = estimate(list(part[part.method == "adamw"].value))
        above.axhline(base.mean, color=black, label="AdamW")
        if base.n > 1:
            above.axhspan(base.mean - base.half_width, base.mean + base.half_width, color=black, alpha=0.12, linewidth=0)
        below.axhline(0.0, color=black)
        for rho, dash in zip(spec.rho, DASHES, strict=False):
            _line(above, part[part.rho == rho], "value", dash, rf"Angle-SAM, $\rho$ = {rho:g}")
            _line(below, part[part.rho == rho], "minus_adamw", dash, None)
        above.set(title=f"{style.TASK_LABEL.get(task, task)} ({model(config)})", ylabel=f"validation {metric.label}")
        below.set(
            xlabel=r"$\phi$ (degrees): functional half 0, logit half 90",
            ylabel=f"{metric.name} minus\nAdamW's (paired)",
            xticks=spec.phi,
        )
        for axis in (above, below):
            axis.set_xlim(min(spec.phi), max(spec.phi))
    axes[0, 0].legend(loc="best")
    figure.align_ylabels()
    figure.tight_layout()
    return Exhibit(plan, {"": data}, _caption(plan, data), _verdict(plan, data), figure)


def headline(data: pd.DataFrame) -> str:
    """What figure and CSV say, in a few words."""
    parts = []
    for (task, rho), part in data[data.method != "adamw"].groupby(["task", "rho"], sort=False):
        ends = _halves(data[data.task == task], float(rho))
        parts.append(f"{task} {part.metric.iloc[0]} {interval(ends.mean, ends.half_width, sign=True)} (rho {rho:g})")
    return f"functional half minus logit half: {', '.join(parts)}"


def _line(axis: Axes, part: pd.DataFrame, field: str, dash: str, label: str | None) -> None:
    shown = part[~part.diverged]  # a mean with a diverged run is not a number that an axis can show: marked instead
    whole = shown.groupby("phi").filter(lambda group: len(group) == part.seed.nunique())
    sns.lineplot(
        whole,
        x="phi",
        y=field,
        ax=axis,
        color=style.METHOD_COLOR["angle-sam"],
        linestyle=dash,
        errorbar=style.t_interval,
        marker="o",
        label=label,
        legend=False,
    )
    for phi in sorted(set(part[part.diverged].phi)):
        axis.annotate("diverged", (phi, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="center", fontsize=6)


def _paired(part: pd.DataFrame, rho: float, phi: float, against: float | None = None) -> Estimate:
    """The metric at an angle minus AdamW's, or minus that at another angle, seed by seed."""
    own = part[(part.rho == rho) & (part.phi == phi)].sort_values("seed")
    base = part[part.method == "adamw"] if against is None else part[(part.rho == rho) & (part.phi == against)]
    return paired_difference(list(own.value), list(base.sort_values("seed").value))


def _halves(part: pd.DataFrame, rho: float) -> Estimate:
    """The metric of the smallest angle minus that of the largest."""
    return _paired(part, rho, part.phi.min(), against=part.phi.max())


def _reading(plan: Plan, data: pd.DataFrame, task: str, rho: float) -> str:
    """Which half wins, by the 95 % interval of the paired difference."""
    lower = TASKS[firsts(plan.configs)[task].kind].metric.lower_is_better
    word = verdict(_halves(data[data.task == task], rho), lower_is_better=lower)
    if word.startswith(("better", "worse")):
        return f"the {'functional' if word.startswith('better') else 'logit'} half wins"
    return "no side wins"


def _caption(plan: Plan, data: pd.DataFrame) -> str:
    spec = plan.spec
    finding = "; ".join(f"in {task} at rho {rho:g} {_reading(plan, data, task, rho)}" for task in spec.tasks for rho in spec.rho)
    return (
        f"{finding[0].upper()}{finding[1:]}. Angle-SAM: gradient g + sqrt(2) (cos(phi) H_F eps + sin(phi) H_G eps), |eps| = rho, "
        "so that phi = 45 is penalty-SAM (the scaling is ours, the paper's was not seen), by exact second derivatives, rho fixed, "
        f"not tuned; scale {spec.scale}, not the paper's: {sizes(plan.configs)}. Means over n={len(spec.seeds)} seeds, bands are "
        "95 % t intervals, below of the differences to AdamW with the same initialization and data order."
    )


def _verdict(plan: Plan, data: pd.DataFrame) -> str:
    spec, sentences = plan.spec, []
    for task, config in firsts(plan.configs).items():
        part, metric = data[data.task == task], TASKS[config.kind].metric
        for rho in spec.rho:
            ends = _halves(part, rho)
            against = {phi: verdict(_paired(part, rho, phi), lower_is_better=metric.lower_is_better) for phi in spec.phi}
            counts = "; ".join(
                f"{word} at phi {', '.join(f'{phi:g}' for phi in spec.phi if against[phi].startswith(word))}"
                for word in ("better", "worse", "no difference", "inconclusive")
                if any(value.startswith(word) for value in against.values())
            )
            sentences.append(
                f"{task}, rho {rho:g}: {metric.name} of the functional half minus the logit half "
                f"{interval(ends.mean, ends.half_width, sign=True)} ({_reading(plan, data, task, rho)}); against AdamW {counts}"
            )
    return f"{'. '.join(sentences)} (n={len(spec.seeds)}, paired, 95 % t intervals)."

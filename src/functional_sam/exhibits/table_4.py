"""table-4: curvature of every method's final weights, and which measure ranks the methods as their validation loss does."""

import math
from typing import Any

import pandas as pd
from scipy import stats

from functional_sam.config import Config, compose
from functional_sam.exhibits import markdown, style
from functional_sam.exhibits.markdown import PLUS_MINUS, interval, number, significant
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import sizes
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, estimate, paired_difference
from functional_sam.tasks import TASKS

GEOMETRIES = {"plain": "plain", "adam": "Adam's geometry"}
# Measures that a smaller value of is meant to be better of, by the field of `measures`; the bottom of H_F by its magnitude.
RANKED = {
    "top_hessian": "top eigenvalue of H",
    "top_gauss_newton": "top eigenvalue of H_G",
    "top_functional": "top eigenvalue of H_F",
    "bottom_functional": "bottom eigenvalue of H_F (magnitude)",
    "trace_hessian": "tr H",
    "trace_gauss_newton": "tr H_G",
    "trace_functional": "tr H_F",
    "quadratic_hessian": "eps^T H eps",
    "quadratic_gauss_newton": "eps^T H_G eps",
    "quadratic_functional": "eps^T H_F eps",
    "norm_logit": "|delta_logit|",
    "norm_func": "|delta_func|",
    "share": "share of delta_func",
    "norm_gradient": "|g|",
}

SHOWN = (
    "top_hessian",
    "top_gauss_newton",
    "top_functional",
    "bottom_functional",
    "trace_hessian",
    "trace_gauss_newton",
    "trace_functional",
    "quadratic_gauss_newton",
    "quadratic_functional",
    "norm_logit",
    "norm_func",
)


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """Every method at one radius (in its own unit, spec.rho_scale) on every seed; seeds first."""
    (task,), configs = spec.tasks, []
    for seed in spec.seeds:
        for method in spec.methods:
            for rho in spec.rho if method != "adamw" else [None]:
                radius = None if rho is None else rho * spec.rho_scale.get(method, 1.0)
                configs.append(compose(task, method, spec.scale, spec.layers(task, seed, method={"rho": radius}), overrides))
    return Plan.of_known_runs(spec, configs, source)


def measures(config: Config, source: Source) -> list[dict[str, Any]]:
    """One row per geometry: all measures of a run's final weights, and its validation loss (inf where it diverged)."""
    loss = source.summary(config)["loss"]
    row = {"method": config.method.name, "rho": config.method.rho, "seed": config.training.init_seed}
    if loss is None:
        return [{**row, "geometry": geometry, "loss": math.inf} for geometry in GEOMETRIES]
    record, rows = source.read(config, "curvature.json"), []
    for geometry, found in record["geometries"].items():
        own: dict[str, Any] = {**row, "geometry": geometry, "loss": loss}
        for matrix in style.MATRIX_LABEL:
            A = found[matrix]
            own |= {
                f"top_{matrix}": A["top"]["value"],
                f"top_{matrix}_residual": A["top"]["residual"],
                f"bottom_{matrix}": A["bottom"]["value"],
                f"bottom_{matrix}_residual": A["bottom"]["residual"],
                f"trace_{matrix}": A["trace"]["mean"],
                f"trace_{matrix}_stderr": A["trace"]["stderr"],
                f"quadratic_{matrix}": A["quadratic"],
            }
        own |= {"norm_logit": found["gauss_newton"]["norm"], "norm_func": found["functional"]["norm"]}
        own |= {"share": found["share"], "norm_gradient": found["norm_gradient"]}
        own |= {"logit_norm": record["logits"]["norm"], "entropy": record["logits"]["entropy"]}
        rows.append(own)
    return rows


def kendall(data: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau-b of each measure with the validation loss over the methods, in each seed; mean, half its 95 % interval."""
    rows = []
    for geometry, part in data.groupby("geometry", sort=False):
        for field, name in RANKED.items():
            taus, entries = [], 0
            for _, seed in part[part.loss < math.inf].groupby("seed"):
                entries = len(seed)
                taus.append(float(stats.kendalltau(seed[field].abs() if field.startswith("bottom") else seed[field], seed.loss)[0]))
            value = estimate(taus)
            rows.append(
                {
                    "geometry": geometry,
                    "measure": name,
                    "field": field,
                    "tau": value.mean,
                    "half_width": value.half_width,
                    "seeds": value.n,
                    "entries": entries,
                    "reading": _reading(value),
                }
            )
    return pd.DataFrame(rows)


def _reading(value: Estimate) -> str:
    """Whether the two-sided 95 % t interval of tau over seeds leaves out zero, and on which side."""
    if not abs(value.mean) > value.half_width:
        return "inconclusive"
    return "ranks as the loss" if value.mean > 0 else "ranks against the loss"


def draw(plan: Plan) -> Exhibit:
    """CSV of all runs, CSV of the taus, and a Markdown table of both."""
    data = pd.DataFrame([row for config in plan.configs for row in measures(config, plan.source)])
    taus = kendall(data)
    frames = {"": data, "kendall": taus}
    label = TASKS[plan.configs[0].kind].metric.label
    return Exhibit(plan, frames, _caption(plan, data, taus), _verdict(taus), markdown=_tables(data, taus, label))


def headline(data: pd.DataFrame) -> str:
    """What table and CSV say, in a few words."""
    found = kendall(data)
    tau = found[(found.geometry == "plain") & (found.field == "top_hessian")].iloc[0]
    return f"Kendall's tau of the top eigenvalue of H with the loss {interval(tau.tau, tau.half_width, 2, sign=True)}"


def _caption(plan: Plan, data: pd.DataFrame, taus: pd.DataFrame) -> str:
    spec, configs = plan.spec, plan.configs
    counts = {word: int((taus.reading == word).sum()) for word in ("ranks as the loss", "ranks against the loss")}
    units = ", ".join(f"times {value:g} for {style.METHOD_LABEL[method]}" for method, value in spec.rho_scale.items())
    diverged = data[(data.loss == math.inf) & (data.geometry == "plain")]
    lost = f", {len(diverged)} of {len(configs)} runs diverged and are left out of the ranking: {', '.join(diverged.method)}"
    setting = [
        f"Final weights on {configs[0].measure.rows} held-out rows, scale {spec.scale}, not the paper's: {sizes(configs)}",
        f"rho {', '.join(f'{rho:g}' for rho in spec.rho)}{f' ({units})' if units else ''}, fixed, not tuned, for the question is "
        "what each method does to curvature",
        "eps is the unit gradient (in Adam's geometry, of that geometry)",
        f"Lanczos residuals at most {_worst_residual(data):.1e} of the top eigenvalue of H",
        f"standard errors of a trace over its {configs[0].measure.probes} probes at most {_worst_trace(data):.0%} of tr H",
    ]
    return (
        f"Of {len(taus)} measures of curvature {counts['ranks as the loss']} rank the methods as their validation loss does and "
        f"{counts['ranks against the loss']} against it. {'; '.join(setting)}. Means and halves of 95 % t intervals over "
        f"n={len(spec.seeds)} seeds, differences paired by seed{lost if len(diverged) else ''}."
    )


def _worst_residual(data: pd.DataFrame) -> float:
    columns = [c for c in data.columns if c.endswith("_residual")]
    return float((data[columns].max(axis=1) / data.top_hessian).max())


def _worst_trace(data: pd.DataFrame) -> float:
    return float((data.trace_hessian_stderr / data.trace_hessian.abs()).max())


def _verdict(taus: pd.DataFrame) -> str:
    n, entries = int(taus.seeds.iloc[0]), int(taus.entries.iloc[0])
    parts = []
    for geometry, label in GEOMETRIES.items():
        own = taus[taus.geometry == geometry]
        for word in ("ranks as the loss", "ranks against the loss"):
            found = own[own.reading == word].sort_values("tau", ascending=word != "ranks as the loss")
            if len(found):
                shown = ", ".join(f"{row.measure} {_tau(row)}" for row in found.head(4).itertuples())
                more = f" and {len(found) - 4} more" if len(found) > 4 else ""
                parts.append(f"{label}: {word}: {shown}{more}")
    found_text = "; ".join(parts) or "no measure does, beyond chance"
    return (
        f"Kendall's tau with the validation loss over {entries} methods, mean and half of its 95 % t interval over n={n} seeds, "
        f"negative where flatter methods have the higher loss: {found_text}. "
        f"{len(taus)} measures were tried at 95 %, so that about {0.05 * len(taus):.0f} would pass by chance."
    )


def _tau(row: Any) -> str:
    return interval(row.tau, row.half_width, 2, sign=True)


def _tables(data: pd.DataFrame, taus: pd.DataFrame, label: str) -> str:
    blocks = []
    columns = ["method", "rho", f"validation {label}", "minus AdamW", *(RANKED[field] for field in (*SHOWN, "share"))]
    for geometry, title in GEOMETRIES.items():
        own = data[data.geometry == geometry]
        base = own[own.method == "adamw"].sort_values("seed")
        rows = []
        for (method, rho), part in own.groupby(["method", "rho"], sort=False, dropna=False):
            part = part.sort_values("seed")
            loss, difference = estimate(list(part.loss)), paired_difference(list(part.loss), list(base.loss))
            rows.append(
                [
                    style.METHOD_LABEL[str(method)],
                    "" if pd.isna(rho) else f"{rho:g}",
                    interval(loss.mean, loss.half_width, 3),
                    "" if method == "adamw" else interval(difference.mean, difference.half_width, sign=True),
                    *(_significant(estimate(list(part[field]))) for field in SHOWN),
                    number(estimate(list(part.share)).mean, 3),
                ]
            )
        blocks.append(f"**{title}**\n\n{markdown.table(columns, rows)}")
    names = [f"tau, {title}" for title in GEOMETRIES.values()]
    by = taus.set_index(["field", "geometry"])
    rows = [[name, *(f"{_tau(by.loc[f, g])} ({by.loc[f, g].reading})" for g in GEOMETRIES)] for f, name in RANKED.items()]
    ranking = markdown.table(["measure", *names], rows, text=names)
    return "\n".join([*blocks, f"**Which measure ranks the methods as the validation loss does**\n\n{ranking}"])


def _significant(value: Estimate) -> str:
    """Three significant digits of the mean, two of the half width."""
    half = value.half_width
    return significant(value.mean) + (f" {PLUS_MINUS} {significant(half, 2)}" if math.isfinite(half) else "")

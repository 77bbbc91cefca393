"""table-4: curvature of every method's final weights, and which measure ranks the methods as their validation loss does."""

import math
from typing import Any

import pandas as pd
from scipy import stats

from functional_sam.config import Config, compose
from functional_sam.exhibits import style
from functional_sam.exhibits.output import Exhibit, save_frame, stem
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.statistics import LEVEL, Estimate, estimate, paired_difference
from functional_sam.exhibits.words import sizes
from functional_sam.files import write_text
from functional_sam.records import Run

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


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """Every method at one radius (in its own unit, spec.rho_scale) on every seed; seeds first."""
    (task,), configs = spec.tasks, []
    for seed in spec.seeds:
        for method in spec.methods:
            for rho in spec.rho if method != "adamw" else [None]:
                radius = None if rho is None else rho * spec.rho_scale.get(method, 1.0)
                configs.append(compose(task, method, spec.scale, spec.layers(task, seed, method={"rho": radius}), overrides))
    return configs


def measures(config: Config) -> list[dict[str, Any]]:
    """One row per geometry: all measures of a run's final weights, and its validation loss (inf where it diverged)."""
    run = Run(config)
    loss = run.summary()["loss"]
    row = {"method": config.method.name, "rho": config.method.rho, "seed": config.training.init_seed}
    if loss is None:
        return [{**row, "geometry": geometry, "loss": math.inf} for geometry in GEOMETRIES]
    record, rows = run.read("curvature.json"), []
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
    """Kendall's tau-b of each measure with the validation loss over the methods, in each seed; mean and standard error."""
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
                    "stderr": value.stderr,
                    "seeds": value.n,
                    "entries": entries,
                    "reading": _reading(value),
                }
            )
    return pd.DataFrame(rows)


def _reading(value: Estimate) -> str:
    """Whether the two-sided 95 % t interval of tau over seeds leaves out zero, and on which side."""
    if value.n < 2 or not math.isfinite(value.mean):
        return "inconclusive"
    if not abs(value.mean) > stats.t.ppf(0.5 + LEVEL / 2, value.n - 1) * value.stderr:
        return "inconclusive"
    return "ranks as the loss" if value.mean > 0 else "ranks against the loss"


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """CSV of all runs, CSV of the taus, and a Markdown table of both."""
    data = pd.DataFrame([row for config in configs for row in measures(config)])
    taus = kendall(data)
    config = configs[0]
    diverged = data[(data.loss == math.inf) & (data.geometry == "plain")]
    units = ", ".join(f"times {value:g} for {style.METHOD_LABEL[method]}" for method, value in spec.rho_scale.items())
    caption = (
        f"Curvature of the final weights on {config.measure.rows} held-out rows, scale {spec.scale}, not the paper's: "
        f"{sizes(configs)}. rho: {', '.join(f'{rho:g}' for rho in spec.rho)}{f' ({units})' if units else ''}, fixed, not tuned: "
        "the question is what each method does to curvature. Mean and standard error over seeds; eps is the unit gradient (in "
        "Adam's geometry, of that geometry). Validation loss in nats per token. Largest Lanczos residual, in units of the top "
        f"eigenvalue of H: {_worst_residual(data):.1e}; standard error of a trace over its {config.measure.probes} probes: "
        f"{_worst_trace(data):.0%} of tr H at most."
    )
    if len(diverged):
        caption += (
            f" {len(diverged)} of {len(configs)} runs diverged, and are left out of the ranking: {', '.join(diverged.method)}."
        )
    text = _verdict(taus)
    path = stem(spec).with_suffix(".md")
    write_text(path, _markdown(spec, data, taus, caption, text))
    return Exhibit([path, save_frame(spec, data), save_frame(spec, taus, "kendall")], caption, text, data)


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
                shown = ", ".join(f"{row.measure} {row.tau:+.2f} +- {row.stderr:.2f}" for row in found.head(4).itertuples())
                more = f" and {len(found) - 4} more" if len(found) > 4 else ""
                parts.append(f"{label}: {word}: {shown}{more}")
    found_text = "; ".join(parts) or "no measure does, beyond chance"
    return (
        f"Kendall's tau with the validation loss over {entries} methods, mean +- standard error over n={n} seeds, negative "
        f"where flatter methods have the higher loss: {found_text}. "
        f"{len(taus)} measures were tried at 95 %, so that about {0.05 * len(taus):.0f} would pass by chance."
    )


def _markdown(spec: Spec, data: pd.DataFrame, taus: pd.DataFrame, caption: str, text: str) -> str:
    lines = []
    for geometry, label in GEOMETRIES.items():
        own = data[data.geometry == geometry]
        base = own[own.method == "adamw"].sort_values("seed")
        lines += [f"**{label}**", ""]
        lines += [
            "| method | rho | validation loss | minus AdamW | top H | top H_G | top H_F | bottom H_F | tr H | tr H_G | tr H_F | "
            "eps^T H_G eps | eps^T H_F eps | \\|delta_logit\\| | \\|delta_func\\| | share of delta_func |",
            "|" + "---|" * 16,
        ]
        for (method, rho), part in own.groupby(["method", "rho"], sort=False, dropna=False):
            part = part.sort_values("seed")
            difference = paired_difference(list(part.loss), list(base.loss))
            cells = [
                style.METHOD_LABEL[str(method)],
                "" if pd.isna(rho) else f"{rho:g}",
                _cell(estimate(list(part.loss)), 3),
                "" if method == "adamw" else f"{difference.mean:+.4f} +- {difference.stderr:.4f}",
            ]
            cells += [_significant(estimate(list(part[field]))) for field in SHOWN]
            cells.append(_cell(estimate(list(part.share)), 3))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["**Which measure ranks the methods as the validation loss does**", ""]
    lines += ["| measure | " + " | ".join(f"tau, {label}" for label in GEOMETRIES.values()) + " |", "|---|---|---|"]
    for field, name in RANKED.items():
        cells = []
        for geometry in GEOMETRIES:
            row = taus[(taus.geometry == geometry) & (taus.field == field)].iloc[0]
            cells.append(f"{row.tau:+.2f} +- {row.stderr:.2f} ({row.reading})")
        lines.append(f"| {name.replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
    lines += [
        "",
        caption,
        "",
        text,
        "",
        "Published: the paper's table 4 holds eigenvalues and traces; its values were not available.",
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Estimate, digits: int) -> str:
    return f"{value.mean:.{digits}f} +- {value.stderr:.{digits}f}"


def _significant(value: Estimate) -> str:
    """Three significant digits of the mean, two of the standard error."""
    return f"{value.mean:.3g} +- {value.stderr:.2g}"

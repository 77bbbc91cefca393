"""figure-4: spectral densities of H, H_G and H_F at the end of training, also in Adam's geometry; shares through it."""

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from functional_sam.config import compose
from functional_sam.curvature.spectrum import WIDTH, smooth
from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import interval, number
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import at_the_end, decompositions, rows, sizes
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, estimate

GEOMETRIES = {"plain": "eigenvalue of A", "adam": r"eigenvalue of $P^{1/2} A\, P^{1/2}$ (Adam's geometry)"}
ASCENTS: dict[str, Any] = {"gradient": "-", "adam": "--"}
BINS = 240


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """AdamW on each task and seed, with shares measured on the way and spectra at the end."""
    configs = [compose(task, "adamw", spec.scale, spec.layers(task, seed), overrides) for seed in spec.seeds for task in spec.tasks]
    return Plan.of_known_runs(spec, configs, source)


def eigenvalue_frame(plan: Plan) -> pd.DataFrame:
    """One row per task, seed, geometry and matrix: both ends of the spectrum, the trace, and what eps sees of it."""
    found = []
    for config in plan.configs:
        for geometry, matrices in plan.source.read(config, "curvature.json")["geometries"].items():
            for matrix in style.MATRIX_LABEL:
                A = matrices[matrix]
                found.append(
                    {
                        "task": config.task,
                        "seed": config.training.init_seed,
                        "geometry": geometry,
                        "matrix": matrix,
                        **{f"{end}_{key}": A[end][key] for end in ("top", "bottom") for key in ("value", "residual", "converged")},
                        "trace": A["trace"]["mean"],
                        "trace_stderr": A["trace"]["stderr"],
                        "eps_A_eps": A["quadratic"],
                        "norm_A_eps": A["norm"],
                    }
                )
    return pd.DataFrame(found)


def density_frame(plan: Plan, task: str, geometry: str) -> pd.DataFrame:
    """Densities of the three matrices on one grid: mean over seeds (of the mean over probes), half width of its 95 % t interval."""
    configs = [config for config in plan.configs if config.task == task]
    records = [plan.source.read(config, "curvature.json")["geometries"][geometry] for config in configs]
    nodes = {
        m: [torch.tensor(record[m]["density"]["nodes"], dtype=torch.float64) for record in records] for m in style.MATRIX_LABEL
    }
    low = min(float(node.min()) for each in nodes.values() for node in each)
    high = max(float(node.max()) for each in nodes.values() for node in each)
    sigma = WIDTH * (high - low)
    edges = torch.linspace(low - 6 * sigma, high + 6 * sigma, BINS + 1, dtype=torch.float64)
    frames = []
    for matrix, each in nodes.items():
        weights = [torch.tensor(record[matrix]["density"]["weights"], dtype=torch.float64) for record in records]
        drawn = np.stack([smooth(n, w, sigma, edges)[1].mean(0).numpy() for n, w in zip(each, weights, strict=True)])
        bands = [estimate(list(values)) for values in drawn.T]
        frames.append(
            pd.DataFrame(
                {
                    "task": task,
                    "geometry": geometry,
                    "matrix": matrix,
                    "eigenvalue": ((edges[1:] + edges[:-1]) / 2).numpy(),
                    "density": [band.mean for band in bands],
                    "half_width": [band.half_width if band.n > 1 else math.nan for band in bands],
                    "floor": 0.1 / (records[0][matrix]["density"]["size"] * sigma * math.sqrt(2 * math.pi)),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def draw(plan: Plan) -> Exhibit:
    """Rows: densities plain, densities in Adam's geometry, share of delta_func through training; one column per task."""
    spec, ends, shares = plan.spec, eigenvalue_frame(plan), decompositions(plan)
    densities = pd.concat([density_frame(plan, task, g) for task in spec.tasks for g in GEOMETRIES], ignore_index=True)
    style.use()
    figure, axes = plt.subplots(3, len(spec.tasks), figsize=(style.PAGE, 6.2), squeeze=False)
    color = style.PART_COLOR["functional"]
    for column, task in enumerate(spec.tasks):
        for row, geometry in enumerate(GEOMETRIES):
            at = {"task": task, "geometry": geometry}
            _density(axes[row, column], _where(densities, at), _where(ends, at), geometry)
        axes[0, column].set_title(style.TASK_LABEL.get(task, task))
        share = axes[2, column]
        for ascent, dash in ASCENTS.items():
            part = _where(shares, {"task": task, "ascent": ascent})
            sns.lineplot(
                part,
                x="step",
                y="share",
                ax=share,
                color=color,
                linestyle=dash,
                errorbar=style.t_interval,
                marker="o",
                legend=False,
            )
        share.set(xscale="log", ylim=(0, 1), xlabel="AdamW step", ylabel=r"share of $\delta_{func}$")
    matrices = [Line2D([], [], color=style.MATRIX_COLOR[m], label=label) for m, label in style.MATRIX_LABEL.items()]
    marks = [Line2D([], [], color="#555555", marker="v", linestyle="", label="top and bottom eigenvalue (Lanczos)")]
    figure.legend(handles=matrices + marks, loc="upper center", ncol=4, bbox_to_anchor=(0.5, 1.02))
    lines = [Line2D([], [], color="#555555", linestyle=d, label=f"{a} ascent") for a, d in ASCENTS.items()]
    axes[2, 0].legend(handles=lines, loc="best")
    figure.align_ylabels()
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    frames = {"": ends, "density": densities, "shares": shares}
    return Exhibit(plan, frames, _caption(plan, ends), _verdict(spec, ends, shares), figure)


def headline(ends: pd.DataFrame) -> str:
    """What figure and CSV say, in a few words."""
    ratios = {task: _ratios(ends, task, "plain")[0].mean for task in ends.task.unique()}
    return "top eigenvalue of H_F / H_G " + ", ".join(f"{task} {number(ratio, 2)}" for task, ratio in ratios.items())


def _where(data: pd.DataFrame, values: dict[str, str]) -> pd.DataFrame:
    for column, value in values.items():
        data = data[data[column] == value]
    return data


def _density(axis: Axes, data: pd.DataFrame, ends: pd.DataFrame, geometry: str) -> None:
    floor = data.floor.min()
    for matrix, color in style.MATRIX_COLOR.items():
        part = data[data.matrix == matrix]
        axis.plot(part.eigenvalue, part.density.clip(lower=floor), color=color)
        axis.fill_between(
            part.eigenvalue,
            (part.density - part.half_width).clip(lower=floor),
            (part.density + part.half_width).clip(lower=floor),
            color=color,
            alpha=0.2,
            linewidth=0,
        )
        found = ends[ends.matrix == matrix]
        marked = [found.top_value.mean()] + ([found.bottom_value.mean()] if matrix != "gauss_newton" else [])
        axis.plot(marked, [floor * 1.5] * len(marked), linestyle="", marker="v", color=color, clip_on=False)
    axis.set(yscale="log", ylim=(floor, data.density.max() * 2), xlabel=GEOMETRIES[geometry], ylabel="density of eigenvalues")


def _ratios(ends: pd.DataFrame, task: str, geometry: str) -> tuple[Estimate, Estimate]:
    """Over seeds: top eigenvalue of H_F over that of H_G, and tr H_F / tr H."""
    part = _where(ends, {"task": task, "geometry": geometry}).pivot(index="seed", columns="matrix")
    tops = estimate(list(part.top_value.functional / part.top_value.gauss_newton))
    return tops, estimate(list(part.trace.functional / part.trace.hessian))


def _caption(plan: Plan, ends: pd.DataFrame) -> str:
    spec, measure = plan.spec, plan.configs[0].measure
    unconverged = int((~ends.top_converged.astype(bool)).sum() + (~ends.bottom_converged.astype(bool)).sum())
    tops = " and ".join(f"{_ratios(ends, task, 'plain')[0].mean:.2f} in {task}" for task in spec.tasks)
    setting = [
        f"Densities by stochastic Lanczos quadrature ({measure.density_probes} probes of order {measure.density_order} a seed, a "
        "Gaussian of 3.2e-3 of the range), above plain, in the middle in Adam's geometry, P = 1 / (sqrt(v_hat) + e)",
        f"triangles: extreme eigenvalues by Lanczos (of H_G the largest), {unconverged} of {2 * len(ends)} not converged to 1e-3",
        "below, the share |delta_func| / (|delta_func| + |delta_logit|) through training, under Adam's ascent from step "
        f"{measure.adam_from} on",
        f"held-out rows: {rows(plan.configs)}",
        f"scale {spec.scale}, not the paper's: {sizes(plan.configs)}",
    ]
    return (
        f"At the end of AdamW training the top eigenvalue of H_F is {tops} of that of H_G. {'; '.join(setting)}. "
        f"Means over n={len(spec.seeds)} seeds, bands are 95 % t intervals."
    )


def _verdict(spec: Spec, ends: pd.DataFrame, shares: pd.DataFrame) -> str:
    sentences = []
    for task in spec.tasks:
        for geometry in GEOMETRIES:
            tops, traces = _ratios(ends, task, geometry)
            sentences.append(f"{task}, {geometry}: top eigenvalue of H_F / H_G {_short(tops)}, tr H_F / tr H {_short(traces)}")
        last = at_the_end(shares, task).groupby("ascent", sort=False)
        by = ", ".join(f"{ascent} {_short(estimate(list(part.share)))}" for ascent, part in last)
        sentences.append(f"{task}: share of delta_func {by}")
    return f"{'; '.join(sentences)} (n={len(spec.seeds)}, 95 % t intervals)."


def _short(value: Estimate) -> str:
    return interval(value.mean, value.half_width, 2)

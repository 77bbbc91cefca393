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

from functional_sam.config import Config, compose
from functional_sam.curvature.spectrum import WIDTH, smooth
from functional_sam.exhibits import style
from functional_sam.exhibits.output import Exhibit, save_figure, save_frame
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.statistics import Estimate, estimate
from functional_sam.exhibits.words import firsts, sizes
from functional_sam.records import Run

GEOMETRIES = {"plain": "eigenvalue of A", "adam": r"eigenvalue of $P^{1/2} A\, P^{1/2}$ (Adam's geometry)"}
ASCENTS: dict[str, Any] = {"gradient": "-", "adam": "--"}
BINS = 240


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """AdamW on each task and seed, with shares measured on the way and spectra at the end."""
    return [compose(task, "adamw", spec.scale, spec.layers(task, seed), overrides) for seed in spec.seeds for task in spec.tasks]


def eigenvalue_frame(configs: list[Config]) -> pd.DataFrame:
    """One row per task, seed, geometry and matrix: both ends of the spectrum, the trace, and what eps sees of it."""
    rows = []
    for config in configs:
        for geometry, found in Run(config).read("curvature.json")["geometries"].items():
            for matrix in style.MATRIX_LABEL:
                A = found[matrix]
                rows.append(
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
    return pd.DataFrame(rows)


def density_frame(configs: list[Config], task: str, geometry: str) -> pd.DataFrame:
    """Densities of the three matrices on one common grid: mean and standard error over seeds (of the mean over probes)."""
    records = [Run(config).read("curvature.json")["geometries"][geometry] for config in configs if config.task == task]
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
        frames.append(
            pd.DataFrame(
                {
                    "task": task,
                    "geometry": geometry,
                    "matrix": matrix,
                    "eigenvalue": ((edges[1:] + edges[:-1]) / 2).numpy(),
                    "density": drawn.mean(0),
                    "stderr": drawn.std(0, ddof=1) / math.sqrt(len(drawn)) if len(drawn) > 1 else math.nan,
                    "floor": 0.1 / (records[0][matrix]["density"]["size"] * sigma * math.sqrt(2 * math.pi)),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def share_frame(configs: list[Config]) -> pd.DataFrame:
    """One row per task, seed, step and ascent."""
    return pd.DataFrame(
        [
            {"task": config.task, "seed": config.training.init_seed, "step": line["step"], "ascent": ascent, **line[ascent]}
            for config in configs
            for line in Run(config).metrics("decompose")
            for ascent in config.measure.ascents
        ]
    )


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """Rows: densities plain, densities in Adam's geometry, share of delta_func through training; one column per task."""
    ends, shares = eigenvalue_frame(configs), share_frame(configs)
    densities = pd.concat([density_frame(configs, task, g) for task in spec.tasks for g in GEOMETRIES], ignore_index=True)
    style.use()
    figure, axes = plt.subplots(3, len(spec.tasks), figsize=(style.PAGE, 6.2), squeeze=False)
    for column, task in enumerate(spec.tasks):
        for row, geometry in enumerate(GEOMETRIES):
            at = {"task": task, "geometry": geometry}
            _density(axes[row, column], _where(densities, at), _where(ends, at), geometry)
        axes[0, column].set_title(style.TASK_LABEL.get(task, task))
        share = axes[2, column]
        for ascent, dash in ASCENTS.items():
            part = _where(shares, {"task": task, "ascent": ascent})
            color = style.PART_COLOR["functional"]
            sns.lineplot(part, x="step", y="share", ax=share, color=color, linestyle=dash, errorbar="se", marker="o", legend=False)
        share.set(xscale="log", ylim=(0, 1), xlabel="AdamW step", ylabel=r"share of $\delta_{func}$")
    matrices = [Line2D([], [], color=style.MATRIX_COLOR[m], label=label) for m, label in style.MATRIX_LABEL.items()]
    marks = [Line2D([], [], color="#555555", marker="v", linestyle="", label="top and bottom eigenvalue (Lanczos)")]
    figure.legend(handles=matrices + marks, loc="upper center", ncol=4, bbox_to_anchor=(0.5, 1.02))
    lines = [Line2D([], [], color="#555555", linestyle=d, label=f"{a} ascent") for a, d in ASCENTS.items()]
    axes[2, 0].legend(handles=lines, loc="best")
    figure.align_ylabels()
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    caption, verdict = _words(spec, configs, ends, shares)
    paths = [
        *save_figure(spec, figure),
        save_frame(spec, ends),
        save_frame(spec, densities, "density"),
        save_frame(spec, shares, "shares"),
    ]
    return Exhibit(paths, caption, verdict, ends, figure)


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
            (part.density - part.stderr).clip(lower=floor),
            (part.density + part.stderr).clip(lower=floor),
            color=color,
            alpha=0.2,
            linewidth=0,
        )
        found = ends[ends.matrix == matrix]
        marked = [found.top_value.mean()] + ([found.bottom_value.mean()] if matrix != "gauss_newton" else [])
        axis.plot(marked, [floor * 1.5] * len(marked), linestyle="", marker="v", color=color, clip_on=False)
    axis.set(yscale="log", ylim=(floor, data.density.max() * 2), xlabel=GEOMETRIES[geometry], ylabel="density of eigenvalues")


def _words(spec: Spec, configs: list[Config], ends: pd.DataFrame, shares: pd.DataFrame) -> tuple[str, str]:
    sentences = []
    for task in spec.tasks:
        for geometry in GEOMETRIES:
            part = _where(ends, {"task": task, "geometry": geometry}).pivot(index="seed", columns="matrix")
            ratio = estimate(list(part.top_value.functional / part.top_value.gauss_newton))
            trace = estimate(list(part.trace.functional / part.trace.hessian))
            sentences.append(f"{task}, {geometry}: top eigenvalue of H_F / H_G {_short(ratio)}, tr H_F / tr H {_short(trace)}")
        last = shares[(shares.task == task) & (shares.step == shares[shares.task == task].step.max())]
        by = {a: estimate(list(last[last.ascent == a].share)) for a in ASCENTS}
        sentences.append(f"{task}: share of delta_func " + ", ".join(f"{a} {_short(value)}" for a, value in by.items()))
    measure = configs[0].measure
    unconverged = int((~ends.top_converged.astype(bool)).sum() + (~ends.bottom_converged.astype(bool)).sum())
    rows = ", ".join(f"{c.measure.rows} ({task})" for task, c in firsts(configs).items())
    caption = (
        "Spectral densities of H, H_G and H_F at the end of AdamW training by stochastic Lanczos quadrature "
        f"({measure.density_probes} probes of order {measure.density_order} a seed, a Gaussian of 3.2e-3 of the range), above "
        "plain, in the middle in Adam's geometry, P = 1 / (sqrt(v_hat) + e). Triangles are the extreme eigenvalues by Lanczos (of "
        f"H_G, which has no negative ones, the largest); {unconverged} of {2 * len(ends)} ends have not converged to 1e-3. Below, "
        f"|delta_func| / (|delta_func| + |delta_logit|) through training. On held-out rows: {rows}. Mean over n={len(spec.seeds)} "
        f"seeds, bands are one standard error. Scale {spec.scale}, not the paper's: {sizes(configs)}."
    )
    return caption, f"{'; '.join(sentences)} (n={len(spec.seeds)})."


def _short(value: Estimate) -> str:
    return f"{value.mean:.2f} +- {value.stderr:.2f}"

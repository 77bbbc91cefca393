"""figure-4: spectral densities of H, H_G and H_F at the end of training, and how large the functional part is in them."""

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from functional_sam.curvature.spectrum import WIDTH, smooth
from functional_sam.exhibits import style
from functional_sam.exhibits.markdown import interval, number
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.words import answer, sizes
from functional_sam.records import Source
from functional_sam.study.compare import Verdict, estimate, holm, significant, unpaired_difference

GEOMETRIES = {"plain": "plain", "adam": "Adam's geometry"}
MEASURES = {"traces": r"tr $H_F$ / tr $H$", "tops": r"top $H_F$ / top $H_G$"}
PLAIN = {"traces": "tr H_F / tr H", "tops": "top H_F / top H_G"}
PAIR = ("language", "vision")
SIDES = {Verdict.BETTER: "smaller in language", Verdict.WORSE: "larger in language"}
BINS = 240


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """AdamW on each task and seed, with spectra and traces at the end."""
    configs = [spec.run(task, "adamw", seed, overrides) for seed in spec.seeds for task in spec.tasks]
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


def density_frame(plan: Plan, task: str) -> pd.DataFrame:
    """Densities of the three matrices on one grid: mean over seeds (of the mean over probes), half width of its 95 % t interval.

    The grid holds the ends that Lanczos found, too.
    """
    configs = [config for config in plan.configs if config.task == task]
    records = [plan.source.read(config, "curvature.json")["geometries"]["plain"] for config in configs]
    nodes = {
        m: [torch.tensor(record[m]["density"]["nodes"], dtype=torch.float64) for record in records] for m in style.MATRIX_LABEL
    }
    ends = [record[m][end]["value"] for record in records for m in style.MATRIX_LABEL for end in ("top", "bottom")]
    low = min(*ends, *(float(node.min()) for each in nodes.values() for node in each))
    high = max(*ends, *(float(node.max()) for each in nodes.values() for node in each))
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
                    "matrix": matrix,
                    "eigenvalue": ((edges[1:] + edges[:-1]) / 2).numpy(),
                    "density": [band.mean for band in bands],
                    "half_width": [band.half_width if band.n > 1 else math.nan for band in bands],
                    "floor": 0.1 / (records[0][matrix]["density"]["size"] * sigma * math.sqrt(2 * math.pi)),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def ratios(ends: pd.DataFrame) -> pd.DataFrame:
    """One row per task, seed, geometry: tr H_F / tr H ("traces"), and the top eigenvalue of H_F over that of H_G ("tops")."""
    wide = ends.pivot(index=["task", "seed", "geometry"], columns="matrix", values=["trace", "top_value"])
    found = pd.DataFrame(
        {"traces": wide.trace.functional / wide.trace.hessian, "tops": wide.top_value.functional / wide.top_value.gauss_newton}
    )
    return found.reset_index()


def compared(ends: pd.DataFrame) -> pd.DataFrame:
    """Language minus vision, both measures in both geometries: one family."""
    by_seed = ratios(ends)
    rows: list[dict[str, Any]] = []
    for measure in MEASURES:
        for geometry in GEOMETRIES:
            own = by_seed[by_seed.geometry == geometry]
            sides = [list(own[own.task == task][measure]) for task in PAIR]
            found, each = unpaired_difference(*sides), [estimate(side) for side in sides]
            about = {"measure": measure, "geometry": geometry, "n": found.n}
            for task, one in zip(PAIR, each, strict=True):
                about |= {task: one.mean, f"{task}_half_width": one.half_width}
            rows.append(about | {"difference": found.mean, "half_width": found.half_width, "p": found.p})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return pd.DataFrame(rows)


def smaller_in_language(tests: pd.DataFrame) -> list[Verdict]:
    """Of each row of `compared`, whether the functional part is smaller in language: better is yes, worse is larger."""
    sides = [Verdict.BETTER if row.difference < 0 else Verdict.WORSE for row in tests.itertuples()]
    return [side if significant(p) else Verdict.OPEN for side, p in zip(sides, tests.p_holm, strict=True)]


def draw(plan: Plan) -> Exhibit:
    """A panel of densities a task, with the ends that Lanczos found; below, how large the functional part is."""
    spec, ends = plan.spec, eigenvalue_frame(plan)
    densities = pd.concat([density_frame(plan, task) for task in spec.tasks], ignore_index=True)
    tests = compared(ends)
    style.use()
    figure, axes = plt.subplot_mosaic(
        [list(spec.tasks), ["bars"] * len(spec.tasks)], figsize=(style.PAGE, 4.6), height_ratios=[3, 2]
    )
    for task in spec.tasks:
        plain = ends[(ends.task == task) & (ends.geometry == "plain")]
        _density(axes[task], densities[densities.task == task], plain)
        axes[task].set_title(style.TASK_LABEL.get(task, task))
    _bars(axes["bars"], tests)
    matrices = [Line2D([], [], color=style.MATRIX_COLOR[m], label=label) for m, label in style.MATRIX_LABEL.items()]
    marks = [
        Line2D([], [], color="#555555", marker="v", linestyle="", label="top and bottom eigenvalue (Lanczos, mean over seeds)")
    ]
    figure.tight_layout()
    figure.legend(handles=matrices + marks, loc="lower center", ncol=4, bbox_to_anchor=(0.5, 1.0))
    finding = _finding(tests)
    style.finding_above(figure, finding)
    frames = {"": ends, "density": densities, "tests": tests}
    said = answer(smaller_in_language(tests), Verdict.BETTER)  # as the paper's explanation has it
    return Exhibit(plan, frames, _caption(plan, ends, finding), _verdict(tests), figure, answer=said)


def headline(ends: pd.DataFrame) -> str:
    """The functional part's share of the trace of H, plain geometry, in a few words."""
    tests = compared(ends)
    row = next(tests[(tests.measure == "traces") & (tests.geometry == "plain")].itertuples())
    sides = (f"{task} {interval(getattr(row, task), getattr(row, f'{task}_half_width'), 2)}" for task in PAIR)
    return f"tr H_F / tr H: {', '.join(sides)}"


def _density(axis: Axes, data: pd.DataFrame, ends: pd.DataFrame) -> None:
    floor = data.floor.min()
    for place, (matrix, color) in enumerate(style.MATRIX_COLOR.items()):
        part = data[data.matrix == matrix]
        axis.plot(part.eigenvalue, part.density.clip(lower=floor), color=color, linewidth=0.9)
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
        axis.plot(marked, [floor * 2.5 ** (1 + place)] * len(marked), linestyle="", marker="v", markersize=5, color=color)
    axis.set(yscale="log", ylim=(floor, data.density.max() * 2), xlabel="eigenvalue", ylabel="density of eigenvalues")


def _bars(axis: Axes, tests: pd.DataFrame) -> None:
    for place, row in enumerate(tests.to_dict("records")):
        for shift, task in ((-0.18, PAIR[0]), (0.18, PAIR[1])):
            error = [style.bar(row[f"{task}_half_width"])]
            axis.bar(
                place + shift, row[task], 0.34, yerr=error, color=style.TASK_COLOR[task], capsize=2, error_kw={"linewidth": 0.8}
            )
    labels = [f"{MEASURES[row.measure]},\n{GEOMETRIES[row.geometry]}" for row in tests.itertuples()]
    axis.set_xticks(range(len(tests)), labels)
    axis.axhline(0, color="#555555", linewidth=0.6)
    axis.set_ylabel("ratio")
    axis.legend(
        handles=[Line2D([], [], color=style.TASK_COLOR[t], linewidth=5, label=style.TASK_LABEL[t]) for t in PAIR], loc="best"
    )


def _finding(tests: pd.DataFrame) -> str:
    sides = [SIDES.get(word, str(word)) for word in smaller_in_language(tests)]
    words = [
        f"{PLAIN[row.measure]}, {row.geometry}, {number(row.language, 2)} against {number(row.vision, 2)}"
        for row in tests.itertuples()
    ]
    if len(set(sides)) == 1:
        shown = "; ".join(word.replace(", plain,", "") for word in words if ", plain," in word)
        return f"The functional part, language against vision: {sides[0]} by all measures ({shown})"
    return f"The functional part, language against vision: {'; '.join(f'{a}, {b}' for a, b in zip(words, sides, strict=True))}"


def _caption(plan: Plan, ends: pd.DataFrame, finding: str) -> str:
    measure = plan.configs[0].measure
    unconverged = int((~ends.top_converged.astype(bool)).sum() + (~ends.bottom_converged.astype(bool)).sum())
    return (
        f"{finding}. Densities by stochastic Lanczos quadrature ({measure.density_probes} probes of order "
        f"{measure.density_order} a seed, a Gaussian of {1e3 * WIDTH:.1f}e-3 of the range) on {measure.curvature_targets} targets "
        "of either; "
        f"triangles: ends by Lanczos, {unconverged} of {2 * len(ends)} not converged to 1e-3; Adam's geometry: P^1/2 A P^1/2, "
        f"P = 1 / (sqrt(v_hat) + e); scale {plan.spec.scale}, not the paper's: {sizes(plan.configs)}. "
        f"Means over n={len(plan.spec.seeds)} seeds, bands and bars are 95 % t intervals, Holm's correction over four comparisons."
    )


def _verdict(tests: pd.DataFrame) -> str:
    said = [
        f"{row.measure}, {row.geometry}: language {interval(row.language, row.language_half_width, 2)}, vision "
        f"{interval(row.vision, row.vision_half_width, 2)}, difference {interval(row.difference, row.half_width, 2, sign=True)} "
        f"(p {number(row.p_holm, 3)})"
        for row in tests.itertuples()
    ]
    names = "tr H_F / tr H (traces), top eigenvalue of H_F / H_G (tops)"
    return f"{names}: {'; '.join(said)} (n={tests.n.min()}, 95 % intervals, p by Holm)."

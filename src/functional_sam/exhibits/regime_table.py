"""What table-1, table-2 and table-3 have in common: a regime of the study, planned, in words, as CSV and Markdown."""

import math
from collections.abc import Sequence

import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits.comparison import against, comparison, edges, label, largest_gain, markdown, published, searched
from functional_sam.exhibits.output import Exhibit, save_frame, stem
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.study import REGIMES, Entry, Planned, Study, cells, configs_of, load_study, plan_cells
from functional_sam.files import write_text


def entries(spec: Spec, study: Study) -> dict[str, Entry]:
    """The methods of the exhibit, all of the study's unless it names some."""
    return {name: entry for name, entry in study.methods.items() if not spec.methods or name in spec.methods}


def planned(spec: Spec, regime: str, overrides: tuple[str, ...] = ()) -> list[Planned]:
    """The cells of a regime, each with what is known of its runs."""
    study = load_study(spec, overrides)
    return plan_cells(study, cells(study, regime, spec.tasks), entries(spec, study))


def plan(spec: Spec, regime: str, overrides: tuple[str, ...] = ()) -> list[Config]:
    """The runs known so far, in order."""
    return configs_of(planned(spec, regime, overrides))


def draw(spec: Spec, regime: str) -> Exhibit:
    """CSV and Markdown table of a regime, the published values below."""
    found = planned(spec, regime, spec.command)
    frame = comparison(found)
    shown = f"{REGIMES[regime].capitalize()} training: {lengths(found)}.{not_shown(spec, regime, found)}"
    caption = f"{opening(spec, found)} {shown} {closing(spec, found)}"
    text = f"Against AdamW at equal steps ({REGIMES[regime]}, paired, 95 %): {against(frame)}. {largest_gain(frame)}".strip()
    diagnosed, carried = diagnosis(frame), carried_over(frame)
    path = stem(spec).with_suffix(".md")
    content = [*markdown(frame), "", caption, "", text, "", f"{diagnosed} {carried}".strip(), "", *published()]
    write_text(path, "\n".join(content) + "\n")
    return Exhibit([path, save_frame(spec, frame)], caption, text, frame)


def opening(spec: Spec, found: Sequence[Planned]) -> str:
    """What was trained on what."""
    config = found[0].lr.configs[0]
    shapes = {one.cell.task.removeprefix("language-"): one.lr.configs[0].model for one in found}
    models = ", ".join(f"{size} (width {shape.width}, depth {shape.depth})" for size, shape in shapes.items())
    return (
        f"Scale {spec.scale}, a scaled-down family and not the paper's models: decoders of {models}, non-embedding parameters, "
        f"{config.data.vocab} pieces, rows of {config.model.length} tokens of {' + '.join(config.data.sources)}, "
        f"{config.training.batch} rows a step."
    )


def lengths(found: Sequence[Planned]) -> str:
    """Steps and tokens of each size."""
    steps = {one.cell.task: one.lr.configs[0].training for one in found}
    length = found[0].lr.configs[0].model.length
    if len({training.steps for training in steps.values()}) == 1:
        training = next(iter(steps.values()))
        return f"{training.steps} steps = {training.steps * training.batch * length:,} tokens at every size"
    return "20 tokens per non-embedding parameter: " + ", ".join(
        f"{task.removeprefix('language-')} {training.steps} steps" for task, training in steps.items()
    )


def not_shown(spec: Spec, regime: str, found: Sequence[Planned]) -> str:
    """Sizes of the study whose runs are not complete, in words; empty when all are."""
    left = [task for task in (spec.tasks or load_study(spec).sizes) if task not in {one.cell.task for one in found}]
    names = ", ".join(task.removeprefix("language-") for task in left)
    return f" Not shown, because their {REGIMES[regime]} runs are not complete: {names}." if left else ""


def tuned(found: Sequence[Planned]) -> str:
    """How the numbers came about."""
    first = found[0]
    config = first.lr.configs[0]
    sizes = {one.cell.task.removeprefix("language-"): len(next(iter(one.reported.values()))) for one in found}
    seeds = ", ".join(f"{size}: {n}" for size, n in sizes.items())
    lrs, rhos = searched(first.lr), searched(next(iter(first.rho.values())))
    place = first.cell.task.removeprefix("language-")
    if len({one.cell.regime for one in found}) > 1:
        place += f", {REGIMES[first.cell.regime]}"
    return (
        f"Test loss over {config.training.eval_rows or 'all'} whole documents (cut to a row), read once at the end; mean and "
        f"standard error over n seeds ({seeds}); differences paired by initialization and "
        "data order, better or worse only where the 95 % t interval leaves out zero; a diverged run counts as infinite. Learning "
        f"rate tuned for AdamW on the validation split (mean of {len(first.lr.runs[0])} other seeds; the smallest "
        "within a standard error of the best) and shared by all methods, "
        f"rho tuned per method and size on one of them (grids of {lrs} and of {rhos} at {place}, extended while the best was at an "
        "end, as far as the protocol allows)."
    )


def closing(spec: Spec, found: Sequence[Planned]) -> str:
    """How the numbers of one regime came about, and what the columns of cost are."""
    return (
        f"{tuned(found)} {edges(found)}Gradients are evaluations a run; seconds are wall time on a machine that did other work "
        "besides."
    )


def diagnosis(frame: pd.DataFrame) -> str:
    """Whether the methods with the lowest loss have the smaller functional sharpness."""
    sentences = []
    for size, part in frame[frame.n_curvature > 0].groupby("size", sort=False):
        own = part[part.n_curvature == part.n_curvature.max()]
        best, smallest = own.loc[own.test_loss.idxmin()], own.loc[own.norm_func.idxmin()]
        smaller = [label(row.method) for row in own.itertuples() if row.norm_func_verdict == "smaller"]
        sentences.append(
            f"{str(size).removeprefix('language-')} (curvature of {int(own.n_curvature.max())} seeds): lowest mean loss "
            f"{label(best.method)}, smallest |delta_func| {label(smallest.method)} ({smallest.norm_func:.3g}; AdamW "
            f"{own.norm_func.iloc[0]:.3g}, its share {own.share_func.iloc[0]:.2f}); significantly smaller than AdamW's: "
            f"{', '.join(smaller) or 'none'}"
        )
    if not sentences:
        return ""
    return "Functional sharpness |delta_func| at the final weights, on held-out rows: " + ". ".join(sentences) + "."


def carried_over(frame: pd.DataFrame) -> str:
    """What carrying rho over from the smallest size would have lost."""
    found = []
    for row in frame[frame.rho_carried.notna()].itertuples():
        lost = "not on its grid" if math.isnan(row.lost_by_carrying) else f"{row.lost_by_carrying:+.4f}"
        found.append(f"{row.size.removeprefix('language-')} {label(row.method)} {lost}")
    if not found:
        return ""
    return f"Validation loss lost by carrying rho over from the smallest size (tuning seed, n=1): {', '.join(found)}."

"""figure-10: accuracy against label noise per method, last and best checkpoint, and what each half keeps of SAM's gain."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from functional_sam.exhibits import style
from functional_sam.exhibits.comparison import DESCRIBED, counted, label, left_out, plan
from functional_sam.exhibits.output import Exhibit
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.vision import DOUBLES, POINTS, accuracies, gained, setting
from functional_sam.exhibits.words import answer, sentence
from functional_sam.records import Source
from functional_sam.study.compare import Estimate, Verdict, ratio
from functional_sam.study.report import difference, tested
from functional_sam.study.tune import Planned

__all__ = ["draw", "headline", "plan"]

ALIKE = {  # parts with one rate and weight decay for all
    "alike": "With one rate and weight decay for all",
    "control": "On fresh seeds, written down beforehand, with one rate and weight decay for all",
}
CHECKPOINTS = {"last": "last checkpoint", "best": "best on validation"}
HALVES = ("functional-sam", "logit-sam", "precond-functional-sam")  # whose gain is compared with that of the method below
WHOLE = {"functional-sam": "sam", "logit-sam": "sam", "precond-functional-sam": "precond-sam"}
LOOKS: dict[str, dict[str, str]] = {
    "adamw-double": {"color": "#000000", "linestyle": "--", "marker": "X"},
    "smoothing": {"color": "#999999", "linestyle": ":", "marker": "*"},
}
SHORT = {"adamw-double": "AdamW, twice the epochs", "smoothing": "AdamW, smoothed labels"}


def draw(plan: Plan) -> Exhibit:
    """Above accuracy, below the gain over AdamW; left at the last checkpoint, right at the best. Bars are 95 % intervals."""
    parts = [accuracies(plan.content, plan.source, name == "best").assign(checkpoint=name) for name in CHECKPOINTS]
    data = pd.concat(parts, ignore_index=True)
    kept = what_is_kept([one for one in plan.content if one.cell.part != "alike"], plan.source)
    shown = data[~data.part.isin(DESCRIBED) & data.entry.isin(["adamw", *WHOLE, *WHOLE.values(), *LOOKS])]
    style.use()
    figure, axes = plt.subplots(2, 2, figsize=(style.PAGE, 4.4), sharex=True, sharey="row")
    for column, (name, title) in enumerate(CHECKPOINTS.items()):
        part = shown[shown.checkpoint.eq(name)]
        lines(axes[0, column], part, gain=False)
        lines(axes[1, column], part[part.entry.ne("adamw")], gain=True)
        _on_fresh_seeds(axes[1, column], data[data.checkpoint.eq(name) & data.part.eq("control") & data.rho.notna()])
        axes[0, column].set_title(title[0].upper() + title[1:])
        axes[1, column].set_xlabel("training labels drawn at random (%)")
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("gain over AdamW (points)")
    style.legend_above(figure, axes[0, 0], columns=4)
    style.finding_above(figure, sentence(headline(data)))
    found = {name: _verdicts(data[data.checkpoint.eq(name)], title) for name, title in CHECKPOINTS.items()}
    keeps = f"{_against_longer(data)}{_kept(data, kept)}"
    verdict = f"{found['best']} {found['last']} {keeps}{_share(data)}"
    words = setting(plan.content, plan.spec.scale, data.n, "a checkpoint")
    claimed = data[data.checkpoint.eq("best") & data.part.isin(["noise", "control"]) & data.noise.gt(0)]
    claimed = claimed[claimed.entry.isin(["sam", "functional-sam"])]
    judged = data[data.checkpoint.eq("best") & ~data.part.isin(DESCRIBED)]
    names = [f"{label(row.entry, row.label)} at {POINTS * row.noise:.0f} %" for row in judged.itertuples()]
    missing = left_out(plan, judged.assign(label=names), DOUBLES)
    caption = f"{found['best']} {keeps} {_chosen(judged)}{alike(data)}{words}{missing}"
    frames = {"": data, "kept": kept}
    return Exhibit(plan, frames, caption, verdict, figure, answer=answer(claimed.verdict_baseline, Verdict.BETTER))


def headline(data: pd.DataFrame) -> str:
    """SAM's and each part's gain at the best checkpoint at 40 % noise, of the fresh seeds if they are done; then at others."""
    best = data[data.checkpoint.eq("best")]
    own = best[best.noise.eq(0.4)]
    part = "control" if own.part.eq("control").any() else "noise"
    own = own[own.part.eq(part) & own.entry.isin(["sam", "functional-sam", "logit-sam"])]
    if own.empty:
        return "nothing at 40 % label noise"
    found = ", ".join(f"{label(row.entry)} {gained(row)}" for row in own.itertuples())
    where = f"same rate and decay, {own.n.iloc[0]} fresh seeds" if part == "control" else "best checkpoint"
    others = best[best.part.eq("noise") & best.noise.gt(0) & best.noise.ne(0.4) & best.entry.isin(["sam", "functional-sam"])]
    gains = [
        f"{POINTS * noise:.0f} % {' / '.join(gained(row) for row in rows.sort_values('entry', ascending=False).itertuples())}"
        for noise, rows in others.groupby("noise")
    ]
    more = f"; tuned, SAM / Functional-SAM: {', '.join(gains)}" if gains else ""
    return f"points over AdamW at 40 % label noise, {where}: {found}{more}"


def lines(axis: Axes, part: pd.DataFrame, gain: bool) -> None:
    """One line an entry over the noise, its marks beside each other."""
    if gain:
        axis.axhline(0, color=style.METHOD_COLOR["adamw"], linewidth=0.8)
    groups = list(part.groupby("entry", sort=False))
    for number, (name, own) in enumerate(groups):
        own = own.sort_values("noise")
        found = [difference(row) if gain else Estimate(row.test, row.test_stderr, row.n) for row in own.itertuples()]
        beside = 0.5 * (number - (len(groups) - 1) / 2)
        points = [Estimate(POINTS * one.mean, POINTS * one.stderr, one.n) for one in found]
        text = SHORT.get(str(name), label(str(name)))
        style.marks(axis, list(POINTS * own.noise + beside), points, str(name), label=text, look=LOOKS.get(str(name)))
    axis.set_xticks(sorted(set(POINTS * part.noise)))


def _on_fresh_seeds(axis: Axes, part: pd.DataFrame) -> None:
    """Hollow marks right of their noise, and what they are."""
    for number, row in enumerate(part.itertuples()):
        found = difference(row)
        one = Estimate(POINTS * found.mean, POINTS * found.stderr, found.n)
        style.marks(axis, [POINTS * row.noise + 3.5 + number], [one], row.entry, filled=False)
    if len(part):
        words = f"hollow: one rate and decay\nfor all, {part.n.iloc[0]} fresh seeds"
        axis.annotate(words, (0.02, 0.97), xycoords="axes fraction", ha="left", va="top", fontsize=6)


def what_is_kept(planned: Sequence[Planned], source: Source) -> pd.DataFrame:
    """A row a cell, checkpoint and half: its gain over AdamW by that of the whole, with the 95 % interval of the ratio.

    The interval is nan where the gain of the whole is not significant, all is nan where it is a loss.
    """
    rows = []
    for one in planned:
        config = one.configs[0]
        runs = one.by_entry
        for checkpoint in CHECKPOINTS:
            losses = {name: tested(configs, source, checkpoint == "best") for name, configs in runs.items()}
            base = losses[one.cell.entries[0]]
            gains = {name: [b - a for a, b in zip(own, base, strict=True)] for name, own in losses.items()}
            for half in HALVES:
                if half in gains and WHOLE[half] in gains:
                    whole = gains[WHOLE[half]]
                    mean, low, high = ratio(gains[half], whole) if sum(whole) > 0 else [math.nan] * 3
                    rows.append(
                        {
                            "cell": one.cell.name,
                            "noise": config.data.noise,
                            "activation": config.model.activation,
                            "checkpoint": checkpoint,
                            "half": half,
                            "of": WHOLE[half],
                            "n": len(base),
                            "kept": mean,
                            "low": low,
                            "high": high,
                        }
                    )
    return pd.DataFrame(rows)


def _verdicts(data: pd.DataFrame, checkpoint: str) -> str:
    """Against AdamW at equal epochs, at one checkpoint."""
    own = data[~data.part.isin(DESCRIBED) & ~data.entry.isin(DOUBLES)]
    words = [f"at {POINTS * noise:.0f} % noise {counted(part)}" for noise, part in own.groupby("noise", sort=False)]
    return f"Against AdamW, {checkpoint}, {' - '.join(words)}."


def _against_longer(data: pd.DataFrame) -> str:
    """SAM and Functional-SAM minus AdamW of twice the epochs at the best checkpoint; empty where that was not run."""
    own = data[data.checkpoint.eq("best") & ~data.part.isin(DESCRIBED) & data.entry.isin(["sam", "functional-sam"])]
    words = []
    for noise, rows in own[own.minus_longer.notna() & own.noise.gt(0)].groupby("noise", sort=False):
        each = (f"{label(row.entry)} {gained(row, 'longer')} ({row.verdict_longer})" for row in rows.itertuples())
        words.append(f"{', '.join(each)} at {POINTS * noise:.0f} %")
    return f"Points over AdamW of twice the epochs, as much compute: {'; '.join(words)} noise. " if words else ""


def _chosen(data: pd.DataFrame) -> str:
    """Where AdamW and the methods were reported at other weight decays, and what was chosen at an end of what was tried."""
    words = []
    for noise, part in data.groupby("noise", sort=False):
        own, others = part[part.rho.isna()], part[part.rho.notna()]
        decays, theirs = (" and ".join(f"{value:g}" for value in sorted(set(rows.weight_decay))) for rows in (own, others))
        if decays != theirs:
            words.append(f"At {POINTS * noise:.0f} % noise AdamW's weight decay is {decays}, the methods' {theirs}.")
    edges = data[data.edges.fillna("").ne("")]
    count = f"all {len(data)}" if len(edges) == len(data) else f"{len(edges)} of {len(data)}"
    words += [f"Chosen at an end of what was tried: {count} entries (the CSV says which)."] if len(edges) else []
    return "".join(f"{one} " for one in words)


def alike(data: pd.DataFrame) -> str:
    """Every method minus AdamW at the same rate and weight decay, in points, a sentence for each part; empty where none was run."""
    found = ""
    for part, title in ALIKE.items():
        own = data[data.part.eq(part) & data.checkpoint.eq("best") & data.verdict_baseline.ne("")]
        words = []
        for lr, rows in own.groupby("lr"):
            one = rows.verdict_baseline.nunique() == 1 and len(rows) > 1  # said once
            told = "" if one else " ({})"
            each = ", ".join(f"{label(row.entry)} {gained(row)}{told.format(row.verdict_baseline)}" for row in rows.itertuples())
            words.append(f"at rate {lr:g} {each}{f' (all {rows.verdict_baseline.iloc[0]})' if one else ''}")
        if words:
            decay, rho, noise, n = own.weight_decay.iloc[0], own.rho.iloc[0], POINTS * own.noise.iloc[0], own.n.iloc[0]
            found += (
                f"{title} ({noise:.0f} % noise, decay {decay:g}, rho {rho:g}, n = {n}, nothing chosen, a family of its own), "
                f"points over AdamW: {'; '.join(words)}. "
            )
    return found


def _kept(data: pd.DataFrame, kept: pd.DataFrame) -> str:
    parts = dict(zip(data.cell, data.part, strict=True))
    noisy = kept[kept.noise.gt(0) & kept.of.eq("sam") & kept.checkpoint.eq("best") & kept.low.map(math.isfinite)]
    words = []
    for cell, rows in noisy.groupby("cell", sort=False):
        each = ", ".join(
            f"{label(row.half)} {POINTS * row.kept:.0f} % ({POINTS * row.low:.0f} to {POINTS * row.high:.0f})"
            for row in rows.itertuples()
        )
        where = "on the fresh seeds " if parts[cell] == "control" else f"in {cell} " if parts[cell] in DESCRIBED else ""
        words.append(f"{where}at {POINTS * rows.noise.iloc[0]:.0f} % noise by {each}")
    if not words:
        return "SAM's gain at the best checkpoint is not significant, so it cannot be said what is kept of it."
    return f"Of SAM's gain at the best checkpoint is kept {'; '.join(words)}."


def _share(data: pd.DataFrame) -> str:
    """Functional share of AdamW's gradient by noise; where its rate or decay differ, with them, and at those of the least noise."""
    adamw = data[data.entry.eq("adamw") & data.checkpoint.eq("last")].dropna(subset=["share_func_last"]).sort_values("noise")
    own = adamw[~adamw.part.isin(DESCRIBED)]
    if own.empty:
        return ""
    set_alike = len(own[["lr", "weight_decay"]].drop_duplicates()) == 1
    words = [
        f"{row.share_func_last:.2f} at {POINTS * row.noise:.0f} %"
        + ("" if set_alike else f" (rate {row.lr:g}, decay {row.weight_decay:g})")
        for row in own.itertuples()
    ]
    clean = own.iloc[0]
    same = adamw[adamw.part.isin(ALIKE) & adamw.lr.eq(clean.lr) & adamw.weight_decay.eq(clean.weight_decay)]
    beside = ", ".join(f"{row.share_func_last:.2f} at {POINTS * row.noise:.0f} % (n = {row.n})" for row in same.itertuples())
    found = f" Functional share of AdamW's sharpness gradient at the last step: {', '.join(words)} noise"
    return f"{found}; at the first of these rates and decays {beside}." if beside and not set_alike else f"{found}."

"""table-8: the middle size at fixed length: equal compute, other variants at equal steps, and repeated data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from functional_sam.config import Config
from functional_sam.exhibits import stopping
from functional_sam.exhibits.comparison import check, comparison, edges, label, markdown, rows, summaries
from functional_sam.exhibits.output import Exhibit, save_frame, stem
from functional_sam.exhibits.regime_table import closing, diagnosis, opening
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.statistics import estimate, paired_difference, verdict
from functional_sam.exhibits.study import Planned, Study, cells, configs_of, load_study, longer, plan_cell, plan_cells, repeated
from functional_sam.files import write_text


@dataclass(frozen=True)
class Parts:
    """The cells of the exhibit; those not known yet are missing."""

    main: Planned
    longer: dict[float, Planned]  # factor -> AdamW with so many times the steps
    cheap: Planned | None
    variants: Planned | None
    repeated: list[Planned]

    @property
    def all(self) -> list[Planned]:
        """All that are known, in order."""
        some = [self.main, *self.longer.values(), self.cheap, self.variants, *self.repeated]
        return [one for one in some if one is not None]


def parts(study: Study) -> Parts:
    """Main cell, AdamW with twice the steps and with those of each cheap method's time, the cheap ones, variants, repeated data.

    With study.in_turn as far as the first that is not complete; to draw them, without it.
    """
    (cell,) = cells(study, "fixed", [study.middle])
    adamw = {name: entry for name, entry in study.methods.items() if name == "adamw"}
    found = Parts(plan_cell(study, cell), {}, None, None, [])

    def blocked() -> bool:
        return study.in_turn and not all(one.complete for one in found.all)

    for factor in (2.0, *study.compute.values()):
        for one in [] if blocked() else plan_cells(study, [longer(study, factor)], adamw, study.middle_seeds):
            found.longer[factor] = one
    for name, entries in (("cheap", study.cheap), ("variants", study.variants)):
        if blocked() or len(found.longer) < 1 + len(study.compute):
            return found
        for one in plan_cells(study, [cell], entries, study.middle_seeds):
            found = Parts(**{**vars(found), name: one})
    if blocked() or found.variants is None:
        return found
    return Parts(**{**vars(found), "repeated": plan_cells(study, repeated(study), seeds=study.middle_seeds)})


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """The runs known so far, in order; none to draw before those at equal compute are complete."""
    study = load_study(spec, overrides)
    found = parts(study)
    return [] if study.complete_only and found.cheap is None else configs_of(found.all)


def of_seeds(configs: Sequence[Config], seeds: Sequence[int]) -> list[Config]:
    """The runs of those seeds, in their order."""
    by_seed = {config.training.init_seed: config for config in configs}
    return [by_seed[seed] for seed in seeds]


def against(configs: Sequence[Config], base: Sequence[Config], kind: str) -> dict[str, Any]:
    """The difference to another cell's runs, paired by the seeds of both: same initialization, data order as far as both go."""
    both = [c.training.init_seed for c in base if c.training.init_seed in {d.training.init_seed for d in configs}]
    own, theirs = (summaries(of_seeds(some, both), "test_loss") for some in (configs, base))
    difference = paired_difference(own, theirs)
    return {
        "baseline": kind,
        "baseline_steps": base[0].training.steps,
        "minus_baseline": difference.mean,
        "minus_baseline_stderr": difference.stderr,
        "n_baseline": difference.n,
        "verdict_baseline": verdict(difference),
    }


def frame(study: Study, found: Parts) -> pd.DataFrame:
    """One row a method and block, each with the AdamW it is compared to."""
    assert found.cheap is not None
    check(found.all)
    adamw, double = found.main.reported["adamw"], found.longer[2.0].reported["adamw"]
    out: list[dict[str, Any]] = []
    for row in rows(found.main):
        own = found.main.reported[row["method"]]
        out.append({"block": "equal compute", **row, **(against(own, double, "AdamW, 2 x") if row["method"] != "adamw" else {})})
    for factor, one in found.longer.items():
        (row,) = rows(one)
        out.append(
            {"block": "equal compute", **row, "method": f"adamw {factor:g} x", **against(one.reported["adamw"], adamw, "AdamW")}
        )
    for row in rows(found.cheap):
        base = found.longer[study.compute[row["method"]]].reported["adamw"]
        kind = f"AdamW, {study.compute[row['method']]:g} x"
        out.append({"block": "equal compute", **row, **against(found.cheap.reported[row["method"]], base, kind)})
    for row in rows(found.variants) if found.variants else []:
        assert found.variants is not None
        out.append({"block": "variants", **row, **against(found.variants.reported[row["method"]], adamw, "AdamW")})
    data = pd.DataFrame(out)
    if not found.repeated:
        return data
    again = stopping.with_stopping(comparison(found.repeated), found.repeated)
    again.insert(0, "block", "repeated data")
    return pd.concat([data, again], ignore_index=True)


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """CSV and Markdown: one table a block."""
    study = load_study(spec, spec.command)
    found = parts(study)
    data = frame(study, found)
    seconds = _speed(found)
    times = ", ".join(f"{factor:g} for {label(name)}" for name, factor in study.compute.items())
    caption = (
        f"{opening(spec, [found.main])} {found.main.lr.configs[0].training.steps} steps unless said otherwise. Equal compute: each "
        "method against AdamW with as many more steps as it takes longer (learning rate tuned again, warm-up and cosine "
        f"stretched): 2 for two passes, {times} (measured, results/benchmark/time.csv). Variants at equal steps, each with its "
        "radius tuned over a grid in its own unit. Repeated data: the same steps on fewer unique tokens, rho tuned in each cell "
        f"for the loss at the end; below it the lowest of about {study.evaluations} validation losses on the way, as if stopped "
        "there (the schedule not cut to it, no test loss read there). "
        f"{closing(spec, [found.main])} {edges(found.all[1:])}{not_shown(study, found)}{seconds}"
    )
    text = _words(data)
    lines = ["**Equal compute**", "", *_compute_lines(data[data.block == "equal compute"]), ""]
    if found.variants:
        lines += ["**Variants, equal steps**", "", *_compute_lines(data[data.block == "variants"]), ""]
    lines += ["**Repeated data**", ""] if found.repeated else []
    for regime, part in data[data.block == "repeated data"].groupby("regime", sort=False):
        unique = f"{regime}, {part.unique_tokens.iloc[0]:,} unique tokens"
        lines += [unique, "", *markdown(part), "", *stopping.markdown(part), "", diagnosis(part), ""]
    path = stem(spec).with_suffix(".md")
    write_text(path, "\n".join([*lines, caption, "", text]) + "\n")
    return Exhibit([path, save_frame(spec, data)], caption, text, data)


def not_shown(study: Study, found: Parts) -> str:
    """Blocks whose runs are not complete, in words; empty when all are."""
    left = [] if found.variants else ["variants"]
    have = {one.cell.regime for one in found.repeated}
    left += [name for name in (f"{epochs} epochs" for epochs in study.epochs) if name not in have]
    return f"Not shown, because their runs are not complete: {', '.join(left)}. " if left else ""


def _speed(found: Parts) -> str:
    seconds = {name: estimate(summaries(some, "seconds")).mean for name, some in found.main.reported.items()}
    base = seconds["adamw"]
    ratios = ", ".join(f"{label(name)} {value / base:.2f}" for name, value in seconds.items() if name != "adamw")
    return f"Wall time over AdamW's in these runs: {ratios}."


def _compute_lines(part: pd.DataFrame) -> list[str]:
    lines = [
        "| method | steps | gradients | rho | n | test loss | minus AdamW, equal steps | verdict "
        "| compared to | minus it | n | verdict |",
        "|" + "---|" * 12,
    ]
    for row in part.itertuples():
        rho = "" if pd.isna(row.rho) else f"{row.rho:g}" + (f" ({row.rho_edge}est)" if row.rho_edge else "")
        own = [_signed(row.minus_adamw, row.minus_adamw_stderr), row.verdict_adamw] if row.verdict_adamw else ["", ""]
        other = ["", "", "", ""]
        if isinstance(row.baseline, str):
            difference = _signed(row.minus_baseline, row.minus_baseline_stderr)
            other = [row.baseline, difference, f"{row.n_baseline:.0f}", row.verdict_baseline]
        loss = "diverged" if math.isinf(row.test_loss) else f"{row.test_loss:.4f} +- {row.test_loss_stderr:.4f}"
        cells = [label(row.method), f"{row.steps}", f"{row.gradients:,.0f}", rho, f"{row.n}", loss, *own, *other]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _signed(mean: float, stderr: float) -> str:
    return "diverged" if math.isinf(mean) else f"{mean:+.4f} +- {stderr:.4f}"


def _words(data: pd.DataFrame) -> str:
    sentences = []
    blocks = (
        ("equal compute", "verdict_baseline", "At equal compute"),
        ("variants", "verdict_baseline", "At equal steps, variants"),
    )
    for block, column, name in blocks:
        part = data[(data.block == block) & data[column].notna() & ~data.method.str.startswith("adamw")]
        if part.empty:
            continue
        sentences.append(f"{name}: {_counted(part, column)}")
    for regime, part in data[data.block == "repeated data"].groupby("regime", sort=False):
        others = part[part.method != "adamw"]
        stopped = _counted(others, "stopped_verdict_adamw")
        sentences.append(f"{regime}: {_counted(others, 'verdict_adamw')} (all stopped early: {stopped})")
    return f"Against AdamW (paired, 95 %). {'. '.join(sentences)}."


def _counted(part: pd.DataFrame, column: str) -> str:
    found = []
    for word in ("better", "worse", "inconclusive"):
        names = [label(method) for method, value in zip(part.method, part[column], strict=True) if value.startswith(word)]
        found += [f"{word}: {', '.join(names)}"] if names else []
    return "; ".join(found)

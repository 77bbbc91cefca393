"""Report: the cells of a study as one table, a row an entry (or a trial), differences paired by seed, checks included."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from functional_sam.config import Config, RuntimeConfig
from functional_sam.errors import UserError
from functional_sam.records import Source, content
from functional_sam.sharpness.methods import cost
from functional_sam.study.compare import Estimate, Verdict, estimate, judged, paired_difference
from functional_sam.study.design import LR, RHO, Trial, has_radius
from functional_sam.study.dose import dose_at_measured_steps, dose_of, mean_dose
from functional_sam.study.tune import Planned, score
from functional_sam.tasks import TASKS

# Of curvature.json: column -> where in it. delta_func and delta_logit are those of the gradient ascent.
DIAGNOSIS = {
    "share_func": ("geometries", "plain", "share"),
    "norm_func": ("geometries", "plain", "functional", "norm"),
    "norm_logit": ("geometries", "plain", "gauss_newton", "norm"),
    "top_hessian": ("geometries", "plain", "hessian", "top", "value"),
    "entropy": ("logits", "entropy"),
}
SAM: Mapping[str, Sequence[str]] = {"sam": ("sam",)}  # what most studies compare with beside the baseline


def check(planned: Sequence[Planned], source: Source) -> None:
    """Raise UserError where a comparison would not be one.

    Two entries with the same seed may differ in what the study tunes or names for them only. All runs of a cell have the same data,
    and evaluated as much of it; a run has finished its updates, or is recorded as diverged.
    """
    for one in planned:
        allowed = {"optimizer.lr", "optimizer.weight_decay", *(key for _, trial in one.reported for key, _ in trial.values)}
        allowed |= {key for entry in one.cell.entries for key in one.study.entries[entry].settings}
        if any(one.study.entries[entry].steps != 1.0 for entry in one.cell.entries):
            allowed |= {"training.steps", "optimizer.warmup_steps", "training.eval_every"}
        base = next(iter(one.reported.values()), [])
        seen: dict[str, set[Any]] = {"data (SHA-256)": set(), "size of the validation set": set()}
        for configs in one.reported.values():
            for config, twin in zip(configs, base, strict=True):
                if differing := _differing(config, twin) - allowed:
                    raise UserError(f"{config.name} and {twin.name} are not paired: they differ in {', '.join(sorted(differing))}")
                seen["data (SHA-256)"].add(content(source.read(config, "provenance.json")["data"]))
                summary = source.summary(config)
                if not summary.get("diverged"):
                    if summary["step"] != config.training.steps:
                        raise UserError(f"{config.name}: {summary['step']} updates instead of {config.training.steps}")
                    seen["size of the validation set"].add(summary.get(TASKS[config.kind].unit))
        for what, values in seen.items():
            if len(values) > 1:
                raise UserError(f"cell {one.cell.name}: the runs do not have the same {what}: {', '.join(map(str, values))}")


def _differing(a: Config, b: Config) -> set[str]:
    """Name the settings in which two configs differ, method, runtime and the measured curvature aside."""
    first, second = (dataclasses.asdict(dataclasses.replace(config, runtime=RuntimeConfig())) for config in (a, b))
    found = set()
    for section, values in first.items():
        if section == "method":
            continue
        if isinstance(values, dict):
            found |= {f"{section}.{key}" for key, value in values.items() if value != second[section][key]}
        elif values != second[section]:
            found.add(section)
    return found - {"measure.curvature"}


def frame(planned: Sequence[Planned], source: Source, others: Mapping[str, Sequence[str]] = SAM) -> pd.DataFrame:
    """Read all cells into one frame, after `check`: one row an entry, or a trial where nothing was chosen.

    others: what is compared with beside the baseline: NAME of a column minus_NAME -> entries, the first of them that a cell has.
    """
    check(planned, source)
    rows = []
    for one in planned:
        base = next(iter(one.reported))
        for (name, trial), configs in one.reported.items():
            rows.append(_row(one, name, trial, configs, base, source, others))
    return pd.DataFrame(rows)


def _row(
    one: Planned,
    name: str,
    trial: Trial,
    configs: list[Config],
    base: tuple[str, Trial],
    source: Source,
    others: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """One row: what was set, what came out, the differences, and the curvature where it was measured."""
    config, cell, entry = configs[0], one.cell, one.study.entries[name]
    task, sign = TASKS[config.kind], _sign(config)
    units = config.training.steps * config.training.batch * task.units(config)
    losses = tested(configs, source, cell.best)
    found = estimate([sign * loss for loss in losses])
    edges = one.searches[name].edges if name in one.searches else {}
    row: dict[str, Any] = {
        "cell": cell.name,
        "part": cell.part,
        "task": cell.task,
        "parameters": task.size(config),
        "batch": config.training.batch,
        "steps": config.training.steps,
        "units": units,
        "unique_units": getattr(config.data, f"unique_{task.unit}") or min(units, _held(config, task.unit, source) or units),
        "entry": name,
        "method": config.method.name,
        "lr": trial.get(LR),
        "lr_over_centre": (trial.get(LR) or math.nan) / ((one.centre.best.get(LR) if one.centre.best else None) or math.nan),
        "rho": config.method.rho if has_radius(one.study, name) else math.nan,
        "weight_decay": config.optimizer.weight_decay,
        "edges": " ".join(f"{key.partition('.')[2]}:{end}" for key, end in edges.items()),
        "trials": len(one.searches[name].trials) if name in one.searches else 0,
        "n": len(configs),
        "diverged": sum(bool(source.summary(c).get("diverged")) for c in configs),
        "metric": task.metric.name,
        "test": found.mean,
        "test_stderr": found.stderr,
        "validation": sign * estimate([score(c, source, cell.best) for c in configs]).mean,
        "dose": mean_dose(configs, source),
        "gradients": cost(config.method.name, config.method.options).gradients * config.training.steps,
        "seconds": estimate([float(source.summary(c).get("seconds", math.nan)) for c in configs]).mean,
        "label": entry.label,
    }
    for column, twin in _compared_with(one, name, trial, base, others).items():
        difference = Estimate(math.nan, math.nan, 0)
        if twin is not None and twin != (name, trial):
            theirs = tested(one.reported[twin], source, cell.best)
            difference = paired_difference([sign * a for a in losses], [sign * b for b in theirs])
        row |= {f"minus_{column}": difference.mean, f"minus_{column}_stderr": difference.stderr}
    return row | _curvature(configs, source)


def _sign(config: Config) -> float:
    """1 or -1, which makes the task's metric of a loss (see score), and back."""
    return 1.0 if TASKS[config.kind].metric.lower_is_better else -1.0


def _compared_with(
    one: Planned, name: str, trial: Trial, base: tuple[str, Trial], others: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, Trial] | None]:
    """Column minus_NAME -> the entry and trial that a row is compared with there, None for none."""
    found = {"baseline": _twin(one, base, trial)}
    for column, names in others.items():
        other = next((known for known in names if known in one.cell.entries), "")
        found[column] = None if name in (base[0], other) else _like(one, other, trial)
    return found


def _curvature(configs: list[Config], source: Source) -> dict[str, Any]:
    """Means of DIAGNOSIS over the runs whose curvature was measured, and their number."""
    measured = [c for c in configs if c.measure.curvature and not source.summary(c).get("diverged")]
    found: dict[str, Any] = {"n_curvature": len(measured)}
    for key, path in DIAGNOSIS.items():
        values = [float(_inside(source.read(c, "curvature.json"), path)) for c in measured]
        found[key] = estimate(values).mean if values else math.nan
    return found


def _held(config: Config, unit: str, source: Source) -> int | None:
    """How much of the training split, whose size the run's data say, is trained on: data.share of it; None where they do not.

    Of pairs those that fit into model.length; runs of before 2026-12-01 do not say it, and all pairs are counted.
    """
    data = source.read(config, "provenance.json")["data"]
    found = data.get("fitting", data.get(unit))
    held = found.get("train") if isinstance(found, dict) else None
    return held and int(config.data.share * held)


def _twin(one: Planned, base: tuple[str, Trial], trial: Trial) -> tuple[str, Trial] | None:
    """Find the baseline that a row is compared with: as chosen, or, where nothing was chosen, at the same learning rate."""
    if one.cell.choose:
        return base
    return next((key for key in one.reported if key[0] == base[0] and key[1].get(LR) == trial.get(LR)), None)


def _like(one: Planned, name: str, trial: Trial) -> tuple[str, Trial] | None:
    """Find another entry to compare a row with: as chosen, or, where nothing was chosen, at the same learning rate and radius."""
    of = [key for key in one.reported if key[0] == name]
    if one.cell.choose:
        return of[0] if of else None
    return next((key for key in of if all(key[1].get(k) == trial.get(k) for k in (LR, RHO))), None)


def tested(configs: Sequence[Config], source: Source, best: bool) -> list[float]:
    """Score every run on the test split: its metric as a loss, inf where it diverged. No run is left out."""
    return [score(config, source, best, "test_") for config in configs]


def by_seed(planned: Sequence[Planned], source: Source) -> pd.DataFrame:
    """One row an entry, trial and seed: test metric, the same minus the baseline's of that seed and learning rate, dose."""
    check(planned, source)
    rows = []
    for one in planned:
        base = next(iter(one.reported))
        for (name, trial), configs in one.reported.items():
            twin = _twin(one, base, trial)
            assert twin is not None
            sign = _sign(configs[0])
            own, theirs = (tested(of, source, one.cell.best) for of in (configs, one.reported[twin]))
            for config, a, b in zip(configs, own, theirs, strict=True):
                rows.append(
                    {
                        "cell": one.cell.name,
                        "task": one.cell.task,
                        "batch": config.training.batch,
                        "entry": name,
                        "lr": trial.get(LR),
                        "rho": config.method.rho if has_radius(one.study, name) else math.nan,
                        "seed": config.training.init_seed,
                        "test": sign * a,
                        "minus_baseline": 0.0 if a == b else sign * (a - b),
                        "dose": dose_of(config, source),
                        "dose_at_measured_steps": dose_at_measured_steps(config, source),
                        "diverged": bool(source.summary(config).get("diverged")),
                    }
                )
    return pd.DataFrame(rows)


def difference(row: Any, other: str = "baseline") -> Estimate:
    """Read a row's paired difference; n = 0 where there is none, stderr inf where the two diverged at different seeds."""
    mean, stderr = float(getattr(row, f"minus_{other}")), float(getattr(row, f"minus_{other}_stderr"))
    return Estimate(mean, stderr, 0 if math.isnan(mean) and not math.isinf(stderr) else int(row.n))


def judge(
    data: pd.DataFrame, margin: float, other: str = "baseline", family: Callable[[Any], bool] | None = None, more: int = 0
) -> pd.DataFrame:
    """Add columns verdict_OTHER, detectable_OTHER and half_OTHER (of the 95 % interval), with Holm's correction over the family.

    family: the rows that a claim quantifies over, all with a difference unless given; the others are judged one by one, unadjusted.
    Losses and metrics of which more is better are two families (paper/PROTOCOL.md, fine-tuning, 2026-11-28).
    more: comparisons of the family that are still to come, counted as null.
    """
    data = data.copy()
    rows = list(data.itertuples())
    differences = [difference(row, other) for row in rows]
    lower = [next(t.metric.lower_is_better for t in TASKS.values() if t.metric.name == row.metric) for row in rows]
    chosen = [i for i, row in enumerate(rows) if differences[i].n and (family is None or family(row))]
    words = [Verdict.NONE] * len(rows)
    for i, one in enumerate(differences):
        if one.n and i not in chosen:
            words[i] = judged([one], lower_is_better=lower[i], margin=margin)[0]
    for direction in (True, False):
        own = [i for i in chosen if lower[i] == direction]
        found = judged([differences[i] for i in own], lower_is_better=direction, margin=margin, more=more)
        for i, word in zip(own, found, strict=True):
            words[i] = word
    data[f"verdict_{other}"] = [str(word) for word in words]
    data[f"half_{other}"] = [one.half_width if one.n else math.nan for one in differences]
    data[f"detectable_{other}"] = [one.detectable if one.n else math.nan for one in differences]
    return data


def _inside(record: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = record
    for part in path:
        value = value[part]
    return value

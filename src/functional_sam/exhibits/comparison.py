"""Cells of a study as one table: a row a method and cell, with differences to AdamW and SAM paired by seed, checks included."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from functional_sam.config import Config, RuntimeConfig
from functional_sam.errors import UserError
from functional_sam.exhibits import style
from functional_sam.exhibits.output import paper_directory
from functional_sam.exhibits.statistics import Estimate, estimate, half_width, paired_difference, verdict
from functional_sam.exhibits.study import REGIMES, Planned, Search, has_radius, non_embedding
from functional_sam.records import Run

# Of curvature.json: column -> where in it. delta_func and delta_logit are those of the gradient ascent.
DIAGNOSIS = {
    "share_func": ("geometries", "plain", "share"),
    "norm_func": ("geometries", "plain", "functional", "norm"),
    "norm_logit": ("geometries", "plain", "gauss_newton", "norm"),
    "top_hessian": ("geometries", "plain", "hessian", "top", "value"),
    "top_gauss_newton": ("geometries", "plain", "gauss_newton", "top", "value"),
    "top_functional": ("geometries", "plain", "functional", "top", "value"),
    "logit_norm": ("logits", "norm"),
    "entropy": ("logits", "entropy"),
}


def check(planned: Sequence[Planned]) -> None:
    """Raise UserError where a comparison would not be one.

    Two methods with the same seed may differ in method and radius only: initialization, data, its order, learning rate, schedule,
    updates, batch. No reported seed was tuned on, no tuning run read the test split. All runs compared have the same text,
    tokenizer and evaluated tokens, and finished their updates, or are recorded as diverged.
    """
    records: dict[str, set[Any]] = {"text and tokenizer (SHA-256)": set(), "validation tokens": set(), "test tokens": set()}
    for one in planned:
        tuned_on = {config.training.init_seed for config in one.tuning} | {config.training.data_seed for config in one.tuning}
        if any(config.training.test for config in one.tuning):
            raise UserError(f"{one.cell.task}, {one.cell.regime}: a tuning run reads the test split")
        (name, base), *others = one.reported.items()
        for other, configs in others:
            for config, twin in zip(configs, base, strict=True):
                if _without_method(config) != _without_method(twin):
                    raise UserError(f"{config.name} and {twin.name} differ in more than the method: {other} and {name} not paired")
        for config in [config for configs in one.reported.values() for config in configs]:
            if config.training.init_seed in tuned_on or not config.training.test:
                raise UserError(f"{config.name}: reported on seed {config.training.init_seed}, but tuned on it, or without test")
            summary = Run(config).summary()
            records["text and tokenizer (SHA-256)"].add(Run(config).read("provenance.json")["data"]["sha256"])
            if summary.get("diverged"):
                continue
            if summary["step"] != config.training.steps:
                raise UserError(f"{config.name}: {summary['step']} updates instead of {config.training.steps}")
            records["validation tokens"].add(summary["tokens"])
            records["test tokens"].add(summary["test_tokens"])
    for what, values in records.items():
        if len(values) > 1:
            raise UserError(f"the runs to compare do not have the same {what}: {', '.join(map(str, sorted(values)))}")


def _without_method(config: Config) -> dict[str, Any]:
    content = dataclasses.asdict(dataclasses.replace(config, runtime=RuntimeConfig()))
    del content["method"]
    return content


def summaries(configs: Sequence[Config], key: str) -> list[float]:
    """One field of every run's summary, inf where it diverged: no run is left out."""
    values = [Run(config).summary().get(key) for config in configs]
    return [math.inf if value is None else float(value) for value in values]


def rows(one: Planned, smallest: Planned | None = None) -> list[dict[str, Any]]:
    """One row a method of the cell. smallest: the cell whose radius is carried over, to say what that would have lost."""
    found = []
    losses = {name: summaries(configs, "test_loss") for name, configs in one.reported.items()}
    for name, configs in one.reported.items():
        config, entry = configs[0], one.entries[name]
        test, bits = estimate(losses[name]), estimate(summaries(configs, "test_bits_per_byte"))
        tokens = config.training.steps * config.training.batch * config.model.length
        row: dict[str, Any] = {
            "size": config.task,
            "parameters": non_embedding(config.model),
            "regime": one.cell.regime,
            "steps": config.training.steps,
            "tokens": tokens,
            "unique_tokens": config.data.unique_tokens or tokens,
            "method": name,
            "lr": config.optimizer.lr,
            "lr_edge": one.lr.edge,
            "rho": config.method.rho,
            "rho_edge": one.rho[name].edge if name in one.rho else "",
            "n": test.n,
            "diverged": sum(bool(Run(config).summary().get("diverged")) for config in configs),
            "test_loss": test.mean,
            "test_loss_stderr": test.stderr,
            "test_bits_per_byte": bits.mean,
            "test_bits_per_byte_stderr": bits.stderr,
            "validation_loss": estimate(summaries(configs, "loss")).mean,
        }
        row |= differences(name, losses)
        row |= {"seconds": estimate(summaries(configs, "seconds")).mean, "gradients": entry.passes * config.training.steps}
        row |= _carried(one, name, smallest)
        row |= _diagnosis(configs, one.reported.get("adamw", configs))
        found.append(row)
    return found


def differences(name: str, losses: dict[str, list[float]], prefix: str = "") -> dict[str, Any]:
    """Columns of a method's differences to AdamW and SAM, paired by seed; nan and no verdict where there is none."""
    row: dict[str, Any] = {}
    for other in ("adamw", "sam"):
        difference, word = Estimate(math.nan, math.nan, 0), ""
        if other in losses and name not in (other, "adamw"):
            difference = paired_difference(losses[name], losses[other])
            word = verdict(difference)
        row |= {f"{prefix}minus_{other}": difference.mean, f"{prefix}minus_{other}_stderr": difference.stderr}
        row[f"{prefix}verdict_{other}"] = word
    return row


def _carried(one: Planned, name: str, smallest: Planned | None) -> dict[str, float]:
    """Validation loss on the tuning seed at the smallest size's radius minus that at the tuned one; nan where not on the grid."""
    empty = {"rho_carried": math.nan, "lost_by_carrying": math.nan}
    if smallest is None or smallest is one or name not in one.rho or name not in smallest.rho:
        return empty
    rho, own = smallest.rho[name].best, one.rho[name]
    if rho is None or own.best is None or rho not in own.values:
        return {**empty, "rho_carried": math.nan if rho is None else rho}
    return {"rho_carried": rho, "lost_by_carrying": own.losses[own.values.index(rho)] - min(own.losses)}


def _diagnosis(configs: Sequence[Config], base: Sequence[Config]) -> dict[str, Any]:
    """Means of what curvature.json holds, over the seeds measured, and whether |delta_func| differs from AdamW's."""
    record, other = [curvature(config) for config in configs], [curvature(config) for config in base]
    pairs = [(own, theirs) for own, theirs in zip(record, other, strict=True) if own and theirs]
    measured = [own for own in record if own]
    row: dict[str, Any] = {"n_curvature": len(measured)}
    row |= {key: estimate([own[key] for own in measured]).mean if measured else math.nan for key in DIAGNOSIS}
    row["norm_func_verdict"] = ""
    if pairs and configs[0].method.name != "adamw":
        word = verdict(estimate([math.log(own["norm_func"] / theirs["norm_func"]) for own, theirs in pairs]))
        row["norm_func_verdict"] = {"better": "smaller", "worse": "larger"}.get(word, word)
    return row


def curvature(config: Config) -> dict[str, float]:
    """DIAGNOSIS of a run's final weights; empty where it was not measured, or the run diverged."""
    if not config.measure.curvature or Run(config).summary().get("diverged"):
        return {}
    record = Run(config).read("curvature.json")
    values = {}
    for key, path in DIAGNOSIS.items():
        value: Any = record
        for part in path:
            value = value[part]
        values[key] = float(value)
    return values


def comparison(planned: Sequence[Planned]) -> pd.DataFrame:
    """All cells as one frame, after `check`; the first cell of each regime is the one whose radius is carried over."""
    check(planned)
    smallest: dict[str, Planned] = {}
    for one in planned:
        smallest.setdefault(one.cell.regime, one)
    return pd.DataFrame([row for one in planned for row in rows(one, smallest[one.cell.regime])])


def label(name: str) -> str:
    """A method as the reader sees it."""
    name, *factor = name.split(" ", 1)
    return " ".join([style.METHOD_LABEL.get(name, name), *factor])


def markdown(frame: pd.DataFrame) -> list[str]:
    """The comparison as a Markdown table, one block a size."""
    lines = [
        "| size | method | lr | rho | n | test loss (nats/token) | bits/byte | minus AdamW (paired) | verdict | minus SAM (paired) "
        "| verdict | gradients | seconds |",
        "|" + "---|" * 13,
    ]
    for row in frame.itertuples():
        n = f"{row.n}" + (f", {row.diverged} diverged" if row.diverged else "")
        cells = [row.size.removeprefix("language-"), label(row.method)]
        cells += [f"{row.lr:g}{_edge(row.lr_edge)}", "" if pd.isna(row.rho) else f"{row.rho:g}{_edge(row.rho_edge)}", n]
        cells += [pair(row.test_loss, row.test_loss_stderr, ""), pair(row.test_bits_per_byte, row.test_bits_per_byte_stderr, "")]
        for other in ("adamw", "sam"):
            word = getattr(row, f"verdict_{other}")
            difference = pair(getattr(row, f"minus_{other}"), getattr(row, f"minus_{other}_stderr"), "+") if word else ""
            cells += [difference, word]
        lines.append(f"| {' | '.join([*cells, f'{row.gradients:,.0f}', f'{row.seconds:.0f}'])} |")
    return lines


def _edge(edge: str) -> str:
    return {"": "", "low": " (lowest)", "high": " (highest)"}[edge]


def pair(mean: float, stderr: float, sign: str = "") -> str:
    """A mean and its standard error, where there is one; sign "+" for a difference."""
    if math.isinf(mean):
        return "diverged"
    return f"{mean:{sign}.4f}" + (f" +- {stderr:.4f}" if math.isfinite(stderr) else "")


def published() -> list[str]:
    """The published C4 losses of AdamW and SAM, as a Markdown table."""
    numbers = pd.read_csv(paper_directory() / "numbers.csv")
    lines = ["Published (C4, other models and tokenizer; comparable in sign, not in level):", ""]
    lines += ["| model | method | loss (nats/token) | source |", "|---|---|---|---|"]
    for row in numbers[numbers.id.str.startswith("c4-loss-")].itertuples():
        value = "diverged" if pd.isna(row.value) else f"{row.value:g}"
        lines.append(f"| {row.model} | {label(row.method)} | {value} | {row.source} ({row.standing}); {row.where} |")
    return lines


def searched(one: Search) -> str:
    """The grid of a search in words."""
    return ", ".join(f"{value:g}" for value in one.values)


def edges(planned: Sequence[Planned]) -> str:
    """Where a search ended at the end of its grid, in words; empty when every best value is interior."""
    found = []
    several = len({one.cell.regime for one in planned}) > 1
    for one in planned:
        place = one.cell.task.removeprefix("language-")
        place += f", {REGIMES.get(one.cell.regime, one.cell.regime)}" if several else ""
        if one.lr.edge:
            found.append(f"lr at {place} ({one.lr.edge})")
        found += [f"rho of {label(name)} at {place} ({own.edge})" for name, own in one.rho.items() if own.edge]
    return f"Still at an end of the grid after all extensions, so not settled: {', '.join(found)}. " if found else ""


def against(frame: pd.DataFrame, other: str = "adamw") -> str:
    """Sizes and methods by verdict, in words."""
    parts = []
    for size, part in frame.groupby("size", sort=False):
        words = []
        for word in ("better", "worse", "inconclusive"):
            names = [label(row.method) for row in part.itertuples() if getattr(row, f"verdict_{other}").startswith(word)]
            words += [f"{word}: {', '.join(names)}"] if names else []
        n = "/".join(str(value) for value in sorted(set(part.n)))
        parts.append(f"{str(size).removeprefix('language-')} (n={n}) {'; '.join(words)}")
    return ". ".join(parts)


def largest_gain(frame: pd.DataFrame) -> str:
    """By how much any method may be better than AdamW at all, by the 95 % intervals of the sizes where they are finite."""
    found = []
    for size, part in frame[frame.method != "adamw"].groupby("size", sort=False):
        ends = {
            row.method: half_width(Estimate(row.minus_adamw, row.minus_adamw_stderr, row.n)) - row.minus_adamw
            for row in part.itertuples()
        }
        name, gain = max(ends.items(), key=lambda item: item[1] if math.isfinite(item[1]) else -math.inf)
        if math.isfinite(gain):
            found.append(f"{str(size).removeprefix('language-')} {gain:.4f} ({label(name)})")
    return f"Largest gain over AdamW within any of these intervals, in nats: {', '.join(found)}." if found else ""


def methods_with_radius(planned: Sequence[Planned]) -> list[str]:
    """Names of the entries that have one."""
    return [name for name, entry in planned[0].entries.items() if has_radius(name, entry)]

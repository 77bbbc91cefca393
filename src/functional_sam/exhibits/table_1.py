"""table-1: the five methods in language modeling at equal steps; rho chosen on the validation split, reported on the test split."""

import math
from typing import Any

import pandas as pd

from functional_sam.config import Config, compose
from functional_sam.exhibits import style
from functional_sam.exhibits.output import Exhibit, paper_directory, save_frame, stem
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.statistics import estimate, paired_difference, verdict
from functional_sam.files import write_text
from functional_sam.records import Run


def plan(spec: Spec, overrides: tuple[str, ...] = ()) -> list[Config]:
    """The tuning runs; once they are all complete, also the reported ones, each method at its best rho."""
    tuning = [config for method in spec.methods if method != "adamw" for config in tuning_runs(spec, method, overrides)]
    if not all(Run(config).done for config in tuning):
        return tuning
    return tuning + [config for method in spec.methods for config in reported_runs(spec, method, overrides)]


def tuning_runs(spec: Spec, method: str, overrides: tuple[str, ...]) -> list[Config]:
    """One run per rho of the grid, on the tuning seed."""
    return [_config(spec, method, spec.tuning_seed, rho, False, overrides) for rho in spec.rho]


def reported_runs(spec: Spec, method: str, overrides: tuple[str, ...]) -> list[Config]:
    """One run per reported seed, the test split evaluated once at its end."""
    rho = None if method == "adamw" else best_rho(tuning_runs(spec, method, overrides))
    return [_config(spec, method, seed, rho, True, overrides) for seed in spec.seeds]


def best_rho(configs: list[Config]) -> float:
    """The rho of lowest validation loss; a diverged run never wins unless all diverged (then the smallest rho)."""
    best = min(configs, key=lambda config: (validation_loss(config), config.method.rho))
    assert best.method.rho is not None
    return best.method.rho


def validation_loss(config: Config) -> float:
    """Final validation loss in nats per token, inf for a diverged run."""
    loss = Run(config).summary()["loss"]
    return math.inf if loss is None else float(loss)


def _config(spec: Spec, method: str, seed: int, rho: float | None, test: bool, overrides: tuple[str, ...]) -> Config:
    (task,) = spec.tasks
    layer = {"training": {"init_seed": seed, "data_seed": seed, "test": test}, "method": {"rho": rho}}
    return compose(task, method, spec.scale, [spec.overrides, layer], overrides)


def draw(spec: Spec, configs: list[Config]) -> Exhibit:
    """CSV and Markdown table."""
    reported = {m: [c for c in configs if c.method.name == m and c.training.test] for m in spec.methods}
    tuning = [c for c in configs if not c.training.test]

    def losses(method: str, key: str = "test_loss") -> list[float]:
        values = [Run(config).summary().get(key) for config in reported[method]]
        return [math.inf if value is None else float(value) for value in values]

    rows: list[dict[str, Any]] = []
    for method in spec.methods:
        test, bits = estimate(losses(method)), estimate(losses(method, "test_bits_per_byte"))
        difference = paired_difference(losses(method), losses("adamw"))
        rho = reported[method][0].method.rho
        grid = sorted(c.method.rho for c in tuning if c.method.name == method and c.method.rho is not None)
        rows.append(
            {
                "method": method,
                "rho": rho,
                "rho_at_edge": bool(grid) and rho in (grid[0], grid[-1]),
                "n": test.n,
                "test_loss": test.mean,
                "test_loss_stderr": test.stderr,
                "test_bits_per_byte": bits.mean,
                "validation_loss": estimate(losses(method, "loss")).mean,
                "minus_adamw": difference.mean if method != "adamw" else 0.0,
                "minus_adamw_stderr": difference.stderr if method != "adamw" else 0.0,
                "verdict": verdict(difference) if method != "adamw" else "",
                "seconds": estimate(losses(method, "seconds")).mean,
            }
        )
    frame = pd.DataFrame(rows)
    published = _published()
    config = reported["adamw"][0]
    tokens = config.training.steps * config.training.batch * config.model.length
    caption = (
        f"Language modeling at equal steps, scale {spec.scale}, not the paper's: decoder of width {config.model.width}, depth "
        f"{config.model.depth}, {config.data.vocab} pieces, {config.training.steps} steps = {tokens:,} tokens of "
        f"{' + '.join(config.data.sources)}. Test loss in nats per token over {config.training.eval_rows or 'all'} documents, "
        "mean and standard error over n seeds, difference to AdamW paired by initialization and data order; better or worse "
        f"only where the 95 % t interval leaves out zero. rho chosen on the validation split with another seed from {spec.rho}."
    )
    edges = [style.METHOD_LABEL[row["method"]] for row in rows if row["rho_at_edge"]]
    if edges:
        caption += f" The best rho lies at the edge of the grid for {', '.join(edges)}: the radius is not settled."
    counts = {
        word: [style.METHOD_LABEL[r["method"]] for r in rows if r["verdict"].startswith(word)]
        for word in ("better", "worse", "inconclusive")
    }
    words = "; ".join(f"{word}: {', '.join(names)}" for word, names in counts.items() if names)
    text = f"Against AdamW at equal steps (n={len(spec.seeds)}, paired, 95 %): {words}."
    path = stem(spec).with_suffix(".md")
    write_text(path, _markdown(frame, published, caption, text))
    return Exhibit([path, save_frame(spec, frame)], caption, text, frame)


def _published() -> pd.DataFrame:
    """The published C4 losses of AdamW and SAM."""
    numbers = pd.read_csv(paper_directory() / "numbers.csv")
    return numbers[numbers.id.str.startswith("c4-loss-")]


def _markdown(frame: pd.DataFrame, published: pd.DataFrame, caption: str, text: str) -> str:
    lines = [
        "| method | rho | test loss (nats/token) | bits/byte | minus AdamW (paired) | n | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in frame.itertuples():
        rho = "" if pd.isna(row.rho) else f"{row.rho:g}"
        difference = "" if row.method == "adamw" else f"{row.minus_adamw:+.4f} +- {row.minus_adamw_stderr:.4f}"
        lines.append(
            f"| {style.METHOD_LABEL[row.method]} | {rho} | {row.test_loss:.4f} +- {row.test_loss_stderr:.4f} | "
            f"{row.test_bits_per_byte:.4f} | {difference} | {row.n} | {row.verdict} |"
        )
    lines += [
        "",
        caption,
        "",
        text,
        "",
        "Published (another model, C4, another tokenizer; not comparable in level, only in sign):",
        "",
    ]
    lines += ["| model | method | loss (nats/token) | source |", "|---|---|---|---|"]
    for row in published.itertuples():
        value = "diverged" if pd.isna(row.value) else f"{row.value:g}"
        lines.append(f"| {row.model} | {row.method} | {value} | {row.source} ({row.standing}) |")
    return "\n".join(lines) + "\n"

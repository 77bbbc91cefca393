"""The runs that several exhibits share: learning rate, then radius, then the reported seeds, in every setting compared.

A cell is one setting: model, number of steps, amount of data. In it the runs of stage 1 (AdamW's learning rate) and 2 (each
method's radius) are on tuning seeds and never see the test split; stage 3 reports other seeds, the same for every method.
An exhibit plans cells; two exhibits that plan the same cell have the same runs. paper/PROTOCOL.md says why.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from functional_sam.config import Config, ModelConfig, compose, nearest, read_yaml, validated
from functional_sam.errors import UserError
from functional_sam.exhibits.spec import Spec
from functional_sam.exhibits.statistics import paired_difference
from functional_sam.records import Run

REGIMES = {"fixed": "fixed length", "chinchilla": "Chinchilla-style"}  # of the main tables


@dataclass
class Entry:
    """One line of a comparison: a method, or a variant of one."""

    method: str = ""  # default: the entry's own name
    options: dict[str, Any] = field(default_factory=dict)
    passes: float = 2.0  # gradient evaluations a step
    rho_scale: float = 1.0  # unit of its radius, in that of the grid


@dataclass
class Study:
    """configs/studies/language.yaml at one scale."""

    scale: str = "quick"
    methods: dict[str, Entry] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)  # task -> reported seeds; the smallest model first
    tuning_seeds: list[int] = field(default_factory=list)  # the learning rate by their mean; rho by the first alone
    fixed_steps: int = 0  # of every size, in the fixed-length regime
    tokens_per_parameter: float = 20.0  # non-embedding, in the Chinchilla-style regime
    warmup: float = 0.1  # fraction of the steps
    lr: list[float] = field(default_factory=list)  # log grid
    rho: list[float] = field(default_factory=list)  # log grid
    middle: str = ""  # the size of repeated data, equal compute and variants
    middle_seeds: list[int] = field(default_factory=list)  # reported seeds there; among those of the size
    epochs: list[int] = field(default_factory=list)  # how often the data is met, where it is repeated
    evaluations: int = 20  # on the way, of the reported runs on repeated data: where early stopping would have ended them
    compute: dict[str, float] = field(default_factory=dict)  # method -> time of a step over AdamW's, as measured once
    variants: dict[str, Entry] = field(default_factory=dict)  # at equal steps
    variants_shown: list[str] = field(default_factory=list)  # those of this scale; empty = all
    cheap: dict[str, Entry] = field(default_factory=dict)  # fewer than two passes: compared at equal compute
    curve_seeds: int = 0  # tuning seeds, the first so many, of figure-3's curves at the middle size; 0 = all
    extensions: int = 2  # points that a grid may grow by, one at a time, until its best is interior
    curvature_seeds: int = 0  # reported seeds, the first so many, whose final curvature is measured; 0 = all, -1 = none
    in_turn: bool = False  # plan a cell only when the one before is complete: what exists is a smaller study, always
    complete_only: bool = False  # plan complete cells alone, to draw them; with in_turn
    settings: dict[str, Any] = field(default_factory=dict)  # on the config of every run
    overrides: tuple[str, ...] = ()  # of the command line


@dataclass(frozen=True)
class Cell:
    """One setting in which methods are compared."""

    task: str
    regime: str
    steps: int
    unique_tokens: int = 0  # 0: all there are
    lr_from: "Cell | None" = None  # the cell whose learning rate it takes; None: its own


@dataclass(frozen=True)
class Search:
    """A log grid searched for the lowest validation loss."""

    values: list[float]
    runs: list[list[Config]]  # of each value, one a tuning seed
    best: float | None  # None while runs are missing
    edge: str = ""  # low or high: the best stayed at that end of the grid, as far as it was extended

    @property
    def losses(self) -> list[float]:
        """Validation losses in the order of values, means over the tuning seeds, inf where one diverged."""
        return [mean_loss(configs) for configs in self.runs]

    @property
    def configs(self) -> list[Config]:
        """All runs."""
        return [config for configs in self.runs for config in configs]


def load_study(spec: Spec, overrides: tuple[str, ...] = ()) -> Study:
    """The study an exhibit belongs to, at its scale. Raises UserError for one that cannot be or reports its tuning seed."""
    content = read_yaml("studies", spec.study)
    scales = content.pop("scales", {})
    where = f"configs/studies/{spec.study}.yaml, scale {spec.scale}"
    if spec.scale not in scales:
        raise nearest(f"scale of the study {spec.study}", spec.scale, scales)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Study), content, scales[spec.scale], {"scale": spec.scale})
        study = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(study, Study)
    for name in study.variants_shown:
        if name not in study.variants:
            raise nearest(f"variant of {where}:", name, study.variants)
    study.variants = {name: study.variants[name] for name in study.variants_shown or study.variants}
    study.overrides = overrides
    study.complete_only = study.in_turn and spec.complete_only
    for task, seeds in study.sizes.items():
        if not seeds or not study.tuning_seeds or set(study.tuning_seeds) & set(seeds):
            raise UserError(f"{where}, {task}: reported seeds {seeds}: at least one, and none of tuning_seeds {study.tuning_seeds}")
    if not set(study.middle_seeds) <= set(study.sizes.get(study.middle, [])):
        raise UserError(f"{where}: middle_seeds {study.middle_seeds} are not all among the seeds of middle={study.middle!r}")
    for name in ("lr", "rho"):
        check_grid(getattr(study, name), f"{where}: {name}")
    return study


def check_grid(values: Sequence[float], where: str) -> None:
    """Raise UserError unless the values are positive, rise, and have one common ratio."""
    ratios = [b / a for a, b in itertools.pairwise(values) if a > 0]
    good = bool(values) and min(values) > 0 and len(ratios) == len(values) - 1 and all(ratio > 1 for ratio in ratios)
    if not good or any(not math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios):
        raise UserError(f"{where}={list(values)}: a log grid is needed, rising by one factor, so that it can be extended by it")


def non_embedding(model: ModelConfig) -> int:
    """Parameters of the decoder without token and position embeddings: the blocks' matrices and all LayerNorm scales."""
    D, N, F = model.width, model.depth, model.mlp or 4 * model.width
    return N * (4 * D * D + 2 * D * F) + (2 * N + 1) * D


_bases: dict[str, Config] = {}


def make(
    study: Study,
    cell: Cell,
    name: str,
    entry: Entry,
    seed: int,
    lr: float,
    rho: float | None,
    reported: bool = False,
    curvature: bool = False,
) -> Config:
    """The config of one run. Only method and radius differ between two entries with the same seed: checked where they are drawn."""
    method = entry.method or name
    key = repr((study.scale, study.settings, study.overrides, cell.task, method, entry.options))
    if key not in _bases:  # composing takes 30 ms, and a study has hundreds of runs
        layers = [study.settings, {"method": {"options": entry.options}}]
        _bases[key] = compose(cell.task, method, study.scale, layers, study.overrides)
    config = copy.deepcopy(_bases[key])
    given = {override.partition("=")[0] for override in study.overrides}
    steps = config.training.steps if "training.steps" in given else cell.steps
    values: dict[str, Any] = {
        "training.steps": steps,
        "training.init_seed": seed,
        "training.data_seed": seed,
        "training.test": reported,
        "data.unique_tokens": cell.unique_tokens,
        "optimizer.lr": lr,
        "optimizer.warmup_steps": round(study.warmup * steps),
        "method.rho": rho,
        "measure.curvature": curvature,
    }
    if reported and cell.unique_tokens:
        values["training.eval_every"] = max(1, steps // study.evaluations)
    for place, value in values.items():
        if place not in given:
            section, key = place.split(".")
            setattr(getattr(config, section), key, value)
    return validated(config)


def cells(study: Study, regime: str, tasks: Sequence[str] = ()) -> list[Cell]:
    """One cell a size, or of the given sizes only."""
    if regime not in REGIMES:
        raise nearest("regime", regime, REGIMES)
    for task in tasks:
        if task not in study.sizes:
            raise nearest(f"size of the study at scale {study.scale}:", task, study.sizes)
    return [Cell(task, regime, steps_of(study, regime, task)) for task in tasks or study.sizes]


def repeated(study: Study) -> list[Cell]:
    """The middle size at fixed length on fewer and fewer tokens, met study.epochs times; the learning rate is that of one epoch."""
    (once,) = cells(study, "fixed", [study.middle])
    config = compose(study.middle, "adamw", study.scale, [study.settings], study.overrides)
    tokens = once.steps * config.training.batch * config.model.length
    return [Cell(study.middle, f"{epochs} epochs", once.steps, tokens // epochs, once) for epochs in study.epochs]


def longer(study: Study, factor: float) -> Cell:
    """The middle size at `factor` times the fixed length: AdamW with the time of another method."""
    return Cell(study.middle, f"{factor:g} x the steps", round(factor * study.fixed_steps))


def steps_of(study: Study, regime: str, task: str) -> int:
    """Updates of a run: fixed_steps, or tokens_per_parameter times the non-embedding parameters."""
    if regime == "fixed":
        return study.fixed_steps
    config = compose(task, "adamw", study.scale, [study.settings], study.overrides)
    tokens = study.tokens_per_parameter * non_embedding(config.model)
    return math.ceil(tokens / (config.training.batch * config.model.length))


def loss(config: Config) -> float:
    """Final validation loss in nats per token, inf for a diverged run."""
    value = Run(config).summary()["loss"]
    return math.inf if value is None else float(value)


def mean_loss(configs: Sequence[Config]) -> float:
    """Mean of the final validation losses: inf where one diverged."""
    return sum(map(loss, configs)) / len(configs)


def search(grid: Sequence[float], runs_of: Callable[[float], list[Config]], extensions: int) -> Search:
    """Extend the grid by its own factor at the end where the best value is, until it is interior, `extensions` times at most.

    A diverged run never wins. Where all diverged, the smallest value is the best; with several runs a value, the smallest one whose
    mean is within one standard error (paired) of the lowest: which of two equal ones wins is then no matter of rounding.
    """
    values = sorted(grid)
    factor = values[1] / values[0] if len(values) > 1 else 0.0
    for extended in range(extensions + 1):
        runs = [runs_of(value) for value in values]
        if not all(Run(config).done for configs in runs for config in configs):
            return Search(values, runs, None)
        index = smallest_of_the_best([[loss(config) for config in configs] for configs in runs])
        at = "low" if index == 0 else "high" if index == len(values) - 1 else ""
        edge = at if factor else ""
        if not edge or extended == extensions:
            break
        values = [_rounded(values[0] / factor), *values] if edge == "low" else [*values, _rounded(values[-1] * factor)]
    return Search(values, runs, values[index], edge)


def smallest_of_the_best(losses: Sequence[Sequence[float]]) -> int:
    """Index of the first whose mean is above the lowest one by at most the standard error of their paired difference."""
    means = [sum(values) / len(values) for values in losses]
    lowest = means.index(min(means))
    if len(losses[lowest]) == 1 or math.isinf(means[lowest]):
        return lowest
    differences = [paired_difference(values, losses[lowest]) for values in losses[:lowest]]
    return next((index for index, one in enumerate(differences) if one.mean <= one.stderr), lowest)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def lr_search(study: Study, cell: Cell) -> Search:
    """Stage 1: AdamW's learning rate, by the mean over the tuning seeds: a rate that is good by luck on one is not good."""
    cell = cell.lr_from or cell
    name, entry = next(iter(study.methods.items()))
    assert entry.passes == 1
    return search(
        study.lr, lambda lr: [make(study, cell, name, entry, seed, lr, None) for seed in study.tuning_seeds], study.extensions
    )


def rho_search(study: Study, cell: Cell, name: str, entry: Entry, lr: float) -> Search:
    """Stage 2: the radius of one method on the first tuning seed, at AdamW's learning rate."""
    grid = [_rounded(rho * entry.rho_scale) for rho in study.rho]
    return search(grid, lambda rho: [make(study, cell, name, entry, study.tuning_seeds[0], lr, rho)], study.extensions)


def has_radius(name: str, entry: Entry) -> bool:
    """False for AdamW."""
    return (entry.method or name) != "adamw"


@dataclass(frozen=True)
class Planned:
    """What is known of a cell: its searches, and the runs of every entry on the reported seeds once their radius is known."""

    cell: Cell
    lr: Search
    rho: dict[str, Search]
    reported: dict[str, list[Config]]
    entries: dict[str, Entry]

    @property
    def tuning(self) -> list[Config]:
        """The runs of stages 1 and 2."""
        return [*self.lr.configs, *(config for one in self.rho.values() for config in one.configs)]

    @property
    def configs(self) -> list[Config]:
        """All runs, in the order in which they are best done: stage by stage, all methods of a seed before the next one."""
        by_seed = zip(*self.reported.values(), strict=True) if self.reported else ()
        return [*self.tuning, *(config for seed in by_seed for config in seed)]

    @property
    def complete(self) -> bool:
        """Whether every run of the cell is known, and done."""
        return set(self.reported) == set(self.entries) and all(Run(config).done for config in self.configs)


def plan_cell(study: Study, cell: Cell, entries: dict[str, Entry] | None = None, seeds: Sequence[int] | None = None) -> Planned:
    """The runs of a cell known so far; `entries` default to the study's methods, `seeds` to those of the size."""
    entries = study.methods if entries is None else entries
    seeds = study.sizes[cell.task] if seeds is None else seeds
    measured = study.curvature_seeds or len(seeds)  # -1: no index is below it
    lr = lr_search(study, cell)
    rho: dict[str, Search] = {}
    reported: dict[str, list[Config]] = {}
    if lr.best is not None:
        rho = {name: rho_search(study, cell, name, entry, lr.best) for name, entry in entries.items() if has_radius(name, entry)}
        if all(found.best is not None for found in rho.values()):
            for name, entry in entries.items():
                best = rho[name].best if name in rho else None
                reported[name] = [
                    make(study, cell, name, entry, seed, lr.best, best, True, index < measured) for index, seed in enumerate(seeds)
                ]
    return Planned(cell, lr, rho, reported, entries)


def plan_cells(
    study: Study, wanted: Sequence[Cell], entries: dict[str, Entry] | None = None, seeds: Sequence[int] | None = None
) -> list[Planned]:
    """The cells one after the other; with study.in_turn up to the first that is not complete, or, to draw, those that are."""
    planned: list[Planned] = []
    for cell in wanted:
        one = plan_cell(study, cell, entries, seeds)
        if one.complete or not study.complete_only:
            planned.append(one)
        if study.in_turn and not study.complete_only and not one.complete:
            break
    return planned


def configs_of(planned: Sequence[Planned]) -> list[Config]:
    """Every run once, in the order of the cells."""
    return list({config.hash: config for one in planned for config in one.configs}.values())

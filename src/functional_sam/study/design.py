"""What a study compares: entries (the lines of a comparison), and cells (the settings in which they are compared)."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from functional_sam.config import Config, compose, copied, instance, nearest, read_yaml, settings_of, validated
from functional_sam.errors import UserError
from functional_sam.sharpness.methods import METHODS
from functional_sam.sharpness.options import WARMUPS
from functional_sam.tasks import TASKS

LR, RHO = "optimizer.lr", "method.rho"
CELLS = "cells="  # of the command line
OF_A_RUN = {"training.init_seed", "training.data_seed", "training.test", "training.test_best", "measure.curvature"}


@dataclass
class Entry:
    """One line of a comparison: a method, or a variant of one, and what is tried of it."""

    method: str = ""  # default: the entry's own name
    label: str = ""  # as readers know it; default: the method's
    settings: dict[str, Any] = field(default_factory=dict)  # key -> value on its runs' config, such as method.options.every: 5
    grid: dict[str, list[float]] = field(default_factory=dict)  # key -> values beside the learning rate; all combinations are tried
    rho_scale: float = 1.0  # unit of its radius in that of the grid: a cell's grid of rho is multiplied by it
    steps: float = 1.0  # times those of the cell: AdamW with the time of another method
    matched: str = ""  # the entry that takes as much time: the baseline with more steps


@dataclass
class Cell:
    """One setting. Stage 1 finds the baseline's learning rate (the centre), stage 2 tries each entry around it, 3 reports."""

    name: str = ""
    part: str = ""  # which part of the study it belongs to: exhibits choose cells by it
    task: str = ""
    entries: list[str] = field(default_factory=list)  # the first one is the baseline
    seeds: list[int] = field(default_factory=list)  # of the reported runs
    tuning_seeds: list[int] | None = None  # none: the study's
    settings: dict[str, Any] = field(default_factory=dict)  # key -> value on the config of every run, such as training.batch: 64
    steps: int | None = None  # updates of a run; or:
    tokens_per_parameter: float | None = None  # units of data for each non-embedding parameter
    epochs: int | None = None  # how often the data is met; none: no more than once, as long as there is enough
    lr: list[float] = field(default_factory=list)  # log grid of the centre
    lr_of: str = ""  # the cell whose centre is taken instead
    around: list[float] = field(default_factory=lambda: [1.0])  # multiples of the centre that each entry tries
    rho: list[float] = field(default_factory=list)  # radii that each entry with one tries, in its own unit
    grids: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # entry -> its grid in this cell, instead of its own
    around_of: dict[str, list[float]] = field(default_factory=dict)  # entry -> its multiples of the centre in this cell
    choose: bool = True  # report the best trial of each entry; else every trial, none chosen
    best: bool = False  # choose and report the best checkpoint of a run, by the validation split, not the last
    report: dict[str, Any] = field(default_factory=dict)  # key -> value on the config of reported runs alone
    curvature: int = 0  # reported seeds, the first so many, whose final curvature is measured


@dataclass
class Study:
    """configs/studies/NAME.yaml at one scale."""

    name: str = ""
    scale: str = "quick"
    margin: float = 0.0  # in the metric's unit: a difference below it counts as none
    tuning_seeds: list[int] = field(default_factory=list)
    extensions: int = 0  # points by which the centre's grid may grow while its best is at an end
    warmup: float = 0.1  # fraction of the steps
    evaluations: int = 20  # on the way, where the best checkpoint counts
    in_turn: bool = False  # do a cell only when the one before is complete: what exists is a complete smaller study, always
    entries: dict[str, Entry] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)  # in the order in which they are best done
    settings: dict[str, Any] = field(default_factory=dict)  # on the config of every run
    inherit: list[str] = field(default_factory=list)  # keys, such as weight decay, that entries take from the baseline's choice
    overrides: tuple[str, ...] = ()  # of the command line, on every run's config
    only: tuple[str, ...] = ()  # of the command line: the cells it is about; none: all

    def part(self, *parts: str) -> list[Cell]:
        """The cells of some parts, in order. Raises UserError for a part that no cell belongs to."""
        known = {cell.part for cell in self.cells.values()}
        for part in parts:
            if part not in known:
                raise nearest(f"part of the study {self.name} at scale {self.scale}", part, known)
        return [cell for cell in self.cells.values() if cell.part in parts and (not self.only or cell.name in self.only)]


@dataclass(frozen=True)
class Trial:
    """One choice of what is tuned: (key, value) pairs."""

    values: tuple[tuple[str, float], ...]

    def get(self, key: str) -> float | None:
        """The value of a key, None where the trial does not set it."""
        return dict(self.values).get(key)


def cells_asked(overrides: tuple[str, ...], cells: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The cells that cells=NAME,NAME names among the overrides, none where it is not there, and the other overrides.

    Raises UserError for a cell that is none of `cells`, those of the file and scale called `where`.
    """
    asked = [one.removeprefix(CELLS).strip("[]") for one in overrides if one.startswith(CELLS)]
    names = tuple(name for one in asked for name in one.split(","))
    for name in names:
        if name not in cells:
            raise nearest(f"cell of {where}:", name, cells)
    return names, tuple(one for one in overrides if not one.startswith(CELLS))


def load_study(name: str, scale: str, overrides: tuple[str, ...] = ()) -> Study:
    """A study at a scale. Among the overrides cells=NAME,NAME keeps those cells alone.

    Raises UserError, with file, cell and value, for a study that cannot be or that reports a tuning seed.
    """
    content = read_yaml("studies", name)
    scales = content.pop("scales", {})
    if scale not in scales:
        raise nearest(f"scale of the study {name}", scale, scales)
    where = f"configs/studies/{name}.yaml, scale {scale}"
    try:
        study = instance(Study, content, scales[scale], {"name": name, "scale": scale})
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key}: {str(error).splitlines()[0]}") from error
    study.only, study.overrides = cells_asked(overrides, study.cells, where)
    for cell_name, cell in study.cells.items():
        cell.name = cell_name
        _check(study, cell, f"{where}, cell {cell_name}")
        _require_not_its_own(study, cell)
    return study


def _require_not_its_own(study: Study, cell: Cell) -> None:
    """Raise UserError for an override of what tells a cell's runs apart: they would be called what they are not."""
    own = {LR, RHO, "training.jitter", *OF_A_RUN, *cell.report}
    for name in cell.entries:
        own |= {*study.entries[name].settings, *grid_of(study, cell, name)}
    if cell.epochs is not None:
        own |= _units()
    for key, override in settings_of(study.overrides).items():
        if key in own:
            raise UserError(
                f"override {override!r}: the study {study.name} sets {key} of each of its runs itself, by entry, trial and seed: "
                f"leave it out, or change configs/studies/{study.name}.yaml"
            )


def _units() -> set[str]:
    """How much data a run may have, of each task."""
    return {f"data.unique_{task.unit}" for task in TASKS.values()}


def _check(study: Study, cell: Cell, where: str) -> None:
    """Raise UserError for a cell that contradicts itself, names what is not there, or does not try all entries alike."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"{where}: {message}")

    for entry in cell.entries:
        if entry not in study.entries:
            raise nearest(f"entry of {where}:", entry, study.entries)
    require(bool(cell.entries and cell.seeds and cell.part), "entries, seeds and part are needed")
    made = {LR, "training.steps", "optimizer.warmup_steps", "method.options.warmup_steps", *OF_A_RUN, *_units()}
    made |= {"training.eval_every"} if cell.best else set()
    for key in (*study.settings, *cell.settings, *(key for entry in cell.entries for key in study.entries[entry].settings)):
        require(key not in made, f"{key} is made by the study for each run: what is set of it would be lost")
    require((cell.steps is None) != (cell.tokens_per_parameter is None), "steps or tokens_per_parameter: one of the two")
    require(bool(cell.lr) != bool(cell.lr_of), "lr (a grid) or lr_of (a cell): one of the two")
    if cell.lr_of and cell.lr_of not in study.cells:
        raise nearest(f"lr_of of {where}:", cell.lr_of, study.cells)
    require(not cell.lr_of or not study.cells[cell.lr_of].lr_of, f"lr_of={cell.lr_of}: a cell with a grid of its own is needed")
    if cell.lr:
        check_grid(cell.lr, f"{where}: lr")
    both = set(tuning_seeds(study, cell)) & set(cell.seeds)
    require(not both, f"seeds {sorted(both)} are tuned on and reported: take others")
    require(bool(tuning_seeds(study, cell)), "tuning_seeds are needed: the learning rate is tuned")
    for key, seeds in (("seeds", cell.seeds), ("tuning_seeds", tuning_seeds(study, cell))):
        require(len(set(seeds)) == len(seeds), f"{key}={seeds}: one is there twice, and would count as two")
    numbers = {name: len(trials(study, cell, name, 1.0)) for name in cell.entries if tuned(study, cell, name)}
    require(
        not cell.choose or len(set(numbers.values())) <= 1,
        f"the entries do not get the same number of trials: {', '.join(f'{name} {number}' for name, number in numbers.items())}",
    )


def check_grid(values: Sequence[float], where: str) -> None:
    """Raise UserError unless the values are positive, rise, and have one common ratio."""
    ratios = [b / a for a, b in itertools.pairwise(values) if a > 0]
    good = bool(values) and min(values) > 0 and len(ratios) == len(values) - 1 and all(ratio > 1 for ratio in ratios)
    if not good or any(not math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios):
        raise UserError(f"{where}={list(values)}: a log grid is needed, rising by one factor, so that it can be extended by it")


def tuning_seeds(study: Study, cell: Cell) -> list[int]:
    """The seeds that a cell tunes on."""
    return study.tuning_seeds if cell.tuning_seeds is None else cell.tuning_seeds


def has_radius(study: Study, name: str) -> bool:
    """Whether an entry's method perturbs the weights."""
    return METHODS[study.entries[name].method or name].ascent is not None


def inherited_keys(study: Study, cell: Cell) -> list[str]:
    """List the keys that the other entries take from the baseline's choice, and so wait for, unless their own grid has them."""
    return [key for key in study.inherit if key in grid_of(study, cell, cell.entries[0])] if cell.choose else []


def grid_of(study: Study, cell: Cell, name: str) -> dict[str, list[float]]:
    """An entry's grid in a cell, radii of the cell aside."""
    return cell.grids.get(name, study.entries[name].grid)


def tuned(study: Study, cell: Cell, name: str) -> bool:
    """Whether an entry is tuned in the cell; a placebo takes the centre as it is."""
    return name == cell.entries[0] or has_radius(study, name) or bool(grid_of(study, cell, name))


def trials(study: Study, cell: Cell, name: str, centre: float, inherited: tuple[tuple[str, float], ...] = ()) -> list[Trial]:
    """What is tried of an entry: every multiple of the centre with every combination of its grid, radii included.

    inherited: what the entry has of the baseline's choice, unless its own grid has it.
    """
    entry = study.entries[name]
    if not tuned(study, cell, name):
        return [Trial(((LR, centre), *inherited))]
    grid = {key: [value] for key, value in inherited} | grid_of(study, cell, name)
    if has_radius(study, name) and RHO not in grid and cell.rho:
        grid[RHO] = [rounded(rho * entry.rho_scale) for rho in cell.rho]
    axes = {LR: [rounded(factor * centre) for factor in cell.around_of.get(name, cell.around)], **grid}
    return [Trial(tuple(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def make(
    study: Study, cell: Cell, name: str, trial: Trial, seed: int, *, reported: bool = False, curvature: bool = False
) -> Config:
    """Make the config of one run: of task, scale, study, cell, entry, trial and seed, the command line's overrides over all."""
    config, entry, given = copied(_base(study, cell)), study.entries[name], settings_of(study.overrides)
    task, baseline_steps = TASKS[config.kind], steps_of(study, cell)
    steps = config.training.steps if "training.steps" in given else round(entry.steps * baseline_steps)
    units = baseline_steps * config.training.batch * task.units(config)
    values: dict[str, Any] = {
        "method.name": entry.method or name,
        **entry.settings,
        "training.steps": steps,
        "optimizer.warmup_steps": round(study.warmup * steps),
        "training.init_seed": seed,
        "training.data_seed": seed,
        "training.test": reported,
        "training.test_best": reported and cell.best,
        f"data.unique_{task.unit}": None if cell.epochs is None else units // cell.epochs,
        "measure.curvature": curvature,
        **(cell.report if reported else {}),
        **dict(trial.values),
    }
    if entry.settings.get("method.options.rho_schedule") in WARMUPS:
        values["method.options.warmup_steps"] = round(study.warmup * steps)
    if cell.best:
        values["training.eval_every"] = max(1, steps // study.evaluations)
    for key, value in values.items():
        if key not in given:
            put(config, key, value)
    return validated(config)


def put(config: Config, key: str, value: Any) -> None:
    """Set section.key, or method.options.key, of a config. Raises UserError for a key that it does not have."""
    section, _, rest = key.partition(".")
    if section == "method" and rest.startswith("options."):
        config.method.options[rest.removeprefix("options.")] = value
        return
    owner = getattr(config, section, None)
    if owner is None or not hasattr(owner, rest):
        raise UserError(f"a study sets {key!r}, which no config has")
    real = _types(owner.__class__)[rest] in (float, float | None)
    # 1 in a YAML is a whole number, and the same setting as 1.0: a run has one name.
    setattr(owner, rest, float(value) if real and isinstance(value, int) else value)


@functools.cache
def _types(section: type) -> dict[str, Any]:
    """Setting -> its type."""
    return {one.name: one.type for one in fields(section)}


def _base(study: Study, cell: Cell) -> Config:
    """The config that all runs of a cell start from; to be copied before it is changed."""
    return _composed(study.name, study.scale, study.overrides, _hashable(study.settings), _hashable(cell.settings), cell.task)


def _hashable(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in settings.items())


@functools.lru_cache(maxsize=256)
def _composed(name: str, scale: str, overrides: tuple[str, ...], of_study: Any, of_cell: Any, task: str) -> Config:
    """Compose the config of a cell. That takes 30 ms, and a study has hundreds of runs; `name` tells studies apart."""
    config = compose(task, "adamw", scale, overrides=overrides)
    given = settings_of(overrides)
    for key, value in (*of_study, *of_cell):
        if key not in given:
            put(config, key, list(value) if isinstance(value, tuple) else value)
    return validated(config)


def steps_of(study: Study, cell: Cell) -> int:
    """Updates of a run of the baseline's length."""
    if cell.steps is not None:
        return cell.steps
    assert cell.tokens_per_parameter is not None
    config = _base(study, cell)
    task = TASKS[config.kind]
    return math.ceil(cell.tokens_per_parameter * task.size(config) / (config.training.batch * task.units(config)))


def rounded(value: float) -> float:
    """Round to four significant digits: a grid's points have one name however they were computed."""
    return float(f"{value:.4g}")

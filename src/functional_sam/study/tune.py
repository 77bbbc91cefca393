"""Tune and plan: the runs of a cell known so far, in three stages, and what was chosen.

1. The centre: the baseline's learning rate, by the mean over the tuning seeds; its grid grows while the best is at an end.
2. The trials: each entry at multiples of the centre, with its own grid (rho, or weight decay), the same number for every entry;
   the baseline first where the others take something of its choice, such as the weight decay.
3. The report: the chosen trial of each entry on other seeds; or, where nothing is chosen, every trial on them.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from functional_sam.config import Config
from functional_sam.errors import UserError
from functional_sam.records import Source
from functional_sam.study.compare import paired_difference
from functional_sam.study.design import LR, Cell, Study, Trial, grid_of, inherited_keys, make, rounded, trials, tuned, tuning_seeds
from functional_sam.tasks import TASKS


@dataclass(frozen=True)
class Search:
    """Trials on the tuning seeds."""

    trials: list[Trial]
    runs: list[list[Config]]  # of each trial, one a seed
    scores: list[list[float]]  # of each run, lower is better, inf where it diverged; empty while runs are missing
    best: Trial | None = None  # None while runs are missing

    @property
    def edges(self) -> dict[str, str]:
        """Key -> low or high, where the best value of a key lies at an end of what was tried."""
        found = {}
        for key, value in self.best.values if self.best else ():
            tried = sorted({trial.get(key) for trial in self.trials})  # type: ignore[type-var]
            if len(tried) > 1 and value in (tried[0], tried[-1]):
                found[key] = "low" if value == tried[0] else "high"
        return found

    @property
    def configs(self) -> list[Config]:
        """All runs."""
        return [config for runs in self.runs for config in runs]


@dataclass(frozen=True)
class Planned:
    """A cell and its runs. reported: (entry, trial) -> one run a seed, once the trial is known."""

    study: Study
    cell: Cell
    centre: Search
    searches: dict[str, Search]
    reported: dict[tuple[str, Trial], list[Config]]
    complete: bool

    @property
    def configs(self) -> list[Config]:
        """All runs, each once, in the order in which they are best done: stage by stage, all entries of a seed before the next."""
        tuning = [*self.centre.configs, *(config for one in self.searches.values() for config in one.configs)]
        by_seed = zip(*self.reported.values(), strict=True) if self.reported else ()
        return unique([*tuning, *(config for seed in by_seed for config in seed)])

    @property
    def by_entry(self) -> dict[str, list[Config]]:
        """Entry -> its reported runs. Raises UserError where an entry has several trials: none of them is the entry's."""
        found: dict[str, list[Config]] = {}
        for (name, _), configs in self.reported.items():
            if name in found:
                raise UserError(
                    f"cell {self.cell.name} of configs/studies/{self.study.name}.yaml reports several trials of {name}, where one "
                    "of each entry is compared: let it choose one (choose: true), or try one rate and radius alone"
                )
            found[name] = configs
        return found


def unique(configs: Iterable[Config]) -> list[Config]:
    """Every run once, in order."""
    return list({config.name: config for config in configs}.values())


def score(config: Config, source: Source, best: bool = False, split: str = "") -> float:
    """A run's metric as a loss (an accuracy is negated), inf if it diverged; best: of its best checkpoint; split: "" or "test_"."""
    metric = TASKS[config.kind].metric
    summary = source.summary(config)
    if summary.get("diverged"):
        return math.inf
    key = f"{split}{'best_' if best else ''}{metric.name}"
    if best and not split and key not in summary:  # of a run that tests nothing, such as every trial: by its evaluations
        values = [float(line[metric.name]) for line in source.metrics(config, "validation")]
        value = min(values) if metric.lower_is_better else max(values)
    else:
        value = summary[key]
    return float(value) if metric.lower_is_better else -float(value)


def plan_cell(study: Study, cell: Cell, source: Source) -> Planned:
    """Plan the runs of a cell that are known so far; Planned.complete says whether these are all, and done."""
    centre = find_centre(study, cell, source)
    searches: dict[str, Search] = {}
    to_report: dict[str, list[Trial]] = {}  # of each entry, once those of all entries are known
    if centre.best is not None:
        lr = centre.best.get(LR)
        assert lr is not None
        if cell.choose:
            searches = search_all(study, cell, lr, source)
            chosen = {name: [one.best] for name, one in searches.items() if one.best is not None}
            to_report = chosen if len(chosen) == len(cell.entries) else {}
        else:
            to_report = {name: trials(study, cell, name, lr) for name in cell.entries}
    reported = {
        (name, trial): [
            make(study, cell, name, trial, seed, reported=True, curvature=index < cell.curvature)
            for index, seed in enumerate(cell.seeds)
        ]
        for name, of_entry in to_report.items()
        for trial in of_entry
    }
    one = Planned(study, cell, centre, searches, reported, complete=False)
    return dataclasses.replace(one, complete=bool(to_report) and all(source.done(config) for config in one.configs))


def search_all(study: Study, cell: Cell, lr: float, source: Source) -> dict[str, Search]:
    """Search among the trials of every entry, but for those that still wait for the baseline's choice."""
    found: dict[str, Search] = {}
    inherited: tuple[tuple[str, float], ...] = ()
    waited_for = inherited_keys(study, cell)
    for name in cell.entries:  # the baseline first
        if any(key not in grid_of(study, cell, name) for key in waited_for):
            continue
        tried = trials(study, cell, name, lr, inherited)
        found[name] = search(study, cell, name, tried, source) if tuned(study, cell, name) else Search(tried, [], [], tried[0])
        if name == cell.entries[0] and (best := found[name].best):
            inherited = tuple((key, value) for key, value in best.values if key in waited_for)
            waited_for = []
    return found


def plan_cells(study: Study, cells: Sequence[Cell], source: Source) -> list[Planned]:
    """Plan all cells, each as far as it is known."""
    return [plan_cell(study, cell, source) for cell in cells]


def todo(planned: Sequence[Planned]) -> list[Config]:
    """List the cells' runs in the order in which they are best done; of a study in_turn up to the first incomplete cell."""
    wanted: list[Planned] = []
    for one in planned:
        wanted.append(one)
        if one.study.in_turn and not one.complete:
            break
    return unique(config for one in wanted for config in one.configs)


def search(study: Study, cell: Cell, name: str, tried: Sequence[Trial], source: Source) -> Search:
    """Search among an entry's trials on the tuning seeds: the best has the lowest mean, that of a diverged run being infinite.

    Of equal ones it is the first, and so it is where every trial has a diverged run.
    """
    runs = [[make(study, cell, name, trial, seed) for seed in tuning_seeds(study, cell)] for trial in tried]
    if not all(source.done(config) for configs in runs for config in configs):
        return Search(list(tried), runs, [])
    scores = [[score(config, source, cell.best) for config in configs] for configs in runs]
    means = [sum(values) / len(values) for values in scores]
    return Search(list(tried), runs, scores, tried[means.index(min(means))])


def find_centre(study: Study, cell: Cell, source: Source) -> Search:
    """Search for the baseline's learning rate; its grid grows by its own factor at the end where the best is, as often as
    study.extensions allows.

    Of rates within one standard error (paired) of the best mean the smallest is taken: which of two equal ones wins is then no
    matter of rounding. A grid of one rate is that rate, of which no run is needed.
    """
    if cell.lr_of:
        return find_centre(study, study.cells[cell.lr_of], source)
    values, name = sorted(cell.lr), cell.entries[0]
    if len(values) == 1:
        given = Trial(((LR, values[0]),))
        return Search([given], [], [], given)
    factor = values[1] / values[0]
    for extended in range(study.extensions + 1):
        found = search(study, cell, name, [Trial(((LR, value),)) for value in values], source)
        if found.best is None:
            return found
        index = smallest_of_the_best(found.scores)
        found = Search(found.trials, found.runs, found.scores, found.trials[index])
        edge = found.edges.get(LR)
        if edge is None or extended == study.extensions:
            return found
        values = [rounded(values[0] / factor), *values] if edge == "low" else [*values, rounded(values[-1] * factor)]
    return found


def smallest_of_the_best(scores: Sequence[Sequence[float]]) -> int:
    """Index of the first whose mean is above the lowest one by at most the standard error of their paired difference."""
    means = [sum(values) / len(values) for values in scores]
    lowest = means.index(min(means))
    if len(scores[lowest]) == 1 or math.isinf(means[lowest]):
        return lowest
    differences = [paired_difference(values, scores[lowest]) for values in scores[:lowest]]
    return next((index for index, one in enumerate(differences) if one.mean <= one.stderr), lowest)


class _AllDone:
    """Records in which every run is done, all with the same loss."""

    name = "foreseen"

    def done(self, config: Config) -> bool:
        return True

    def summary(self, config: Config) -> dict[str, Any]:
        return {f"{split}{best}{TASKS[config.kind].metric.name}": 0.0 for split in ("", "test_") for best in ("", "best_")}

    def read(self, config: Config, file: str) -> dict[str, Any]:
        return {}

    def metrics(self, config: Config, kind: str | None = None) -> list[dict[str, Any]]:
        return []


def foreseen(study: Study, cells: Sequence[Cell]) -> list[Config]:
    """List as many runs, of as many steps, as the cells will have in all three stages if no centre's grid grows.

    For estimates before any run is done: which trials will be chosen is not known, so learning rates are not the study's.
    """
    planned = plan_cells(dataclasses.replace(study, extensions=0), cells, _AllDone())
    return unique(config for one in planned for config in one.configs)

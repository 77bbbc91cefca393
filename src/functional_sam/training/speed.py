"""How long a run takes, from the runs of the same shape that this machine has measured."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from functional_sam.config import Config, load
from functional_sam.errors import UserError
from functional_sam.records import Run
from functional_sam.records.provenance import machine
from functional_sam.records.run import RELEASED
from functional_sam.sharpness import cost
from functional_sam.tasks import TASKS


def passes(config: Config) -> float:
    """Gradient evaluations of a step, as the table of methods has them."""
    return cost(config.method.name, config.method.options).gradients


def seen(config: Config, steps: int | None = None) -> tuple[int, str]:
    """What is trained on in `steps` steps (default: all), and its unit: tokens, images."""
    rows, task = (config.training.steps if steps is None else steps) * config.training.batch, TASKS[config.kind]
    return rows * task.units(config), task.unit


def work_of(config: Config) -> float:
    """What a run costs beside others: gradient evaluations of all steps, times tokens or patches, times parameters."""
    shape = TASKS[config.kind].shape(config)
    return passes(config) * config.training.steps * config.training.batch * shape.L * shape.parameters


@dataclass(frozen=True)
class Measured:
    """A run's speed: seconds a step, with what is measured and evaluated on the way, on `threads` threads."""

    config: Config
    seconds: float
    threads: int

    @cached_property
    def same(self) -> tuple[str, ...]:
        """Equal where a step takes the same time."""
        return _key(self.config, True)

    @cached_property
    def alike(self) -> tuple[str, ...]:
        """Equal where a gradient takes the same time."""
        return _key(self.config, False)


def measured(root: Path, tasks: Iterable[str] = ("*",)) -> list[Measured]:
    """The speeds of the complete and partial runs of tasks under `root` that this kind of machine did, start to end."""
    here, found = machine(), []
    for path in sorted(path for task in set(tasks) for path in root.glob(f"{task}-*/config.yaml")):
        if not _done_by(here, path.parent):
            continue
        try:
            run = Run(load(path), root)
            record = run.read("provenance.json")
            lines = [run.summary()] if run.done else run.metrics("train")[-1:]
        except UserError:  # a directory that holds no run yet
            continue
        if lines and lines[0].get("seconds") and lines[0].get("step"):
            found.append(Measured(run.config, lines[0]["seconds"] / lines[0]["step"], record["threads"]))
    return found


def _done_by(kind: str, directory: Path) -> bool:
    """Whether a kind of machine alone did a run; asked first, for to parse a config takes a hundred times as long."""
    try:
        record = json.loads((directory / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if (directory / RELEASED).is_file() or not isinstance(record, dict) or record.get("machine") != kind:
        return False
    return not any("machine" in part for part in record.get("resumed", []))


def estimate(config: Config, speeds: Sequence[Measured]) -> Measured | None:
    """Seconds a step of a config, None when nothing of its shape was measured.

    From runs that differ in seeds, rho and number of steps alone; else from other methods of the same shape, by their passes.
    """
    own = Measured(config, 0.0, 0)
    same = [speed for speed in speeds if speed.same == own.same]
    if same:
        return Measured(config, statistics.median(s.seconds for s in same), _threads(same))
    alike = [speed for speed in speeds if speed.alike == own.alike]
    if not alike:
        return None
    a_pass = statistics.median(speed.seconds / passes(speed.config) for speed in alike)
    return Measured(config, a_pass * passes(config), _threads(alike))


def _threads(speeds: Iterable[Measured]) -> int:
    return round(statistics.median(speed.threads for speed in speeds))


def _key(config: Config, exact: bool) -> tuple[str, ...]:
    """What a step's time depends on; `exact`: with the method and all that is evaluated and measured besides."""
    training = config.training
    work = (config.kind, config.model, config.data, config.optimizer.name, training.batch, config.micro_batch)
    shape = (*work, training.precision, config.runtime.device)
    if exact:
        frequency = (training.eval_every or training.steps) / training.steps  # of two runs of different length
        tests = (training.test, training.test_best, training.test_rows)
        also = (config.method.name, config.method.options, *tests, training.eval_rows, frequency, config.measure)
        return tuple(map(_text, (*shape, *also)))
    return tuple(map(_text, shape))


def _text(part: object) -> str:
    return repr(dataclasses.asdict(part)) if dataclasses.is_dataclass(part) and not isinstance(part, type) else repr(part)

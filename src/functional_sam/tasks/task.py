"""A task is a model, data, a loss, and what is measured on held-out data. It knows no method.

A new task is a subclass of Task in a file here, a row of TASKS, its data in data/, and a YAML in configs/tasks.
"""

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from functional_sam.config import Config
from functional_sam.data.cache import Progress
from functional_sam.data.shards import Watch
from functional_sam.losses import smoothed
from functional_sam.models.shape import ConvShape, PairShape, Shape
from functional_sam.tasks.batches import Batch, Batches, split


@dataclass(frozen=True)
class Metric:
    """What a task is judged by."""

    name: str  # its key in metrics.jsonl and done.json
    label: str  # of an axis, with its unit
    lower_is_better: bool

    def better(self, a: float, b: float) -> bool:
        """Whether a is better than b."""
        return a < b if self.lower_is_better else a > b


class Prepared(Protocol):
    """Data made ready in the cache."""

    directory: Path
    manifest: dict[str, Any]  # with a count for each split under the task's unit
    sha256: str


class Task(abc.ABC):
    """What the rest of the house asks of a task. The class methods need no data, so that plans and tables can ask them."""

    metric: ClassVar[Metric]
    unit: ClassVar[str]  # of work: tokens, images; data.unique_UNIT limits how many of them a run trains on
    data: Any

    def __init__(self, config: Config, progress: Progress | None = None):
        self.check(config)
        self.config, self.data = config, self.prepare(config, progress)
        self.provenance: dict[str, object] = {"data": self.data_name(config), **self.data.manifest}  # names, versions, SHA-256

    # ------------------------------------------------------------------ facts of a config

    @classmethod
    @abc.abstractmethod
    def check(cls, config: Config) -> None:
        """Raise UserError for settings that only the task knows to be wrong."""

    @classmethod
    @abc.abstractmethod
    def prepare(cls, config: Config, progress: Progress | None = None, processes: int = 0, watch: Watch | None = None) -> Prepared:
        """The data of a config, made once under runtime.cache; processes (0: one a core) and watch are for what comes in shards."""

    @classmethod
    @abc.abstractmethod
    def data_directory(cls, config: Config) -> Path:
        """Where `prepare` keeps the data, whether it is there or not."""

    @classmethod
    @abc.abstractmethod
    def data_name(cls, config: Config) -> str:
        """The data, for captions."""

    @classmethod
    @abc.abstractmethod
    def model_name(cls, config: Config) -> str:
        """The sort of model, for captions."""

    @classmethod
    def units(cls, config: Config) -> int:
        """Units of work in a row."""
        return 1

    @classmethod
    @abc.abstractmethod
    def shape(cls, config: Config) -> Shape | ConvShape | PairShape:
        """The sizes of the model, from which its cost is planned."""

    @classmethod
    def size(cls, config: Config) -> int:
        """Parameters but for embeddings and head."""
        return cls.shape(config).non_embedding

    # ------------------------------------------------------------------ model and data

    @abc.abstractmethod
    def model(self) -> torch.nn.Module:
        """The model at its initial weights (training.init_seed)."""

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of training: (logits, targets) -> (sum over valid targets, number of them)."""
        return smoothed(self.config.training.label_smoothing)

    def forward(self, model: torch.nn.Module, inputs: Any, readout: Callable[..., Any] | None = None) -> Any:
        """Logits, or what readout(h, W) makes of the last hidden state (functional_sam.models)."""
        return model(inputs) if readout is None else model(inputs, readout=readout)

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, by optimizer.decay."""
        parameters = list(model.parameters())
        if self.config.optimizer.decay == "all":
            return [{"params": parameters}]
        others = [p for p in parameters if p.ndim < 2]
        return [{"params": [p for p in parameters if p.ndim >= 2]}, {"params": others, "weight_decay": 0.0}]

    @abc.abstractmethod
    def rows(self, step: int) -> Batch:
        """All rows of a step (0-based): a function of step and training.data_seed alone."""

    def batch(self, step: int) -> Batches:
        """The step's micro-batches."""
        return split(self.rows(step), self.config.micro_batch)

    @abc.abstractmethod
    def held_out(self, split: str, size: int, rows: int | None) -> Iterable[tuple[Any, ...]]:
        """(inputs, targets, what else an evaluation needs) of `size` rows, over the first `rows` rows (none: all) of a split."""

    def elsewhere(self) -> "Task | None":
        """The same task on data.elsewhere, for measure.robustness; none: it has no data of another kind."""
        return None

    def measured(self) -> Batches:
        """The fixed held-out rows on which curvature is measured."""
        measure = self.config.measure
        return [(inputs, targets) for inputs, targets, *_ in self.held_out("validation", measure.micro_batch, measure.rows)]

    def evaluated(self, split: str) -> Iterable[tuple[Any, ...]]:
        """The held-out rows of an evaluation."""
        training = self.config.training
        return self.held_out(split, training.eval_batch, training.test_rows if split == "test" else training.eval_rows)

    @abc.abstractmethod
    def evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        """On "validation" or "test": "loss", the metric, and how many units they are means of; without autocast.

        Called in every process of a training, and the same in all (tasks.ranks.totals).
        """

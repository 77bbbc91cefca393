"""A task is a model, data, and what is measured on held-out data. It knows no method."""

import json
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from functional_sam.config import Config
from functional_sam.data.cache import MANIFEST, Progress
from functional_sam.tasks.language import Language, data_directory
from functional_sam.tasks.vision import Vision, pixels_directory

Batches = list[tuple[Tensor, Tensor]]


class Task(Protocol):
    """What training needs of a task."""

    provenance: dict[str, object]  # of the data: names, versions, SHA-256

    def model(self) -> torch.nn.Module:
        """The model at its initial weights (training.init_seed)."""

    def batch(self, step: int) -> Batches:
        """Micro-batches of a step (0-based): a function of step and training.data_seed alone."""

    def measured(self) -> Batches:
        """The fixed held-out rows on which curvature is measured."""

    def evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        """Metrics on "validation" or "test": loss in nats, and bits_per_byte or accuracy."""


def prepare(config: Config, progress: Progress | None = None) -> Task:
    """The task of a config, its data made ready (cached under runtime.cache)."""
    kind = Language if config.model.kind == "decoder" else Vision
    return kind(config, Path(config.runtime.cache), progress)


def prepared_sha256(config: Config) -> str | None:
    """SHA-256 of the data a config would train on, None where it is not prepared yet; nothing is prepared here."""
    directory = data_directory(config) if config.model.kind == "decoder" else pixels_directory(config)
    try:
        sha256: str = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError):
        return None
    return sha256

"""Tasks: a model, data, a loss, and what is measured on held-out data."""

import json
from typing import Any

from functional_sam.config import Config, nearest
from functional_sam.data.cache import MANIFEST, Progress
from functional_sam.tasks.batches import Batches
from functional_sam.tasks.finetune import Acceptability, Answers, FineTune, Grade
from functional_sam.tasks.language import Language
from functional_sam.tasks.task import Metric, Task
from functional_sam.tasks.text_to_text import TextToText, TextToTextAnswers
from functional_sam.tasks.translation import Translation
from functional_sam.tasks.vision import Vision

__all__ = ["TASKS", "Batches", "Metric", "Task", "check", "prepare", "prepared_manifest"]

TASKS: dict[str, type[Task]] = {
    "language": Language,
    "vision": Vision,
    "finetune": FineTune,
    "acceptability": Acceptability,
    "answers": Answers,
    "grade": Grade,
    "text-to-text": TextToText,
    "text-to-text-answers": TextToTextAnswers,
    "translation": Translation,
}


def check(config: Config) -> None:
    """Raise UserError for an unknown kind of task, or settings that the task knows to be wrong."""
    if config.kind not in TASKS:
        raise nearest("kind of task", config.kind, TASKS)
    TASKS[config.kind].check(config)


def prepare(config: Config, progress: Progress | None = None) -> Task:
    """The task of a config, its data made ready (cached under runtime.cache)."""
    check(config)
    return TASKS[config.kind](config, progress)


def prepared_manifest(config: Config) -> dict[str, Any] | None:
    """The manifest of the data a config would train on, None where it is not prepared yet; nothing is prepared here."""
    try:
        manifest = (TASKS[config.kind].data_directory(config) / MANIFEST).read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(manifest)
    except (OSError, ValueError):
        return None
    return found

"""Next-token prediction on real prose with the Nanodo decoder."""

import copy
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sam.config import Config
from functional_sam.data import c4
from functional_sam.data.cache import Progress
from functional_sam.data.shards import Watch
from functional_sam.data.sources import check_sources
from functional_sam.data.text import TextData, prepare_text, text_directory
from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy
from functional_sam.models import Decoder
from functional_sam.models.shape import Shape
from functional_sam.tasks.batches import Batch
from functional_sam.tasks.ranks import totals
from functional_sam.tasks.task import Metric, Task


class Language(Task):
    """Training rows are packed windows. Evaluation rows are documents, padded or cut to L as in Nanodo, or all of each document."""

    metric = Metric("loss", "loss (nats per token)", lower_is_better=True)
    unit = "tokens"
    data: TextData

    @classmethod
    def check(cls, config: Config) -> None:
        data = config.data
        if config.model.kind != "decoder":
            raise UserError(f"model.kind={config.model.kind!r}: a task of kind language has a decoder")
        if data.augment:
            raise UserError(f"data.augment={data.augment} is for images, not for text")
        if data.elsewhere:
            check_sources(data.elsewhere)
        if data.elsewhere and "c4" in data.sources:
            raise UserError("data.elsewhere is for packaged text, not for c4")
        if data.transfer:
            check_sources(data.transfer)
            if "c4" in data.sources or {*data.transfer} & {*data.sources}:
                raise UserError(
                    f"data.transfer={data.transfer}: other packaged text than data.sources={data.sources}, and not c4's"
                )
        if data.noise or data.relabel or data.unique_images or config.model.activation != "gelu":
            raise UserError("data.noise, data.relabel, data.unique_images and model.activation are for images, not for text")
        if "c4" in data.sources:
            if data.sources != ["c4"]:
                raise UserError(f"data.sources={data.sources}: c4 stands alone")
        elif data.files or data.tokenizer or data.hub:
            raise UserError(f"data.files, data.tokenizer and data.hub are for data.sources=[c4], not for {data.sources}")
        else:
            check_sources(data.sources)

    @classmethod
    def prepare(cls, config: Config, progress: Progress | None = None, processes: int = 0, watch: Watch | None = None) -> TextData:
        cache, wanted = Path(config.runtime.cache), wanted_c4(config)
        if wanted:
            return c4.prepare_c4(wanted, cache, progress, processes, watch)
        text = prepare_text(config.data.sources, config.data.vocab, cache, progress)
        for sources in (config.data.elsewhere, *([name] for name in config.data.transfer)):
            if sources:  # now, not after the training that it is for
                text.elsewhere(sources, progress)
        return text

    def __init__(self, config: Config, progress: Progress | None = None):
        super().__init__(config, progress)
        if config.data.transfer:
            self.provenance["transfer"] = {name: self.data.elsewhere([name]).sha256 for name in config.data.transfer}
        if config.data.sources == ["c4"] and config.data.unique_tokens is None:
            _warn_of_repeats(config, self.data)

    @classmethod
    def data_directory(cls, config: Config) -> Path:
        cache, wanted = Path(config.runtime.cache), wanted_c4(config)
        return wanted.directory(cache) if wanted else text_directory(config.data.sources, config.data.vocab, cache)[0]

    @classmethod
    def data_name(cls, config: Config) -> str:
        return " + ".join(config.data.sources)

    @classmethod
    def model_name(cls, config: Config) -> str:
        return "decoder"

    @classmethod
    def units(cls, config: Config) -> int:
        return config.model.length

    @classmethod
    def shape(cls, config: Config) -> Shape:
        m = config.model
        return Shape(m.width, m.depth, m.mlp or 4 * m.width, m.heads, m.length, config.data.vocab, 0, m.length)

    def model(self) -> torch.nn.Module:
        m = self.config.model
        return Decoder(
            self.config.data.vocab,
            m.width,
            m.depth,
            m.heads,
            m.length,
            m.mlp,
            m.head_dtype,
            m.checkpoint_blocks,
            m.dropout,
            m.embedding_scale,
            generator=torch.Generator().manual_seed(self.config.training.init_seed),
        )

    def rows(self, step: int) -> Batch:
        training, unique_tokens = self.config.training, self.config.data.unique_tokens
        return self.data.train_batch(step, training.batch, self.config.model.length, training.data_seed, unique_tokens)

    def held_out(self, split: str, size: int, rows: int | None) -> Iterable[tuple[Any, ...]]:
        windows = self.config.data.held_out == "windows"
        return self.data.eval_batches(split, size, self.config.model.length, rows, windows)

    def elsewhere(self) -> Task | None:
        return self._on(self.config.data.elsewhere) if self.config.data.elsewhere else None

    def _on(self, sources: list[str]) -> "Language":
        """The same task on other text, cut by this one's tokenizer."""
        other = copy.copy(self)
        other.data = self.data.elsewhere(sources)
        return other

    def evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        """Mean nats per token, and bits per byte of the text that the rows cover.

        With the test split also loss_SOURCE and bits_per_byte_SOURCE of each of data.transfer: its test split, untrained on.
        """
        found = self._judged(model, split)
        for name in self.config.data.transfer if split == "test" else ():
            other = self._on([name])._judged(model, split)
            found |= {f"{key}_{name}": other[key] for key in ("loss", "bits_per_byte")}
        return found

    def _judged(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        def sums(tokens: Tensor, targets: Tensor, covered: Tensor) -> tuple[float, ...]:
            loss, count = cross_entropy(self.forward(model, tokens), targets)
            return float(loss), int(count), int(covered.sum())

        nats, tokens, num_bytes = totals(model, self.evaluated(split), sums)
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / num_bytes, "tokens": int(tokens)}


def _warn_of_repeats(config: Config, data: TextData) -> None:
    """Of a corpus that no run is meant to read twice: which parts repeat is a choice of data.unique_tokens."""
    training, length = config.training, config.model.length
    read, there = training.steps * training.batch, data.train_windows(length)
    if read > there:
        warnings.warn(
            f"the run reads {read * length:,} tokens, data.files={config.data.files} holds {there * length:,}: it goes on at the "
            "start, where they repeat. A larger data.files (another run) avoids it, data.unique_tokens says that it is meant",
            stacklevel=2,
        )


def wanted_c4(config: Config) -> c4.C4 | None:
    """What to prepare of C4, None for packaged text."""
    data = config.data
    if data.sources != ["c4"]:
        return None
    return c4.C4(data.vocab, config.runtime.data or data.hub or c4.HUB, data.files, data.tokenizer)

"""Next-token prediction on real prose with the Nanodo decoder."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from functional_sam.config import Config
from functional_sam.data import c4
from functional_sam.data.text import TextData, prepare_text, text_directory
from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy
from functional_sam.models import Decoder
from functional_sam.tasks.ranks import shared, summed


def wanted_c4(config: Config) -> c4.C4 | None:
    """What to prepare of C4, None for packaged text. Raises UserError for C4 mixed with others, misplaced options."""
    data = config.data
    if "c4" in data.sources:
        if data.sources != ["c4"]:
            raise UserError(f"data.sources={data.sources}: c4 stands alone")
        return c4.C4(data.vocab, config.runtime.data or c4.HUB, data.files, data.tokenizer)
    if data.files or data.tokenizer:
        raise UserError(f"data.files and data.tokenizer are for data.sources=[c4], not for {data.sources}")
    return None


def data_directory(config: Config) -> Path:
    """Where the prepared text of a config is, or will be."""
    cache, wanted = Path(config.runtime.cache), wanted_c4(config)
    return wanted.directory(cache) if wanted else text_directory(config.data.sources, config.data.vocab, cache)[0]


class Language:
    """Training rows are packed windows, evaluation rows whole documents (padded or truncated to L), as in Nanodo."""

    def __init__(self, config: Config, cache: Path, progress: Callable[[str], None] | None = None):
        self.config = config
        wanted = wanted_c4(config)
        self.data: TextData = (
            c4.prepare_c4(wanted, cache, progress)
            if wanted
            else prepare_text(config.data.sources, config.data.vocab, cache, progress)
        )
        self.provenance: dict[str, object] = {"data": "+".join(config.data.sources), **self.data.manifest}

    def model(self) -> torch.nn.Module:
        shape = self.config.model
        return Decoder(
            self.config.data.vocab,
            shape.width,
            shape.depth,
            shape.heads,
            shape.length,
            shape.mlp,
            shape.head_dtype,
            shape.checkpoint_blocks,
            generator=torch.Generator().manual_seed(self.config.training.init_seed),
        )

    def batch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        training = self.config.training
        inputs, targets = self.data.train_batch(
            step, training.batch, self.config.model.length, training.data_seed, self.config.data.unique_tokens or None
        )
        size = training.micro_batch
        return [(inputs[i : i + size], targets[i : i + size]) for i in range(0, training.batch, size)]

    def measured(self) -> list[tuple[Tensor, Tensor]]:
        measure = self.config.measure
        rows = self.data.eval_batches("validation", measure.micro_batch, self.config.model.length, measure.rows)
        return [(inputs, targets) for inputs, targets, _ in rows]

    def evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        """Mean nats per token and bits per byte over the whole documents of a split; float32, whatever training's precision."""
        training = self.config.training
        device = next(model.parameters()).device
        nats, tokens, num_bytes = 0.0, 0.0, 0.0
        with torch.no_grad():
            for (inputs, targets, covered), counts in shared(
                self.data.eval_batches(split, training.eval_batch, self.config.model.length, training.eval_rows or None)
            ):
                loss, count = cross_entropy(model(inputs.to(device)), targets.to(device))
                if counts:
                    nats += float(loss)
                    tokens += int(count)
                    num_bytes += int(covered.sum())
        nats, tokens, num_bytes = summed(nats, tokens, num_bytes)
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / num_bytes, "tokens": int(tokens)}

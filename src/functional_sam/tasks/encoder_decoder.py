"""What tasks with an encoder-decoder of `transformers` have in common."""

from collections.abc import Callable
from typing import Any

import torch

from functional_sam.config import Config
from functional_sam.errors import UserError
from functional_sam.tasks.task import Task


class EncoderDecoder(Task):
    """Inputs are the keywords of the model: input_ids, attention_mask, decoder_input_ids."""

    @classmethod
    def check_model(cls, config: Config) -> None:
        """Raise UserError for settings that no encoder-decoder has here."""
        model = config.model
        if model.checkpoint_blocks or model.head_dtype != "float32":
            raise UserError(f"model.checkpoint_blocks and model.head_dtype are not for {model.kind}")
        if config.runtime.parallel == "fsdp":
            raise UserError(f"runtime.parallel=fsdp: an evaluation calls encoder and decoder apart; train a {model.kind} with ddp")

    def forward(self, model: torch.nn.Module, inputs: Any, readout: Callable[..., Any] | None = None) -> Any:
        return model(**inputs, use_cache=False).logits


def drawn(make: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    """A model whose initial weights are the seed's, whatever was drawn before; nothing that is drawn later changes by it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().train()

"""T5.1.1 of `transformers`, whose head may really be its own: version 5 ties it to the embedding whatever a config says."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from functional_sam.errors import UserError
from functional_sam.models.pretrained import loaded

KIND = "gated-gelu"  # the MLP of T5.1.1


def t5(sizes: dict[str, Any], tied: bool, dropout: float) -> nn.Module:
    """A T5ForConditionalGeneration made from sizes (vocab_size, d_model, d_kv, d_ff, num_layers, num_heads), random as T5's is.

    tied: the embedding E is the head, logits are E h / sqrt(D), as in the first T5. Else the head is its own, normal with
    standard deviation 1/sqrt(D) as in T5X, so that initial logits are of size 1.
    """
    from transformers import T5Config, T5ForConditionalGeneration  # seconds to import, for those who have such a model

    more: dict[str, Any] = {"tie_word_embeddings": tied, "decoder_start_token_id": 0}  # PAD, as T5 begins
    config = T5Config(**sizes, **more, feed_forward_proj=KIND, dropout_rate=dropout)
    model = T5ForConditionalGeneration(config)
    if not tied:
        own = torch.empty_like(model.shared.weight).normal_(0.0, sizes["d_model"] ** -0.5)
        model.lm_head.weight = nn.Parameter(own)
    return model


def pretrained_t5(directory: Path, tied: bool, dropout: float) -> nn.Module:
    """The one in a directory, as `transformers` saves it. Raises UserError for another sort of T5, or where weights are missing."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config.from_pretrained(directory, dropout_rate=dropout, local_files_only=True)
    if config.feed_forward_proj != KIND:
        raise UserError(f"{directory} has feed_forward_proj={config.feed_forward_proj}: a t5 is T5.1.1 here, which has {KIND}")
    model: nn.Module = loaded(T5ForConditionalGeneration, directory, config=config)
    theirs = model.lm_head.weight is model.shared.weight  # type: ignore[union-attr]
    if theirs != tied or config.scale_decoder_outputs != tied:
        raise UserError(
            f"the head of {directory} is {'the embedding' if theirs else 'its own'}: set model.tied={str(theirs).lower()}"
        )
    return model

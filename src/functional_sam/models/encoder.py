"""A pretrained encoder of `transformers`, with a new head."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from functional_sam.errors import UserError
from functional_sam.models.pretrained import loaded

SUPPORTED = ("bert", "camembert", "roberta", "xlm-roberta")  # whose settings and layers have BERT's names
HEAD_STD = 0.02  # of BERT's and RoBERTa's own initialization


class Encoder(nn.Module):
    """input_ids, attention_mask [B, L], and token_type_ids of pairs that have them (none: all 0) -> logits [B, C].

    directory: as `transformers` saves a model, with all of its weights but a pooler's. outputs: C. pooling: "mean", of the last
    hidden states over tokens that are no padding (as all-MiniLM was trained to be read), or "first", the first token's (BERT,
    RoBERTa). dropout: in the encoder (hidden states and attention) and before the head. frozen: embeddings and the first so many
    layers are not trained; None: all is. generator: of the head's weights; its bias is zero.
    """

    def __init__(
        self,
        directory: Path,
        outputs: int,
        pooling: str = "mean",
        dropout: float = 0.1,
        frozen: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel  # seconds to import, for those who have such a model

        config = AutoConfig.from_pretrained(
            directory, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, local_files_only=True
        )
        if config.model_type not in SUPPORTED:
            raise UserError(f"{directory} is a {config.model_type}: an encoder is one of {', '.join(SUPPORTED)}")
        self.encoder: Any = loaded(AutoModel, directory, config=config, add_pooling_layer=False)
        self.pooling, self.dropout = pooling, nn.Dropout(dropout)
        self.head = nn.Linear(config.hidden_size, outputs)
        with torch.no_grad():
            self.head.weight.normal_(0.0, HEAD_STD, generator=generator)
            self.head.bias.zero_()
        if frozen is not None:
            layers = self.encoder.encoder.layer
            if frozen > len(layers):
                raise UserError(f"model.frozen={frozen}, but {directory.name} has {len(layers)} layers")
            for part in (self.encoder.embeddings, *layers[:frozen]):
                part.requires_grad_(False)
        self.train()

    def get_input_embeddings(self) -> nn.Module:
        """Where a token becomes a vector, as `transformers` calls it."""
        found: nn.Module = self.encoder.get_input_embeddings()
        return found

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        h_BLD = self.encoder(**given).last_hidden_state
        if self.pooling == "first":
            pooled_BD = h_BLD[:, 0]
        else:
            mask_BL1 = attention_mask[..., None].to(h_BLD.dtype)
            pooled_BD = (h_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)
        logits: Tensor = self.head(self.dropout(pooled_BD))
        return logits

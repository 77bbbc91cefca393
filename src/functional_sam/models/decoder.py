"""The Nanodo decoder (google-deepmind/nanodo, model.py), and the sizes that the paper publishes.

B batch, L sequence, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from functional_sam.errors import UserError
from functional_sam.models.block import Backbone, Readout


@dataclass(frozen=True)
class Size:
    """Shape of a decoder; the names are the arguments of Decoder."""

    width: int
    depth: int
    mlp: int
    heads: int


# Named by their parameters outside of the embeddings. The paper gives the names; the shapes are inferred from them
# (heads of 64, F = 4D, blocks and final LayerNorm counted), the last one being the least certain.
PUBLISHED = {
    "23.9M": Size(width=576, depth=6, mlp=2304, heads=9),
    "42.5M": Size(width=768, depth=6, mlp=3072, heads=12),
    "117.9M": Size(width=1280, depth=6, mlp=5120, heads=20),
    "1208M": Size(width=2048, depth=24, mlp=8192, heads=32),
}


class Decoder(Backbone):
    """Pre-LN decoder, learned absolute positions, head tied to the unscaled embedding, no bias.

    tokens [B, L] of integers below `vocab` -> logits [B, L, V], float32 (float64 in a float64 model).

    mlp: width of the MLP, None or 0 for 4 * width. length: longest sequence.
    head_dtype: "float32" computes the logits outside autocast, as Nanodo does; "bfloat16" leaves them to autocast and widens
    the result.
    checkpoint_blocks: keep one activation a block and compute the rest again in backward. dropout: of both branches of a block.
    embedding_scale: of the initial embeddings and positions, which the tied head makes that of the logits; Nanodo's is 1.
    generator: seeds the weights. With device="meta" nothing is drawn: `to_empty(device=...)`, then `init_weights(generator)`.
    Compute in bfloat16 is torch.autocast around forward; parameters, residual stream and logits stay float32. One thing differs
    from Nanodo in bfloat16: its final LayerNorm rounds h to bfloat16 before the float32 head, ours does not.
    Raises UserError for heads that do not divide the width, an unknown head_dtype, a sequence longer than `length`.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        depth: int,
        heads: int,
        length: int,
        mlp: int | None = None,
        head_dtype: str = "float32",
        checkpoint_blocks: bool = False,
        dropout: float = 0.0,
        embedding_scale: float = 1.0,
        *,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        with torch.device(device or torch.get_default_device()):
            super().__init__(width, depth, heads, mlp, True, head_dtype, checkpoint_blocks, dropout, dtype)
            self.embedding_scale = embedding_scale
            self.tokens = nn.Parameter(torch.empty(vocab, width, dtype=dtype))
            self.positions = nn.Parameter(torch.empty(length, width, dtype=dtype))
        if not self.positions.is_meta:
            self.init_weights(generator)

    def init_weights(self, generator: Generator | None = None) -> None:
        """Embeddings and positions normal with standard deviation embedding_scale/sqrt(D), then the blocks."""
        for weight in (self.tokens, self.positions):
            nn.init.normal_(weight, std=self.embedding_scale * weight.shape[1] ** -0.5, generator=generator)
        super().init_weights(generator)

    def forward(self, tokens_BL: Tensor, readout: Readout | None = None) -> Any:
        length, longest = tokens_BL.shape[1], self.positions.shape[0]
        if length > longest:
            raise UserError(f"a sequence of {length} tokens does not fit length={longest}: cut it, or build the model longer")
        h_BLD = self.norm(self.run_blocks(F.embedding(tokens_BL, self.tokens) + self.positions[:length]))
        return self.read_out(h_BLD, self.tokens, readout)

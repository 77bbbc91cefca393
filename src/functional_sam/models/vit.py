"""Vision transformer built from the block of the decoder, so that language and vision differ in task and not in architecture.

B batch, C colours, S side of the image, N patches, P values in a patch, D width, V classes.
"""

from typing import Any

import torch
from torch import Generator, Tensor, nn

from functional_sam.errors import UserError
from functional_sam.models.block import Backbone, Linear, Readout


class ViT(Backbone):
    """Linear patches without bias, learned positions, non-causal blocks, mean over patches, final LayerNorm, untied head.

    images [B, C, S, S] -> logits [B, V], float32 (float64 in a float64 model).

    image: S in pixels. patch: side of a patch in pixels. activation: gelu or relu. mlp, head_dtype, checkpoint_blocks, dropout,
    generator, device: see Decoder.
    Raises UserError for heads that do not divide the width, a patch that does not divide the image, an unknown activation, an image
    of another shape.
    """

    def __init__(
        self,
        image: int,
        patch: int,
        classes: int,
        width: int,
        depth: int,
        heads: int,
        mlp: int | None = None,
        channels: int = 3,
        head_dtype: str = "float32",
        checkpoint_blocks: bool = False,
        dropout: float = 0.0,
        activation: str = "gelu",
        *,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if image % patch:
            raise UserError(f"patch={patch} does not divide image={image}: choose patch so that image / patch is whole")
        with torch.device(device or torch.get_default_device()):
            super().__init__(width, depth, heads, mlp, False, head_dtype, checkpoint_blocks, dropout, dtype, activation)
            self.shape, self.patch = (channels, image, image), patch
            self.patches = Linear(channels * patch**2, width, dtype=dtype)
            self.positions = nn.Parameter(torch.empty((image // patch) ** 2, width, dtype=dtype))
            self.head = Linear(width, classes, dtype=dtype)
        if not self.positions.is_meta:
            self.init_weights(generator)

    def init_weights(self, generator: Generator | None = None) -> None:
        """Xavier uniform for patches and head, positions normal with standard deviation 1/sqrt(D), then the blocks."""
        nn.init.xavier_uniform_(self.patches.weight, generator=generator)
        nn.init.normal_(self.positions, std=self.positions.shape[1] ** -0.5, generator=generator)
        nn.init.xavier_uniform_(self.head.weight, generator=generator)
        super().init_weights(generator)

    def forward(self, images_BCSS: Tensor, readout: Readout | None = None) -> Any:
        if images_BCSS.shape[1:] != self.shape:
            raise UserError(f"images of shape {tuple(images_BCSS.shape[1:])} given to a ViT of {self.shape}")
        C, S, _ = self.shape
        side, p = S // self.patch, self.patch
        grid = images_BCSS.to(self.positions.dtype).view(-1, C, side, p, side, p)
        x_BNP = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, C * p * p)
        h_BD = self.norm(self.run_blocks(self.patches(x_BNP) + self.positions).mean(1))
        return self.read_out(h_BD, self.head.weight, readout)

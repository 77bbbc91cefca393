"""Residual convolutional network: a small one for small images, and ResNet-50 by its settings.

B batch, C colours, S side of the image, D width (doubled from stage to stage), V classes.
"""

from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from functional_sam.errors import UserError
from functional_sam.models.block import ACTIVATIONS, Linear, Readout, at_least_float32, check_head_dtype, read_out

STEMS = (1, 2, 4)
CHANNELS_OF_A_GROUP = 8


class GroupNorm(nn.GroupNorm):
    """Equal groups of CHANNELS_OF_A_GROUP channels, or of the fewest above it that divide them: 10 of 20, all of 12."""

    def __init__(self, channels: int, dtype: torch.dtype | None = None) -> None:
        groups = next(n for n in range(max(1, channels // CHANNELS_OF_A_GROUP), 0, -1) if channels % n == 0)
        super().__init__(groups, channels, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Scale and shift stay outside, as in LayerNorm: second derivatives of the fused form were wrong there.
        normal = F.group_norm(at_least_float32(x), self.num_groups, eps=self.eps)
        scaled: Tensor = normal * self.weight[:, None, None] + self.bias[:, None, None]
        return scaled.to(self.weight.dtype)


def norm_of(kind: str, channels: int, dtype: torch.dtype | None) -> nn.Module:
    """A normalization by its name."""
    return nn.BatchNorm2d(channels, dtype=dtype) if kind == "batch" else GroupNorm(channels, dtype)


class Conv(nn.Conv2d):
    """nn.Conv2d without bias, padded so that stride 1 keeps the size; its owner's init_weights draws it."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1, dtype: torch.dtype | None = None) -> None:
        super().__init__(inputs, outputs, side, stride, side // 2, bias=False, dtype=dtype)

    def reset_parameters(self) -> None:
        pass


class Residual(nn.Module):
    """activation(x + branch(x)); the branch is two 3x3 convolutions, or, bottleneck, 1x1, 3x3 and 1x1 to four times the width.

    Each convolution is normalized, the first two are followed by the activation; the stride is that of the first 3x3. Where size or
    channels change, x is taken through a 1x1 convolution of its own.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool, activation: str, norm: str, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        outputs = 4 * width if bottleneck else width
        sides = (1, 3, 1) if bottleneck else (3, 3)
        channels = (inputs, *([width] * (len(sides) - 1)), outputs)
        first = sides.index(3)
        self.convolutions = nn.ModuleList(
            Conv(channels[i], channels[i + 1], side, stride if i == first else 1, dtype) for i, side in enumerate(sides)
        )
        self.norms = nn.ModuleList(norm_of(norm, count, dtype) for count in channels[1:])
        changes = stride > 1 or inputs != outputs
        self.shortcut = Conv(inputs, outputs, 1, stride, dtype) if changes else None
        self.norm_shortcut = norm_of(norm, outputs, dtype) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            branch = norm(convolution(self.activation(branch) if i else branch))
        if self.shortcut is not None and self.norm_shortcut is not None:
            x = self.norm_shortcut(self.shortcut(x))
        return self.activation(x + branch)


class ConvNet(nn.Module):
    """Stem, stages of residual blocks, mean over the image, untied head without bias.

    images [B, C, S, S] -> logits [B, V], float32 (float64 in a float64 model).

    stem: pixels from one of its outputs to the next: a 3x3 convolution of stride 1 or 2, or for 4 ResNet's, 7x7 of stride 2 and a
    maximum over 3x3 of stride 2. stages: blocks of each; the first block of a later stage halves the image and doubles the width.
    norm: group, or batch (whose statistics in training are those of a forward, in each process its own).
    Raises UserError for another stem, activation or norm, an image of another shape.
    """

    has_readout = True

    def __init__(
        self,
        image: int,
        stem: int,
        classes: int,
        width: int,
        stages: list[int],
        bottleneck: bool = False,
        activation: str = "gelu",
        norm: str = "group",
        channels: int = 3,
        head_dtype: str = "float32",
        *,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if stem not in STEMS:
            raise UserError(f"patch={stem}: the stem of a convnet has {', '.join(map(str, STEMS))} pixels to an output")
        if activation not in ACTIVATIONS:
            raise UserError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if norm not in ("group", "batch"):
            raise UserError(f"norm={norm!r}: choose group or batch")
        check_head_dtype(head_dtype)
        super().__init__()
        self.shape, self.stem_stride, self.head_dtype = (channels, image, image), stem, head_dtype
        self.activation = ACTIVATIONS[activation]
        with torch.device(device or torch.get_default_device()):
            self.stem = Conv(channels, width, 7 if stem == 4 else 3, min(stem, 2), dtype)
            self.norm_stem = norm_of(norm, width, dtype)
            blocks, inputs = [], width
            for stage, count in enumerate(stages):
                own = width * 2**stage
                for i in range(count):
                    blocks.append(Residual(inputs, own, 2 if stage and not i else 1, bottleneck, activation, norm, dtype))
                    inputs = 4 * own if bottleneck else own
            self.blocks = nn.ModuleList(blocks)
            self.head = Linear(inputs, classes, dtype=dtype)
        if not self.head.weight.is_meta:
            self.init_weights(generator)

    def init_weights(self, generator: Generator | None = None) -> None:
        """He normal with the fan of the inputs for convolutions, Xavier uniform for the head."""
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
                module.reset_parameters()
        nn.init.xavier_uniform_(self.head.weight, generator=generator)

    def num_parameters(self, non_embedding: bool = False) -> int:
        """Number of parameters: all, or those of the blocks (no stem, no head)."""
        return sum(p.numel() for p in (self.blocks if non_embedding else self).parameters())

    def forward(self, images_BCSS: Tensor, readout: Readout | None = None) -> Any:
        if images_BCSS.shape[1:] != self.shape:
            raise UserError(f"images of shape {tuple(images_BCSS.shape[1:])} given to a convnet of {self.shape}")
        x = self.activation(self.norm_stem(self.stem(images_BCSS.to(self.head.weight.dtype))))
        if self.stem_stride == 4:
            x = F.max_pool2d(x, 3, 2, 1)
        for block in self.blocks:
            x = cast(Residual, block)(x)
        return read_out(at_least_float32(x).mean((2, 3)), self.head.weight, readout, self.head_dtype)

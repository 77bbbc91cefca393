"""The sizes of a model, without building it.

L tokens of a row (patches of an image), D width, N blocks, F width of the MLP, H heads, V outputs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of Blocks."""

    D: int
    N: int
    F: int
    H: int
    L: int
    V: int
    inputs: int  # numbers of a patch, 0 for tokens
    targets: int  # of a row

    @property
    def block(self) -> int:
        """Parameters of a block."""
        return 4 * self.D**2 + 2 * self.D * self.F + 2 * self.D

    @property
    def root(self) -> int:
        """Parameters outside of the blocks: embeddings, head, final LayerNorm."""
        embedding = self.inputs * self.D + self.V * self.D if self.inputs else self.V * self.D
        return embedding + self.L * self.D + self.D

    @property
    def parameters(self) -> int:
        return self.N * self.block + self.root

    @property
    def non_embedding(self) -> int:
        return self.N * self.block + self.D


@dataclass(frozen=True)
class PairShape:
    """The sizes of an encoder-decoder, N blocks each, post-LN, with biases and fixed positions; L pieces of source and target."""

    D: int
    N: int
    F: int
    H: int
    L: int
    V: int

    @property
    def attention(self) -> int:
        """Parameters of one attention: four products with their biases, and the LayerNorm after it."""
        return 4 * (self.D**2 + self.D) + 2 * self.D

    @property
    def mlp(self) -> int:
        """Parameters of an MLP with its biases and LayerNorm."""
        return 2 * self.D * self.F + self.F + self.D + 2 * self.D

    @property
    def non_embedding(self) -> int:
        """Trained parameters but for the embedding; a block of the decoder has two attentions."""
        return self.N * (3 * self.attention + 2 * self.mlp)

    @property
    def parameters(self) -> int:
        return self.non_embedding + self.V * self.D

    @property
    def targets(self) -> int:
        """Of a row."""
        return self.L


@dataclass(frozen=True)
class TextShape(PairShape):
    """The sizes of a T5.1.1: pre-LN without biases, heads of `head` numbers, a gated MLP; L pieces are read and T written."""

    head: int = 64
    T: int = 1
    tied: bool = False

    @property
    def attention(self) -> int:
        return 4 * self.D * self.H * self.head + self.D

    @property
    def mlp(self) -> int:
        return 3 * self.D * self.F + self.D

    @property
    def non_embedding(self) -> int:
        """With the last norms and the biases by distance (32 for each head), of encoder and decoder."""
        return super().non_embedding + 2 * (self.D + 32 * self.H)

    @property
    def parameters(self) -> int:
        return self.non_embedding + self.V * self.D * (1 if self.tied else 2)

    @property
    def targets(self) -> int:
        return self.T


@dataclass(frozen=True)
class EncoderShape(Shape):
    """The sizes of a BERT: biases everywhere, two LayerNorms with biases a block. V are the outputs of its new head."""

    vocabulary: int = 0
    positions: int = 0

    @property
    def block(self) -> int:
        return 4 * self.D**2 + 2 * self.D * self.F + self.F + 9 * self.D

    @property
    def root(self) -> int:
        """Embeddings of tokens, places and two segments with their LayerNorm, and the head."""
        return (self.vocabulary + self.positions + 4) * self.D + self.V * (self.D + 1)

    @property
    def non_embedding(self) -> int:
        return self.N * self.block


@dataclass(frozen=True)
class Convolution:
    """One convolution without bias: channels in and out, side of its kernel and of its output."""

    inputs: int
    outputs: int
    kernel: int
    side: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.kernel**2

    @property
    def parameters(self) -> int:
        return self.weights + 2 * self.outputs

    @property
    def flops(self) -> int:
        """Of a forward of one image."""
        return 2 * self.weights * self.side**2

    @property
    def values(self) -> int:
        """Numbers in its output."""
        return self.outputs * self.side**2


@dataclass(frozen=True)
class ConvShape:
    """The sizes of a ConvNet: D width of the first stage, blocks of each stage, S side of the image."""

    D: int
    stages: tuple[int, ...]
    bottleneck: bool
    stem: int  # pixels from one output of it to the next
    channels: int
    S: int
    V: int
    targets: int = 1  # of a row

    @property
    def first(self) -> Convolution:
        """The stem."""
        return Convolution(self.channels, self.D, 7 if self.stem == 4 else 3, math.ceil(self.S / min(self.stem, 2)))

    def blocks(self) -> Iterator[list[Convolution]]:
        """The convolutions of each block."""
        inputs, side = self.D, math.ceil(self.first.side / 2) if self.stem == 4 else self.first.side
        for stage, count in enumerate(self.stages):
            width = self.D * 2**stage
            outputs = 4 * width if self.bottleneck else width
            for i in range(count):
                stride = 2 if stage and not i else 1
                after = math.ceil(side / stride)
                if self.bottleneck:
                    found = [Convolution(inputs, width, 1, side), Convolution(width, width, 3, after)]
                    found.append(Convolution(width, outputs, 1, after))
                else:
                    found = [Convolution(inputs, width, 3, after), Convolution(width, width, 3, after)]
                if stride > 1 or inputs != outputs:
                    found.append(Convolution(inputs, outputs, 1, after))
                yield found
                inputs, side = outputs, after

    @property
    def last(self) -> int:
        """Channels that the head reads."""
        return int(self.D * 2 ** (len(self.stages) - 1) * (4 if self.bottleneck else 1))

    @property
    def L(self) -> int:
        """Places of the stem's output."""
        return self.first.side**2

    @property
    def non_embedding(self) -> int:
        return sum(one.parameters for block in self.blocks() for one in block)

    @property
    def parameters(self) -> int:
        return self.non_embedding + self.first.parameters + self.V * self.last

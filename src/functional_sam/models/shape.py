"""The sizes of a model of Blocks, without building it.

L tokens of a row (patches of an image), D width, N blocks, F width of the MLP, H heads, V outputs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

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

"""Lists of tensors as vectors. A sharded list (DTensors of FSDP2) counts whole, though each rank holds its part."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from functional_sam.errors import UserError


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Summed in float64, for parts differ in size by orders of magnitude."""
    parts = []
    for x, y in zip(a, b, strict=True):
        part: Any = (x * y).sum(dtype=torch.float64)
        parts.append(part.full_tensor() if hasattr(part, "full_tensor") else part)
    return float(torch.stack(parts).sum())


def norm(a: Sequence[Tensor]) -> float:
    return math.sqrt(dot(a, a))


def ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def unit(d: Sequence[Tensor], what: str = "the ascent direction") -> list[Tensor]:
    """d / |d|. Raises UserError for a d of zero, FloatingPointError for one that is not finite."""
    size = length(d, what)
    return [tensor / size for tensor in d]


def length(d: Sequence[Tensor], what: str) -> float:
    """|d|. Raises as unit does."""
    size = norm(d)
    if not math.isfinite(size):
        raise FloatingPointError(f"{what} has norm {size}: the weights or the loss are no longer finite")
    if size == 0:
        raise UserError(f"{what} is zero: there is no unit vector along it")
    return size


class Space:
    """Flat vectors for lists of tensors shaped like `like`: one row of numbers on each rank, inner products over all ranks.

    size: numbers in a vector, on all ranks. local_size: of them on this rank.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.like = [tensor.detach() for tensor in like]
        local = [_local(tensor) for tensor in self.like]
        self.shapes, self.sizes = [t.shape for t in local], [t.numel() for t in local]
        self.dtype, self.device = local[0].dtype, local[0].device
        self.size, self.local_size = sum(t.numel() for t in self.like), sum(self.sizes)
        self.row_bytes = self.local_size * local[0].element_size()
        self.meshes = [m for m in dict.fromkeys(getattr(t, "device_mesh", None) for t in self.like) if m is not None]
        if len(self.meshes) > 1 or (self.meshes and not all(hasattr(t, "device_mesh") for t in self.like)):
            raise UserError("parameters on several device meshes: shard the whole model over one")

    def flat(self, tensors: Sequence[Tensor], into: Tensor | None = None) -> Tensor:
        into = torch.empty(self.local_size, dtype=self.dtype, device=self.device) if into is None else into
        for part, tensor in zip(torch.split(into, self.sizes), tensors, strict=True):
            part.copy_(_local(tensor.detach()).reshape(-1))
        return into

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """Views of the row, shaped and sharded as the list is."""
        parts = [part.view(shape) for part, shape in zip(torch.split(flat, self.sizes), self.shapes, strict=True)]
        if not self.meshes:
            return parts
        from torch.distributed.tensor import DTensor

        return [
            DTensor.from_local(part, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())  # type: ignore[attr-defined]
            for part, t in zip(parts, self.like, strict=True)
        ]

    def summed(self, partial: Tensor) -> Tensor:
        """The sum of every rank's inner products."""
        for mesh in self.meshes:
            for i, placement in enumerate(self.like[0].placements):  # type: ignore[attr-defined]
                if placement.is_shard():
                    dist.all_reduce(partial, group=mesh.get_group(i))
        return partial

    def norm(self, flat: Tensor) -> float:
        size = torch.linalg.vector_norm(flat, dtype=torch.float64)
        return math.sqrt(float(self.summed(size * size)))

    def gaussian(self, generator: Generator | None) -> Tensor:
        """Independent standard normal numbers, the same whatever the number of ranks."""
        where = self.device if generator is None else generator.device
        return self._drawn(lambda shape: torch.randn(shape, dtype=self.dtype, device=where, generator=generator))

    def signs(self, generator: Generator | None) -> Tensor:
        """Independent numbers of which each is 1 or -1."""
        where = self.device if generator is None else generator.device
        return self._drawn(lambda shape: torch.randint(2, shape, device=where, generator=generator).to(self.dtype) * 2 - 1)

    def _drawn(self, draw: Any) -> Tensor:
        drawn = []
        for t in self.like:
            whole = draw(tuple(t.shape)).to(self.device)
            if self.meshes:
                from torch.distributed.tensor import distribute_tensor

                whole = distribute_tensor(whole, t.device_mesh, t.placements, src_data_rank=None)  # type: ignore[attr-defined]
            drawn.append(whole)
        return self.flat(drawn)


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local

"""Lists of tensors as vectors. A sharded list (DTensors of FSDP2) counts whole, though each rank holds its part."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from functional_sam.errors import UserError

NARROW = (torch.bfloat16, torch.float16)


def dot(a: Sequence[Tensor], b: Sequence[Tensor], *, fast: bool = False) -> float:
    """Inner product of two lists of tensors taken as vectors, summed in float64, for parts differ in size by orders of magnitude.

    fast: each tensor's part in its own precision, float32 at least, as a training step takes it. Over 4e7 positive numbers of
    float32 that is off by 1e-3, where float64 is by 1e-11. Complex tensors count as their pairs (re, im).
    """
    parts = []
    for x, y in zip(a, b, strict=True):
        if x.is_complex():
            x, y = _pairs(x), _pairs(y)
        if fast and x.dtype in NARROW:
            x, y = x.float(), y.float()
        part: Any
        if not fast:
            part = (x * y).sum(dtype=torch.float64)
        else:
            part = (x * y).sum() if hasattr(x, "full_tensor") else torch.dot(x.reshape(-1), y.reshape(-1))
        parts.append(whole(part).double())
    return float(torch.stack(parts).sum()) if parts else 0.0


def norm(tensors: Sequence[Tensor], *, fast: bool = False) -> float:
    """Euclidean norm of a list of tensors taken as one vector; `fast` as for dot (off by 3e-3 at 4e7 numbers)."""
    if not fast:
        return math.sqrt(dot(tensors, tensors))
    parts: list[Any] = []
    wide = [x for x in tensors if x.dtype not in NARROW]
    narrow = [x for x in tensors if x.dtype in NARROW]
    if wide:
        parts.append(torch.nn.utils.get_total_norm(wide))
    if narrow:
        parts.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(narrow, 2, dtype=torch.float32))))
    return math.hypot(*(float(whole(part)) for part in parts))


def by_place(x: Tensor) -> Tensor:
    """A sum in which no two entries have one weight, float64: it changes where values trade places, and a norm does not."""
    table = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1) if x.numel() else x.new_zeros(1, 1)
    rows, columns = (torch.arange(1.0, n + 1, device=x.device) for n in table.shape)
    return (table @ columns.sin().to(table.dtype)).double() @ rows.cos().double()


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


def whole(number: Any) -> Any:
    """The number itself, of a sharded one."""
    return number.full_tensor() if hasattr(number, "full_tensor") else number


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or this process's part of a sharded one, in the same memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def ratio(numerator: float, denominator: float) -> float:
    """Their quotient, nan for a denominator of zero."""
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
    """Flat vectors for lists of tensors shaped like `template`: one row of numbers on each rank, inner products over all ranks.

    size: numbers in a vector, on all ranks. local_size: of them on this rank.
    """

    def __init__(self, template: Sequence[Tensor]) -> None:
        self.template = [tensor.detach() for tensor in template]
        parts = [local(tensor) for tensor in self.template]
        self.shapes, self.sizes = [t.shape for t in parts], [t.numel() for t in parts]
        self.dtype, self.device = parts[0].dtype, parts[0].device
        self.size, self.local_size = sum(t.numel() for t in self.template), sum(self.sizes)
        self.row_bytes = self.local_size * parts[0].element_size()
        self.meshes = [m for m in dict.fromkeys(getattr(t, "device_mesh", None) for t in self.template) if m is not None]
        if len(self.meshes) > 1 or (self.meshes and not all(hasattr(t, "device_mesh") for t in self.template)):
            raise UserError("parameters on several device meshes: shard the whole model over one")

    def flat(self, tensors: Sequence[Tensor], into: Tensor | None = None) -> Tensor:
        into = torch.empty(self.local_size, dtype=self.dtype, device=self.device) if into is None else into
        for part, tensor in zip(torch.split(into, self.sizes), tensors, strict=True):
            part.copy_(local(tensor.detach()).reshape(-1))
        return into

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """Views of the row, shaped and sharded as the list is."""
        parts = [part.view(shape) for part, shape in zip(torch.split(flat, self.sizes), self.shapes, strict=True)]
        if not self.meshes:
            return parts
        from torch.distributed.tensor import DTensor

        return [
            DTensor.from_local(part, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())  # type: ignore[attr-defined]
            for part, t in zip(parts, self.template, strict=True)
        ]

    def summed(self, partial: Tensor) -> Tensor:
        """The sum of every rank's inner products."""
        for mesh in self.meshes:
            for i, placement in enumerate(self.template[0].placements):  # type: ignore[attr-defined]
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
        return self.flat([_placed(draw(tuple(t.shape)), t) for t in self.template])


def gaussian_like(tensor: Tensor, generator: Generator | None) -> Tensor:
    """Independent standard normal numbers, shaped and sharded as the tensor is: the same whatever the number of ranks."""
    where = tensor.device if generator is None else generator.device
    return _placed(torch.randn(tuple(tensor.shape), dtype=tensor.dtype, device=where, generator=generator), tensor)


def _placed(whole: Tensor, like: Any) -> Tensor:
    """The whole tensor, which every rank has, where `like` lives: of a sharded one this rank's part."""
    whole = whole.to(like.device)
    if not hasattr(like, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

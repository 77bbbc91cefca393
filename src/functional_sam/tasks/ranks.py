"""An evaluation over all processes of a training: each takes its batches, the sums are of all."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from functional_sam.tasks.batches import placed

Batch = TypeVar("Batch")


def totals(model: torch.nn.Module, batches: Iterable[Sequence[Any]], sums: Callable[..., Sequence[float]]) -> list[float]:
    """What sums(*batch) returns, added up over the batches of all processes; without gradients, each batch where the model is."""
    parameter = next(model.parameters())
    total: list[float] = []
    with torch.no_grad():
        for batch, counts in shared(batches):
            found = sums(*placed(batch, parameter.device, parameter.dtype))
            total = total or [0.0] * len(found)
            if counts:
                total = [a + b for a, b in zip(total, found, strict=True)]
    return summed(*total)


def listed(model: torch.nn.Module, batches: Iterable[Sequence[Any]], columns: Callable[..., Sequence[Tensor]]) -> list[Any]:
    """What columns(*batch) returns, [B] each, a tuple a row, over the batches of all processes; else as `totals`."""
    parameter, found = next(model.parameters()), []
    with torch.no_grad():
        for batch, counts in shared(batches):
            made = columns(*placed(batch, parameter.device, parameter.dtype))
            found += list(zip(*(column.tolist() for column in made), strict=True)) if counts else []
    return gathered(found)


def shared(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """(batch, whether it counts): every W-th batch of a process among W, all of them where there is one process.

    Every process gets as many, for a sharded model's forward needs all processes: past the end some get one that does not count.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    remaining = iter(batches)
    while turn := list(islice(remaining, world)):
        yield turn[min(rank, len(turn) - 1)], rank < len(turn)


def own(rows: int) -> slice:
    """Which rows of a step are this process's, all of them where there is one process."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    each = rows // world
    return slice(rank * each, (rank + 1) * each)


def summed(*numbers: float) -> list[float]:
    """Each number summed over the processes."""
    if not dist.is_initialized():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(number) for number in total]


def gathered(values: list[Any]) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return values
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, values)
    return [value for part in found for value in part]

"""An evaluation over all processes of a training: each takes its batches, the sums are of all."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist

Batch = TypeVar("Batch")


def shared(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """(batch, whether it counts): every W-th batch of a process among W, all of them where there is one process.

    Every process gets as many, for a sharded model's forward needs all processes: past the end some get one that does not count.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    remaining = iter(batches)
    while turn := list(islice(remaining, world)):
        yield turn[min(rank, len(turn) - 1)], rank < len(turn)


def summed(*numbers: float) -> list[float]:
    """Each number summed over the processes."""
    if not dist.is_initialized():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(number) for number in total]

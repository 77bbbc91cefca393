"""Batches that are the same at every pass."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from functional_sam.curvature.buffers import parts, tensors_of, version
from functional_sam.errors import UserError

Batch = tuple[Any, Any]


class Batches:
    """A list of batches, or anything that gives the same batches each time it is iterated over.

    A list is trusted, and may be changed: `written` tells. Anything else is read once here and compared with that at every pass, by
    two weighted sums of each tensor.
    Raises UserError for no batch, for an iterator, which ends after one pass, and, at a later pass, for batches that differ.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
            raise UserError(f"batches is a {type(batches).__name__}, good for one pass at most: give list(batches)")
        self.source = batches
        self.prints: list[Any] | None = None
        if not isinstance(batches, list | tuple):
            self.prints = [_fingerprint(batch) for batch in batches]
        if not len(self):
            raise UserError("curvature over no batch: give a list with at least one (inputs, targets)")

    def __len__(self) -> int:
        return len(self.source) if isinstance(self.source, list | tuple) else len(self.prints or [])

    def written(self) -> tuple[list[Any], list[Any]]:
        """Return which tensors a list of batches holds and how often each was written to, and the tensors, held so that no other
        one gets their id."""
        if self.prints is not None:
            return [], []
        tensors = list(tensors_of(self.source))
        return [(id(tensor), version(tensor)) for tensor in tensors], tensors

    def __iter__(self) -> Iterator[Batch]:
        if self.prints is None:
            yield from self.source
            return
        seen = 0
        for i, batch in enumerate(self.source):
            if i >= len(self.prints) or _fingerprint(batch) != self.prints[i]:
                self._refuse()
            yield batch
            seen = i + 1
        if seen < len(self.prints):
            self._refuse()

    def _refuse(self) -> None:
        raise UserError(
            "the batches differ from one pass to the next, so that each product would be one of another loss: "
            "give a list, or a loader with shuffle=False and no random augmentation"
        )


def _fingerprint(item: Any) -> Any:
    """Shape, dtype, sum and sum with unequal weights of a tensor; inside tuples, lists and dictionaries too."""
    if isinstance(item, Tensor):
        if item.layout != torch.strided or item.is_nested:
            return [_fingerprint(part) for part in parts(item)]
        x = item.detach().flatten().double()
        weights = torch.arange(len(x), dtype=torch.float64, device=x.device).mul_(0.7).sin_()
        return tuple(item.shape), str(item.dtype), float(x.sum()), float(x @ weights)
    if isinstance(item, dict):
        return [(key, _fingerprint(value)) for key, value in item.items()]
    if isinstance(item, list | tuple):
        return [_fingerprint(value) for value in item]
    return item if isinstance(item, int | float | str | bool) else type(item).__name__

"""A micro-batch is (inputs, targets): trees of tensors (dicts, tuples, ...), an example a row along dimension 0 of each leaf."""

import itertools
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Batch = tuple[Any, Tensor]
Batches = list[Batch]
Tree = TypeVar("Tree")


def rows(batch: Any) -> int:
    """Number of examples."""
    return len(tree_leaves(batch)[0])


def split(batch: Tree, size: int) -> list[Tree]:
    """In parts of at most `size` rows."""
    return [cut(batch, i, i + size) for i in range(0, rows(batch), size)]


def cut(batch: Tree, start: int, end: int) -> Tree:
    """The rows from `start` to before `end`, as views."""
    part: Tree = tree_map(lambda leaf: leaf[start:end], batch)
    return part


def joined(batches: list[Tree]) -> Tree:
    """All rows in one."""
    whole: Tree = tree_map(lambda *leaves: torch.cat(leaves), *batches)
    return whole


def runs(batches: list[Tree]) -> list[Tree]:
    """Those that follow each other joined, where their rows have the same shapes: texts of two steps are padded to two lengths."""
    alike = itertools.groupby(batches, key=lambda batch: [leaf.shape[1:] for leaf in tree_leaves(batch)])
    return [joined(list(group)) for _, group in alike]


def placed(batch: Tree, device: torch.device, dtype: torch.dtype) -> Tree:
    """On the device, real numbers in the parameters' dtype."""
    moved: Tree = tree_map(lambda leaf: leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device), batch)
    return moved

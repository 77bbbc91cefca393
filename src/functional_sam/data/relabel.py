"""The same images with more classes: what was done to an image becomes part of its label.

Every image is turned, moved, mirrored and inverted in one of 64 ways, which its split and place in it choose once and for all. The
images are the same for any number of classes; the labels tell more or fewer of the ways apart, so that the number of outputs
changes and nothing else does.

Letters: B images, C channels, S side. A way is a number w of 0 to 63: w % 4 quarter turns, then one of 4 moves, then mirrored or
not, then inverted or not.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from functional_sam.data.order import seed_of

WAYS = 64
TOLD_APART = (1, 4, 16, 64)  # ways by which a class is divided: none, by turn, by turn and move, by all
MOVE = 4  # pixels, towards each corner


def relabelled(
    images: Tensor, labels: Tensor, split: str, chosen: np.ndarray, told_apart: int, black: Tensor
) -> tuple[Tensor, Tensor]:
    """Images [B, C, S, S] and labels [B] changed by the ways of the examples `chosen` of a split.

    The label is told_apart * label + way % told_apart. black [C]: the value of a black pixel, which moves in; then inversion puts
    the brightest value of an image where its darkest was.
    """
    ways = torch.from_numpy(ways_of(split, int(chosen.max()) + 1)[chosen])
    return changed(images, ways, black), labels * told_apart + ways % told_apart


def changed(images: Tensor, ways: Tensor, black: Tensor) -> Tensor:
    """Each image [C, S, S] in its way."""
    result = torch.empty_like(images)
    for way in sorted(set(ways.tolist())):
        own = ways == way
        turns, move, mirrored, inverted = way % 4, way // 4 % 4, way // 16 % 2, way // 32
        x = torch.rot90(images[own], turns, dims=(2, 3))
        down, across = (MOVE if move & bit else -MOVE for bit in (1, 2))
        x = torch.roll(x, (down, across), dims=(2, 3))
        for dim, by in ((2, down), (3, across)):
            x.narrow(dim, 0 if by > 0 else x.shape[dim] - MOVE, MOVE).copy_(black.view(1, -1, 1, 1).expand_as(x[:1, :, :1, :1]))
        if mirrored:
            x = x.flip(3)
        if inverted:
            x = x.amax((1, 2, 3), keepdim=True) + x.amin((1, 2, 3), keepdim=True) - x
        result[own] = x
    return result


def ways_of(split: str, least: int) -> np.ndarray:
    """The ways of at least so many first examples of a split, int64; those of an example do not depend on how many."""
    return _ways(split, -(-least // 4096) * 4096)


@functools.lru_cache(maxsize=8)
def _ways(split: str, number: int) -> np.ndarray:
    # RandomState draws one after the other, so that a longer row begins with the shorter one.
    return np.random.RandomState(seed_of("relabel", *split.encode()) % 2**32).randint(WAYS, size=number)

"""What is random in a step, computed from seeds and the step alone: resuming needs no state."""

import functools
import hashlib

import numpy as np


def indices(step: int, batch: int, count: int, seed: int) -> np.ndarray:
    """Which of `count` examples batch number `step` (from 0) holds, int64 [batch]; it may run over into the next epoch."""
    positions = step * batch + np.arange(batch, dtype=np.int64)
    epochs = positions // count
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = permutation(count, seed, int(epoch))[positions[here] % count]
    return chosen


@functools.lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int = 0) -> np.ndarray:
    """A permutation of range(count) from (seed, epoch). Read-only, because it is shared.

    RandomState and not default_rng: numpy froze the stream of the former for good (NEP 19).
    """
    order = np.random.RandomState([seed, epoch]).permutation(count)
    order.flags.writeable = False
    return order


def seed_of(purpose: str, *numbers: int) -> int:
    """A seed of 63 bits for torch's generators: what differs in purpose or any number draws other numbers."""
    return int.from_bytes(hashlib.sha256(repr((purpose, *numbers)).encode()).digest()[:8], "big") >> 1

"""The global random generators that a forward may draw from: saved before one, set again before it is repeated."""

import random
import sys
from typing import Any

import torch

Randomness = tuple[Any, ...]


def random_state(device: torch.device) -> Randomness:
    """Of torch on the CPU and on `device`, of Python's random, and of numpy.random where it has been imported."""
    numpy = sys.modules.get("numpy")
    return (
        torch.get_rng_state(),
        None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device),
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
    )


def set_random_state(state: Randomness, device: torch.device) -> None:
    """The inverse of random_state."""
    cpu, accelerator, python, numbers = state
    torch.set_rng_state(cpu)
    if accelerator is not None:
        torch.get_device_module(device).set_rng_state(accelerator, device)
    random.setstate(python)
    if numbers is not None:
        sys.modules["numpy"].random.set_state(numbers)

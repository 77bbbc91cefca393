"""Checkpoints: atomic, with a checksum, the last two kept; a damaged one is passed over for the one before."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from functional_sam.files import atomic_file, sha256, write_text

KEPT = 2


def save(directory: Path, step: int, state: dict[str, Any]) -> None:
    """Write step-STEP.pt and its SHA-256, then remove all but the last two."""
    path = directory / f"step-{step:08d}.pt"
    with atomic_file(path) as temporary:
        torch.save(state, temporary)
        checksum = sha256(temporary)
    write_text(path.with_suffix(".sha256"), checksum)
    for old in _found(directory)[KEPT:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".sha256").unlink(missing_ok=True)


def load_newest(directory: Path) -> dict[str, Any] | None:
    """State of the newest whole checkpoint, or None; tensors and plain values only, never code (weights_only)."""
    for path in _found(directory):
        try:
            whole = path.with_suffix(".sha256").read_text() == sha256(path)
            if whole:
                state: dict[str, Any] = torch.load(path, weights_only=True)
                return state
        except (OSError, RuntimeError, pickle.UnpicklingError):
            pass
        warnings.warn(f"{path} is damaged (its checksum does not match): using the checkpoint before it", stacklevel=2)
    return None


def _found(directory: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((p for p in directory.glob("step-*.pt") if re.fullmatch(r"step-\d{8}\.pt", p.name)), reverse=True)

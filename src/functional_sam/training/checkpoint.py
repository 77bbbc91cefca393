"""Checkpoints: atomic, with a checksum, the last two kept while it trains; a damaged one is passed over for the one before."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from functional_sam.files import atomic_file, sha256, write_text

KEPT = 2


def save(directory: Path, step: int, state: dict[str, Any]) -> None:
    """Write step-STEP.pt and its SHA-256, then remove all but the last two. Raises UserError when the disk is full."""
    path = _path(directory, step)
    with atomic_file(path) as temporary:
        _write(state, temporary)
        checksum = sha256(temporary)
    write_text(path.with_suffix(".sha256"), checksum)
    keep(directory, KEPT)


def keep(directory: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints."""
    for old in _found(directory)[count:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".sha256").unlink(missing_ok=True)


def load_newest(directory: Path) -> dict[str, Any] | None:
    """State of the newest whole checkpoint, or None; tensors and plain values only, never code (weights_only)."""
    found = _found(directory)
    for path in found:
        try:
            whole = path.with_suffix(".sha256").read_text() == sha256(path)
            if whole:
                return _read(path)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
            pass
        before = "using the checkpoint before it" if path != found[-1] else "no other is left, so the run starts again from step 0"
        warnings.warn(f"{path} is damaged (its checksum does not match): {before}", stacklevel=2)
    return None


def _write(state: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's writer hides what the file said: a full disk, say
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from error


def load(directory: Path, step: int) -> dict[str, Any]:
    """State of the checkpoint of a step, whose checksum another process has verified."""
    return _read(_path(directory, step))


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.pt"


def _read(path: Path) -> dict[str, Any]:
    # Mapped, so that a process of many reads no more than it takes.
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def _found(directory: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((p for p in directory.glob("step-*.pt") if re.fullmatch(r"step-\d{8}\.pt", p.name)), reverse=True)

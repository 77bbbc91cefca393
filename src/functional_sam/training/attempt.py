"""One attempt at a run that is known by its directory alone: a worker's of this machine, or a job's of a cluster."""

from pathlib import Path

import torch

from functional_sam.config import Config
from functional_sam.data.cache import Progress
from functional_sam.errors import Interrupted, UserError
from functional_sam.files import write_text
from functional_sam.records import Run, RunLocked
from functional_sam.training.loop import train


def require_device(config: Config) -> None:
    """Raise UserError where this machine lacks the device of a run."""
    kind, _, index = config.runtime.device.partition(":")
    if kind == "cuda" and int(index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(
            f"runtime.device={config.runtime.device}: {count} GPUs are visible to PyTorch here; runtime.device=cpu trains without"
        )


def attempt(
    directory: Path, threads: int | None, device: str | None = None, progress: Progress | None = None, leads: bool = True
) -> Run:
    """Do the run. error.txt there says why it failed last: the process that `leads` writes it, and removes it at success.

    A run that diverged is complete. Raises what train raises, Interrupted and RunLocked among it: neither is a failure.
    """
    error = directory / "error.txt"
    try:
        run = Run.at(directory)
        config = run.config
        config.runtime.threads, config.runtime.device = threads, device or config.runtime.device
        require_device(config)
        try:
            train(config, directory.parent, progress)
        except FloatingPointError as diverged:
            print(f"{directory}: {diverged}", flush=True)
        if leads:
            error.unlink(missing_ok=True)
        return run
    except (Interrupted, RunLocked):
        raise
    except Exception as failure:
        if leads:
            write_text(error, f"{type(failure).__name__}: {failure}\n")
        raise

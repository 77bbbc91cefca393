"""What a checkpoint holds, the same for every number of processes: whole tensors on the first process's side.

One file, written by the first process. torch.distributed.checkpoint would write shards in parallel, but reads its metadata by
pickle, and a checkpoint must not be able to run code. Its state_dict functions gather and place as exactly, but fail for an
optimizer that keeps no state (SGD without momentum, torch 2.13) and know no tensors of a method's own.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.sharpness import SharpnessAware
from functional_sam.training import checkpoint
from functional_sam.training.distributed import Ranks
from functional_sam.weights import unwrapped

ANEW = "remove the directory, and the run starts again from step 0"


def save(directory: Path, step: int, ranks: Ranks, sharpness: SharpnessAware, seconds: float, of: str) -> None:
    """Gather tensor by tensor and write; every process takes part. Raises in all what the first one met, a full disk say.

    of: hash of the run's config, without which a checkpoint copied in from a run of the same shape would pass for its own.
    """
    state = {
        "of": of,
        "step": step,
        "model": unwrapped(sharpness.model).state_dict(),
        "optimizer": sharpness.optimizer.state_dict(),
        "sharpness": sharpness.state_dict(),
        "seconds": seconds,
    }
    state = _gathered(state, ranks.leads)
    ranks.lead(lambda: checkpoint.save(directory, step, state))


def restore(directory: Path, ranks: Ranks, sharpness: SharpnessAware, of: str) -> tuple[int, float]:
    """Continue from the newest whole checkpoint: (steps done, seconds spent), (0, 0.0) where there is none.

    The first process verifies checksums and chooses; of a sharded state each process reads its own slices only.
    Raises UserError for a checkpoint of another run, or of another model.
    """
    state: dict[str, Any] | None = None

    def choose() -> int | None:
        nonlocal state
        state = checkpoint.load_newest(directory)
        if state is None:
            return None
        if state.get("of", of) != of:  # those of before 2026-11-30 do not say
            raise UserError(f"{directory}, step {state['step']}: of another run (hash {state['of']}, not {of}); {ANEW}")
        return int(state["step"])

    step = ranks.lead(choose)
    if step is None:
        return 0, 0.0
    if state is None:
        state = checkpoint.load(directory, step)
    model, optimizer = unwrapped(sharpness.model), sharpness.optimizer
    parameters = dict(model.named_parameters())
    try:
        model.load_state_dict({name: _placed(value, parameters.get(name)) for name, value in state["model"].items()})
    except RuntimeError as error:
        raise UserError(
            f"{directory}, step {step}: not of this model, begun by other code perhaps ({' '.join(str(error).split())[:300]}); "
            f"go on with that code, or {ANEW}"
        ) from error
    # An optimizer numbers its parameters through its groups, in order.
    numbered = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    moments = {
        i: {key: _placed(value, numbered.get(i)) for key, value in moment.items()}
        for i, moment in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**state["optimizer"], "state": moments})
    mix = {
        key: {name: _placed(tensor, parameters.get(name)) for name, tensor in value.items()} if isinstance(value, dict) else value
        for key, value in state["sharpness"]["mix"].items()
    }
    sharpness.load_state_dict({**state["sharpness"], "mix": mix})
    return step, float(state["seconds"])


def _gathered(tree: Any, keep: bool) -> Any:
    """The tree with every sharded tensor whole, on the CPU, in the process that keeps it."""
    if isinstance(tree, dict):
        return {key: _gathered(value, keep) for key, value in tree.items()}
    if hasattr(tree, "full_tensor"):
        whole = tree.full_tensor()
        return whole.cpu() if keep else None
    return tree


def _placed(value: Any, like: Any) -> Any:
    """A copy of a checkpoint's tensor, as its parameter `like` is, if any: on its device, in shards if it is."""
    if not isinstance(value, Tensor):  # SGD without momentum keeps a None
        return value
    if like is None or value.shape != like.shape:
        return value.clone()
    if hasattr(like, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        # Every process has the whole value (mapped from the file, not read): no communication, each takes its slice.
        value = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, requires_grad=False).copy_(value)

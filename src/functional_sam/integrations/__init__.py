"""SharpnessAware inside the training stacks that people use, one module each; only that of transformers imports its stack."""

from typing import Any

from functional_sam.errors import UserError
from functional_sam.sharpness import SharpnessAware
from functional_sam.weights import is_sharded


def carried(sharpness: SharpnessAware) -> dict[str, Any]:
    """The state that goes into a checkpoint. Raises UserError for tensors in shards, of which one file holds one rank's."""
    state = sharpness.state_dict()
    if is_sharded(sharpness.model) and any(isinstance(value, dict) and value for value in state["mix"].values()):
        raise UserError(
            f"mix {sharpness.method.mix!r} carries tensors in shards (FSDP2), which this checkpoint does not gather: save "
            "sharpness.state_dict() by torch.distributed.checkpoint, or use DistributedDataParallel"
        )
    return state

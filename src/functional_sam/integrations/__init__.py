"""SharpnessAware inside the training stacks that people use, one module each; only that of transformers imports its stack."""

from typing import Any

from functional_sam.errors import UserError
from functional_sam.sharpness import SharpnessAware
from functional_sam.sharpness.first_step import versions
from functional_sam.weights import is_sharded


class Waiting:
    """Micro-batches until the gradients of their step are due; all of them are read then, so that none may change before."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, Any]] = []
        self.versions: list[dict[str, tuple[int, int]]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def add(self, inputs: Any, targets: Any) -> None:
        self.batches.append((inputs, targets))
        self.versions.append(versions(inputs, targets))

    def due(self) -> list[tuple[Any, Any]]:
        """All of them, and none is left. Raises UserError where one is not as it came."""
        batches, came = self.batches, self.versions
        self.batches, self.versions = [], []
        for i, (batch, before) in enumerate(zip(batches, came, strict=True)):
            after = versions(*batch)
            changed = [place for place in before.keys() | after.keys() if after.get(place) != before.get(place)]
            if changed:
                raise UserError(
                    f"{min(changed)} of micro-batch {i + 1} of {len(batches)} was changed while it waited for the last of its "
                    "step, which reads all of them: hand over a tensor of its own, buffer.clone()"
                )
        return batches


def carried(sharpness: SharpnessAware) -> dict[str, Any]:
    """The state that goes into a checkpoint. Raises UserError for tensors in shards, of which one file holds one rank's."""
    state = sharpness.state_dict()
    if is_sharded(sharpness.model) and any(isinstance(value, dict) and value for value in state["mix"].values()):
        raise UserError(
            f"mix {sharpness.method.mix!r} carries tensors in shards (FSDP2), which this checkpoint does not gather: save "
            "sharpness.state_dict() by torch.distributed.checkpoint, or use DistributedDataParallel"
        )
    return state

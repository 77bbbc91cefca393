"""Accelerate: inside `accelerator.accumulate(model)` micro-batches wait until gradients are due, and are one step then."""

from typing import Any

from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.integrations import Waiting, carried
from functional_sam.sharpness import SharpnessAware


class Accumulated:
    """A SharpnessAware whose `backward` takes one micro-batch, in the place of accelerator.backward(loss).

        sharpness = Accumulated(accelerator, SharpnessAware(model, optimizer, "functional-sam", rho=0.05))  # both prepared
        with accelerator.accumulate(model):
            loss = sharpness.backward(inputs, targets)  # None until gradients are due
            optimizer.step(); scheduler.step(); optimizer.zero_grad()

    save_state and load_state keep what the method carries: the object registers itself. Raises UserError for fp16, and for
    micro-batches in a buffer that is written to again before gradients are due.
    """

    def __init__(self, accelerator: Any, sharpness: SharpnessAware) -> None:
        if accelerator.scaler is not None:
            raise UserError('mixed_precision="fp16" scales losses, SharpnessAware does not: use "bf16", which needs no scaling')
        self.accelerator, self.sharpness = accelerator, sharpness
        self.waiting = Waiting()
        accelerator.register_for_checkpointing(self)

    def backward(self, inputs: Any, targets: Any) -> Tensor | None:
        """The mean loss of the step, its gradient in .grad, when gradients are due; None for the micro-batches before."""
        self.waiting.add(inputs, targets)
        if not self.accelerator.sync_gradients:
            return None
        return self.sharpness.backward(self.waiting.due())

    def state_dict(self) -> dict[str, Any]:
        return carried(self.sharpness)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sharpness.load_state_dict(state)

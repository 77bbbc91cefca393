"""Whether the optimizer has stepped since the last gradient was left, and in whose hands."""

import sys
import weakref
from typing import Any

import torch

from functional_sam.errors import UserError
from functional_sam.moments import parts_of


class StepsSeen:
    """Counts the steps of an optimizer by its hooks; one whose class has none (it never called super().__init__) is not watched."""

    def __init__(self, optimizer: Any) -> None:
        self.steps = 0
        self._optimizer, self._due = optimizer, False
        self._watched = all(hasattr(part, "_optimizer_step_post_hooks") for part in parts_of(optimizer))
        self._listen()

    def _listen(self) -> None:
        if self._watched:
            here = weakref.ref(self)
            self._optimizer.register_step_pre_hook(lambda *_: _tell(here(), before=True))
            self._optimizer.register_step_post_hook(lambda *_: _tell(here(), before=False))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose optimizer has come without hooks."""
        self.__dict__.update(state)
        self._listen()

    def left_gradients(self) -> None:
        """Called when .grad holds a step's gradient."""
        self._due, self._version = self._watched, self._versions()

    def require_a_step(self, model: torch.nn.Module) -> None:
        """Raise UserError when the last gradient is still there and no step has used it: this call would throw it away."""
        if not self._due or self._version != self._versions():
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if any(bool((g.to_local() if hasattr(g, "to_local") else g).any()) for g in grads):
            raise UserError(
                "backward was called twice without a step of the optimizer: .grad is replaced, not added to, so the first call is "
                "lost. Micro-batches of one step go into ONE call, backward([(inputs, targets), ...]); to drop a gradient on "
                "purpose, zero_grad() first"
            )

    def before(self) -> None:
        """Called before every step."""
        if _scales():
            raise UserError(
                "this step is taken by a GradScaler, which divides by its scale gradients that SharpnessAware never multiplied "
                "by it: fp16 with loss scaling is not supported. Use bfloat16 autocast (bf16-mixed), which needs no scaler"
            )

    def after(self) -> None:
        """Called after every step."""
        self.steps += 1
        self._due = False

    def _versions(self) -> int:
        """Changes with every step, also one that hooks do not see (a compiled one)."""
        return sum(p._version for group in self._optimizer.param_groups for p in group["params"])


def _tell(seen: StepsSeen | None, before: bool) -> None:
    if seen is not None:
        (seen.before if before else seen.after)()


def _scales() -> bool:
    """Whether a GradScaler that is enabled is calling."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.amp.grad_scaler":
            return bool(frame.f_locals["self"].is_enabled())
        frame = frame.f_back
    return False

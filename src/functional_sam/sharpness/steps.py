"""Whether the optimizer has stepped since the last gradient was left, and in whose hands."""

import sys
import weakref
from typing import Any

import torch

from functional_sam.errors import UserError
from functional_sam.moments import parts_of
from functional_sam.vectors import local


def listen(optimizer: Any, listener: Any) -> None:
    """Call listener.before_step(optimizer) and .after_step(optimizer) around each step, for as long as others hold the listener."""
    here = weakref.ref(listener)

    def tell(what: str, stepping: Any) -> None:
        if (held := here()) is not None:
            getattr(held, what)(stepping)

    optimizer.register_step_pre_hook(lambda stepping, *_: tell("before_step", stepping))
    optimizer.register_step_post_hook(lambda stepping, *_: tell("after_step", stepping))


class StepsSeen:
    """Counts the steps of an optimizer by its hooks; one whose class has none (it never called super().__init__) is not watched."""

    def __init__(self, optimizer: Any) -> None:
        self.steps = 0
        self._optimizer, self._due = optimizer, False
        self._watched = all(hasattr(part, "_optimizer_step_post_hooks") for part in parts_of(optimizer))
        self._listen()

    def _listen(self) -> None:
        if self._watched:
            listen(self._optimizer, self)

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
        if any(bool(local(g).any()) for g in grads):
            raise UserError(
                "backward was called twice without a step of the optimizer: .grad is replaced, not added to, so the first call is "
                "lost. Micro-batches of one step go into ONE call, backward([(inputs, targets), ...]); to drop a gradient on "
                "purpose, zero_grad() first"
            )

    def before_step(self, optimizer: Any) -> None:
        """Raise UserError for a step that a GradScaler takes."""
        if _scales():
            raise UserError(
                "this step is taken by a GradScaler, which divides by its scale gradients that SharpnessAware never multiplied "
                "by it: fp16 with loss scaling is not supported. Use bfloat16 autocast (bf16-mixed), which needs no scaler"
            )

    def after_step(self, optimizer: Any) -> None:
        """Count it."""
        self.steps += 1
        self._due = False

    def _versions(self) -> int:
        """Return a number that changes with every step, also with one that hooks do not see (a compiled one)."""
        return sum(p._version for group in self._optimizer.param_groups for p in group["params"])


def _scales() -> bool:
    """Whether a GradScaler that is enabled is calling."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.amp.grad_scaler":
            return bool(frame.f_locals["self"].is_enabled())
        frame = frame.f_back
    return False

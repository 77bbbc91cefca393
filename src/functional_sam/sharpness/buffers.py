"""The buffers that forward and loss_fn may read and update: the same ones in all passes of a step, and one update of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from functional_sam.weights import buffers_saved, modules_of, replicas


class Buffers:
    """The buffers of a model, and of other modules that forward and loss_fn know (an EMA codebook, a teacher, DINO's centre)."""

    def __init__(self, model: torch.nn.Module, forward: Callable[..., Any], loss_fn: Callable[..., Any]) -> None:
        self.model, self.forward, self.loss_fn = model, forward, loss_fn
        self._look_up()

    def _look_up(self) -> None:
        self.replicas = replicas(self.model)
        self._of_forward = list(dict.fromkeys([*self.model.modules(), *modules_of(self.forward)]))
        self._of_loss = [module for module in modules_of(self.loss_fn) if module not in set(self._of_forward)]
        self._rewind_model: Callable[[], None] = _nothing
        self._rewind_loss: Callable[[], None] = _nothing

    def __getstate__(self) -> dict[str, Any]:
        """Without what was found: the functions of a copy may know other modules."""
        return {"model": self.model, "forward": self.forward, "loss_fn": self.loss_fn}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._look_up()

    def saved(self, always: bool = False) -> Callable[[], None]:
        """Return a function that puts all buffers back as they are now."""
        model, loss = self._model_saved(always), self.loss_saved(always)

        def restore() -> None:
            model()
            loss()

        return restore

    def loss_saved(self, always: bool = False) -> Callable[[], None]:
        """Return the same for those of loss_fn alone."""
        return buffers_saved(self._of_loss, always)

    def _model_saved(self, always: bool = False) -> Callable[[], None]:
        """Return the same for model and forward, and for DDP's flag to broadcast the first rank's buffers before a forward."""
        restore = buffers_saved(self._of_forward, always)
        flags = [replica.require_forward_param_sync for replica in self.replicas]

        def rewind() -> None:
            restore()
            for replica, flag in zip(self.replicas, flags, strict=True):
                replica.require_forward_param_sync = flag

        return rewind

    def mark(self) -> None:
        """Note all buffers before a first pass: the passes after it start from there too."""
        self._rewind_model, self._rewind_loss = self._model_saved(), self.loss_saved()

    @contextlib.contextmanager
    def later(self, model: bool = True, loss: bool = True) -> Iterator[None]:
        """Run a later pass inside the block: it starts from the buffers that were marked, and leaves those there are as they are.

        model, loss: whether that is so for the buffers of model and forward, and for those of loss_fn.
        """
        restore_model = buffers_saved(self._of_forward) if model else _nothing
        restore_loss = self.loss_saved() if loss else _nothing
        if model:
            self._rewind_model()
        if loss:
            self._rewind_loss()
        try:
            yield
        finally:
            restore_loss()
            restore_model()


def _nothing() -> None:
    """Do nothing."""

"""Lightning (and pytorch_lightning): automatic optimization stays, the gradient is the method's."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.integrations import Waiting, carried
from functional_sam.losses import cross_entropy
from functional_sam.sharpness import SharpnessAware
from functional_sam.weights import replicas

Base: Any = object


class SharpnessAwareModule(Base):  # type: ignore[misc]
    """Before LightningModule: training_step collects micro-batches, and backward makes one step of them when it is due.

        class Net(SharpnessAwareModule, LightningModule):
            sharpness_options = {"method": "functional-sam", "rho": 0.05}  # keywords of SharpnessAware, loss_fn= included

    What is left to define are forward(inputs) -> logits, configure_optimizers, and micro_batch where a batch is no pair. The mean
    loss of a step is logged as "train_loss" and is what the last of its micro-batches returns; those before return 0.
    Raises UserError for optimizers that take several gradients a step (LBFGS).
    """

    sharpness_options: dict[str, Any]
    sharpness: SharpnessAware | None = None
    waiting: Waiting
    loaded: dict[str, Any] | None = None  # of the checkpoint that this fit goes on from
    mean_loss: Tensor | None = None

    def micro_batch(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, targets) of a batch."""
        inputs, targets = batch
        return inputs, targets

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.sharpness, self.loaded, self.waiting = None, None, Waiting()  # of an earlier fit
        super().setup(stage)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.automatic_optimization:
            raise UserError("automatic_optimization=False: nothing would call backward; leave it on, or use SharpnessAware itself")
        self.sharpness, self.waiting = (
            None,
            Waiting(),
        )  # of a search for a learning rate, or a fit that was stopped between two steps

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a fit, which the next one makes anew."""
        return {**super().__getstate__(), "sharpness": None, "waiting": Waiting(), "loaded": None, "mean_loss": None}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.waiting.add(*self.micro_batch(batch))
        for replica in replicas(self.trainer.strategy.model):
            replica.require_backward_grad_sync = False  # of the forward that this is called from: it has no backward
        return torch.zeros((), device=self.device)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.trainer.fit_loop._should_accumulate():
            return
        for replica in replicas(self.trainer.strategy.model):
            replica.require_backward_grad_sync = True
        self.mean_loss = self._sharpness().backward(self.waiting.due())
        self.log("train_loss", self.mean_loss)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """The module's own, with a closure that returns the loss of the step, which is known only after it."""
        self.mean_loss = None

        def closure() -> Any:
            if self.mean_loss is not None:
                kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
                raise UserError(
                    f"{kind} asks for several gradients a step: SharpnessAware gives one. Take an "
                    "optimizer that steps along a gradient (SGD, AdamW, ...)"
                )
            loss = optimizer_closure()
            return loss if self.mean_loss is None else loss.copy_(self.mean_loss)

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _sharpness(self) -> SharpnessAware:
        trainer = self.trainer
        if self.sharpness is None or self.sharpness.optimizer is not trainer.optimizers[0]:
            given = self.sharpness_options.get("forward") or (lambda model, inputs: model(inputs))

            @functools.wraps(given)  # it may take readout=
            def forward(*args: Any, **readout: Any) -> Any:
                with trainer.precision_plugin.forward_context():
                    return given(*args, **readout)

            words = {**self.sharpness_options, "forward": forward}
            if (loss_fn := words.get("loss_fn", cross_entropy)) is not cross_entropy:
                # In a training_step it would be under autocast too, which takes the cross-entropy of bf16 logits in float32.
                words["loss_fn"] = _within(trainer.precision_plugin.forward_context, loss_fn)
            self.sharpness = SharpnessAware(trainer.strategy.model, trainer.optimizers[0], **words)
            if self.loaded is not None:
                self.sharpness.load_state_dict(self.loaded)
                self.loaded = None
        return self.sharpness

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["sharpness"] = self.loaded if self.sharpness is None else carried(self.sharpness)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        resumed = self._trainer is not None and self.trainer.state.fn == "fit"  # else the optimizer's state is left behind too
        self.loaded = checkpoint.get("sharpness") if resumed else None


def _within(context: Callable[[], AbstractContextManager[Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function called within a context; of a module, or a method, a method of the same object, whose buffers it moves."""
    module = isinstance(function, torch.nn.Module)
    own = type(function).__call__ if module else getattr(function, "__func__", None)
    if own is None:

        @functools.wraps(function)
        def alone(*args: Any) -> Any:
            with context():
                return function(*args)

        return alone

    def method(self: Any, *args: Any) -> Any:
        with context():
            return own(self, *args)

    return MethodType(method, function if module else function.__self__)  # type: ignore[attr-defined]

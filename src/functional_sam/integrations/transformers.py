"""Hugging Face's Trainer: its loop, clipping, schedules, logging and checkpoints stay, the gradient is the method's."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.files import atomic_file
from functional_sam.integrations import Waiting, carried
from functional_sam.integrations.trainer_loss import TrainerLoss
from functional_sam.sharpness import SharpnessAware, resolve

try:
    import transformers
except ImportError as error:
    raise ImportError("this needs the package transformers: pip install '.[transformers]' in a clone of this repository") from error

Base: Any = object
STATE = "sharpness.pt"  # beside optimizer.pt in a checkpoint


class SharpnessAwareMixin(Base):  # type: ignore[misc]
    """Before a Trainer class: micro-batches wait until gradients are due, and are one step of SharpnessAware.

    sharpness: method, rho and options of SharpnessAware, e.g. {"method": "functional-sam", "rho": 0.05}; in training the object
    itself. No forward and loss_fn: those are the Trainer's.
    The loss is the Trainer's own of the logits that the model returns without labels; the first step makes sure that it is the
    model's. Raises FloatingPointError for one that is not finite, which the stock Trainer passes over.
    """

    sharpness: Any = None

    def __init__(self, *args: Any, sharpness: dict[str, Any], **kwargs: Any) -> None:
        for word in sharpness.keys() & {"forward", "loss_fn"}:
            raise UserError(
                f"sharpness={{{word!r}: ...}}: forward and loss are the Trainer's. Another loss of logits and labels is its "
                "compute_loss_func=, another forward the model's own"
            )
        resolve(sharpness.get("method", "functional-sam"), {k: v for k, v in sharpness.items() if k not in ("method", "rho")})
        self.words = sharpness
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1 or self.get_cp_size() * self.get_sp_size() > 1:
            raise UserError("DataParallel and split sequences are not supported: one process per device (torchrun)")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.sharpness, self.loss = None, TrainerLoss(self, transformers.modeling_outputs.CausalLMOutput)
        self.waiting = Waiting()
        return super().train(*args, **kwargs)

    def _sharpness(self, model: Any) -> Any:
        if self.sharpness is None:
            words = {"forward": lambda model, inputs: model(**inputs)["logits"], "loss_fn": self.loss, **self.words}
            self.sharpness = SharpnessAware(model, self.optimizer, **words)
        return self.sharpness

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The loss of the step when gradients are due, 0 for the micro-batches before: the Trainer logs their sum."""
        model.train()
        self.optimizer.train()  # of schedule-free ones; Accelerate's wrapper always has it
        self.waiting.add(self._prepare_inputs(inputs), num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches = self.loss.begin(self.waiting.due())
        sharpness: SharpnessAware = self._sharpness(model)
        if self.loss.words is None:
            self.loss.require_the_models_own(sharpness, *batches[0])
        return sharpness.backward(batches)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = carried(self.sharpness)
        if self.args.should_save:
            with atomic_file(Path(output_dir) / STATE) as path:
                torch.save(state, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (file := Path(checkpoint) / STATE).is_file():  # one of the stock Trainer has none
            self._sharpness(self.model_wrapped).load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


class SharpnessAwareTrainer(SharpnessAwareMixin, transformers.Trainer):
    """The stock Trainer with `sharpness=`."""

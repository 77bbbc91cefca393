"""The Trainer's own loss as a function of logits: label shift, num_items_in_batch, label smoothing, compute_loss_func."""

import math
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.losses import IGNORE
from functional_sam.sharpness import SharpnessAware
from functional_sam.sharpness.randomness import random_state, set_random_state
from functional_sam.weights import buffers_kept

ROUNDING, LOW_PRECISION = 1e-5, 1e-3  # how far two evaluations of one loss may be apart, of itself


class TrainerLoss:
    """`trainer.compute_loss` where, in the place of the model, there is a module of its name that knows the logits."""

    def __init__(self, trainer: Any, output: type) -> None:
        self.trainer, self.output = trainer, output
        self.words: tuple[str, ...] | None = None  # that the model's loss takes; None until a first step has found out

    def begin(self, waiting: list[tuple[dict[str, Any], Any]]) -> list[tuple[dict[str, Any], Any]]:
        """Micro-batches of a step, of the Trainer's (inputs, num_items_in_batch): what the model is given, and a target a row."""
        model, batches = self.trainer.accelerator.unwrap_model(self.trainer.model), []
        for inputs, _ in waiting:
            if "labels" not in inputs:
                raise UserError(f"a batch without labels ({', '.join(inputs)}): the loss is one of logits and labels")
            labels, given = inputs["labels"], {key: value for key, value in inputs.items() if key != "labels"}
            if "decoder_input_ids" not in given and hasattr(model, "prepare_decoder_input_ids_from_labels"):
                given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
            shifted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE) if self.trainer._loss_shifts_labels else labels
            batches.append((given, shifted))
        self.of_targets = {id(batch[1]): part for batch, part in zip(batches, waiting, strict=True)}
        return batches

    def __call__(self, z: Tensor, targets: Any) -> tuple[Tensor, int]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft

        def forward(_: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
            words = {key: inputs[key] for key in self.words or () if key in inputs}
            if model.config.is_encoder_decoder:
                words["shift_labels"] = labels  # its inputs are shifted, and not its labels
            # Of these each kind of head takes its own, and leaves the others.
            words |= {"labels": labels, "pooled_logits": z, "config": model.config, "vocab_size": z.shape[-1]}
            return self.output(None if labels is None else model.loss_function(logits=z, **words), z)  # None: the Trainer has them

        known = type(type(model).__name__, (torch.nn.Module,), {"forward": forward})
        return self.of(known(), targets), 1

    def of(self, model: Any, targets: Any) -> Tensor:
        """The loss of a micro-batch, times their number where the Trainer sums over them: SharpnessAware takes the mean."""
        trainer, (inputs, num_items) = self.trainer, self.of_targets[id(targets)]
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items)
        summed = trainer.loss_is_scaled_for_ga
        if summed is None:  # as Trainer.training_step decides
            summed = trainer.compute_loss_func is not None or (trainer.model_accepts_loss_kwargs and num_items is not None)
        return loss * len(self.of_targets) if summed else loss

    def require_the_models_own(self, sharpness: SharpnessAware, inputs: Any, targets: Any) -> None:
        """Raise UserError where the model's loss is not this one of its logits: another part would have no gradient."""
        model, device, found = sharpness.model, self.trainer.args.device, []
        before, tolerance = random_state(device), ROUNDING
        # Some models are given num_items_in_batch and ignore it.
        for words in (None, ("num_items_in_batch", "shift_labels"), ("shift_labels",)):
            self.words = words
            with torch.no_grad(), buffers_kept(model):
                if words is None:
                    loss = self.of(model, targets)
                else:
                    output = model(**inputs)
                    loss = self(output["logits"], targets)[0]
                    # A router's term is a thousandth of the loss, with coefficients as published.
                    low = output["logits"].dtype in (torch.bfloat16, torch.float16) and output.get("aux_loss") is None
                    tolerance = LOW_PRECISION if low else ROUNDING
            set_random_state(before, device)
            found.append(float(loss))
            if words and (math.isclose(found[0], found[-1], rel_tol=tolerance) or math.isnan(found[0])):
                return sharpness.reshard()
        raise UserError(
            f"the loss of the model is {found[0]:.6g}, loss_function of its logits {found[1]:.6g}: a part of it comes from "
            "elsewhere (a router), or it is another. Give the Trainer compute_loss_func=, a function of outputs.logits and labels"
        )

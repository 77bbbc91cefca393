"""The Trainer's own loss as a function of logits: label shift, num_items_in_batch, label smoothing, compute_loss_func."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.losses import IGNORE
from functional_sam.sharpness import SharpnessAware
from functional_sam.sharpness.first_step import versions
from functional_sam.sharpness.randomness import random_state, set_random_state
from functional_sam.weights import buffers_kept

ROUNDING, LOW_PRECISION = 1e-5, 1e-3  # how far two evaluations of one loss may be apart, of itself
HARMLESS = {"num_items_in_batch", "return_dict", "use_cache", "output_attentions", "output_hidden_states"}  # to logits
ONCE = "it computes the loss from outputs.logits of one model(**inputs)"
MADE = "Inputs are made in the data collator"
WAY_OUT = "Give the Trainer compute_loss_func=, a function of outputs.logits and labels"


class TrainerLoss:
    """`trainer.compute_loss` where, in the place of the model, there is the same model but for its call, which knows the logits."""

    def __init__(self, trainer: Any, output: type) -> None:
        self.trainer, self.output = trainer, output
        self.words: tuple[str, ...] | None = None  # that the model's loss takes; None until a first step has found out
        self.kind: type | None = None  # of the model in compute_loss

    def begin(self, waiting: list[tuple[dict[str, Any], Any]]) -> list[tuple[dict[str, Any], Any]]:
        """Micro-batches of a step, of the Trainer's (inputs, num_items_in_batch): what the model is given, and a target a row."""
        trainer, batches = self.trainer, []
        model = trainer.accelerator.unwrap_model(trainer.model)
        # The Trainer leaves labels out where the loss is its own, and the model makes its decoder's inputs without them.
        its_own = trainer.label_smoother is not None or trainer.compute_loss_func is not None
        self.makes_decoder_inputs = not its_own and hasattr(model, "prepare_decoder_input_ids_from_labels")
        for inputs, _ in waiting:
            if "labels" not in inputs:
                raise UserError(f"a batch without labels ({', '.join(inputs)}): the loss is one of logits and labels")
            labels, given = inputs["labels"], {key: value for key, value in inputs.items() if key != "labels"}
            if self.makes_decoder_inputs and "decoder_input_ids" not in given:
                given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
            if trainer._loss_shifts_labels:
                targets = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE)
            else:  # an object of its own, also where one batch comes twice in a step
                targets = labels.view_as(labels) if isinstance(labels, Tensor) else copy.copy(labels)
            batches.append((given, targets))
        self.of_targets = {id(batch[1]): part for batch, part in zip(batches, waiting, strict=True)}
        return batches

    def __call__(self, z: Tensor, targets: Any) -> tuple[Tensor, int]:
        outer = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        model = outer.get_base_model() if hasattr(outer, "get_base_model") else outer  # of peft
        calls = 0

        def call(*args: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
            nonlocal calls
            calls += 1
            self._require_the_batch(targets, calls, args, inputs, set(inspect.signature(type(model).forward).parameters))
            if labels is None and self.makes_decoder_inputs and "decoder_input_ids" not in inputs:
                raise UserError(
                    "compute_loss gives the model no labels, of which its decoder_input_ids are made: let the data collator make "
                    "them, DataCollatorForSeq2Seq(tokenizer, model=model)"
                )
            if labels is None:
                return self.output(None, z)  # the Trainer, or compute_loss, has them
            words = {key: inputs[key] for key in self.words or () if key in inputs}
            if model.config.is_encoder_decoder:
                if labels is not self.of_targets[id(targets)][0]["labels"]:
                    raise UserError(f"compute_loss gives the model other labels than the batch's: {ONCE}. {MADE}")
                words["shift_labels"] = labels  # its inputs are shifted, and not its labels
            # Of these each kind of head takes its own, and leaves the others.
            words |= {"labels": labels, "pooled_logits": z, "config": model.config, "vocab_size": z.shape[-1]}
            return self.output(model.loss_function(logits=z, **words), z)

        return self.of(self._with_call(outer, call), targets), 1

    def _with_call(self, model: Any, call: Callable[..., Any]) -> Any:
        """The model with all its parameters and attributes, so that a loss of them is seen, whose call is another."""
        self.call = call
        if self.kind is None:
            own = {"__call__": lambda _, *args, **inputs: self.call(*args, **inputs), "forward": property(lambda _: self.call)}
            self.kind = type(type(model).__name__, (type(model),), own)
        known: Any = object.__new__(self.kind)
        object.__setattr__(known, "__dict__", model.__dict__)
        return known

    def _require_the_batch(self, targets: Any, calls: int, args: tuple[Any, ...], inputs: dict[str, Any], taken: set[str]) -> None:
        """Raise UserError unless compute_loss calls the model once, with the batch as it came: there are no other logits.

        taken: what the model's forward has names for; a column of weights, say, it may be given or not.
        """
        batch = self.of_targets[id(targets)][0]
        if calls > 1:
            raise UserError(
                f"compute_loss calls the model twice: {ONCE}. For two forwards (R-Drop) let batches have each row twice"
            )
        if args:
            raise UserError(f"compute_loss gives the model inputs by position ({len(args)}): {ONCE}")
        other = {key for key in inputs.keys() - HARMLESS if inputs[key] is not batch.get(key)}
        other |= (batch.keys() - inputs.keys() - {"labels"}) & taken
        if other:
            raise UserError(f"compute_loss gives the model another {min(other)!r} than the batch's: {ONCE}. {MADE}")

    def of(self, model: Any, targets: Any) -> Tensor:
        """The loss of a micro-batch, times their number where the Trainer sums over them: SharpnessAware takes the mean."""
        trainer, (inputs, num_items) = self.trainer, self.of_targets[id(targets)]
        with trainer.compute_loss_context_manager():
            before = versions(inputs, None)
            loss: Tensor = trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items)
        changed = [place for place, version in versions(inputs, None).items() if version != before[place]]
        if changed:
            raise UserError(f"compute_loss writes to {changed[0]}, which every pass of the step is given: let it work on a copy")
        summed = trainer.loss_is_scaled_for_ga
        if summed is None:  # as Trainer.training_step decides
            summed = trainer.compute_loss_func is not None or (trainer.model_accepts_loss_kwargs and num_items is not None)
        return loss * len(self.of_targets) if summed else loss

    def require_the_models_own(self, sharpness: SharpnessAware, inputs: Any, targets: Any) -> None:
        """Raise UserError where the model's loss is not this one of its logits: another part would have no gradient."""
        model, device, found = sharpness.model, self.trainer.args.device, []
        before, tolerance, failed = random_state(device), ROUNDING, None
        # Some models are given num_items_in_batch and ignore it.
        for words in (None, ("num_items_in_batch", "shift_labels"), ("shift_labels",)):
            self.words = words
            with torch.no_grad(), buffers_kept(model):
                if words is None:
                    loss = self.of(model, targets)
                else:
                    output = model(**inputs)
                    try:
                        loss = self(output["logits"], targets)[0]
                    except (UserError, torch.OutOfMemoryError):
                        raise
                    except Exception as error:
                        failed = error
                        continue
                    # A router's term is a thousandth of the loss, with coefficients as published.
                    low = output["logits"].dtype in (torch.bfloat16, torch.float16) and output.get("aux_loss") is None
                    tolerance = LOW_PRECISION if low else ROUNDING
            set_random_state(before, device)
            found.append(float(loss))
            if words and (math.isclose(found[0], found[-1], rel_tol=tolerance) or math.isnan(found[0])):
                return sharpness.reshard()
        if failed is not None:
            raise UserError(
                f"the loss of the model is {found[0]:.6g}, and of its logits {list(output['logits'].shape)} alone there is none "
                f"({type(failed).__name__}: {failed}): it needs another part of the output, or logits and labels do not match "
                f"(prompt tuning lengthens texts). {WAY_OUT}"
            ) from failed
        raise UserError(
            f"the loss of the model is {found[0]:.6g}, loss_function of its logits gives {found[1]:.6g}: a part of it does not "
            f"come from the logits (a router), or it is a different loss. {WAY_OUT}"
        )

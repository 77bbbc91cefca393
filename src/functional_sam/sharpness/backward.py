"""SharpnessAware: `backward` in the place of `loss.backward()`, for every method of the table."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy
from functional_sam.sharpness.ascent import ASCENTS, norm, owners, subset
from functional_sam.sharpness.mix import MIXES, Mix
from functional_sam.sharpness.options import resolve
from functional_sam.sharpness.passes import Batch, Kept, LossFn, Passes
from functional_sam.sharpness.path import PATHS


@dataclass
class Step:
    """One perturbation: the micro-batches it is for, and where to."""

    batches: Sequence[Batch]
    sync: bool = True  # the pass that leaves the gradient averages over ranks
    onto: dict[Tensor, Tensor] = field(default_factory=dict)  # gradients of earlier micro-batches (m="microbatch")
    params: list[Tensor] = field(default_factory=list)
    directions: list[Tensor] = field(default_factory=list)  # eps = radius * direction / size
    size: float = 0.0
    radii: dict[Tensor, float] = field(default_factory=dict)


class SharpnessAware:
    """Gradient of a sharpness-aware method, left in .grad for any optimizer; the weights come back bit for bit.

    theta' = theta + eps, eps = rho * d / size by the method's ascent; .grad = the derivative by the method's path:
    sam J(theta')^T u(theta'), functional J(theta')^T u(theta), logit J(theta)^T u(theta'), with z = model(inputs) the logits,
    u = dL/dz, J = dz/dtheta. `METHODS` is the table of names, sharpness/README.md the explanation.

    model: maps inputs to logits. DistributedDataParallel and FSDP2 models are understood: the same gradient as one process.
    optimizer: the one that will step; adam and momentum ascents read its state, a group's "rho" entry overrides rho.
    rho: radius, in the units of the parameters; None takes the method's published default.
    loss_fn(logits, targets) -> (sum over valid targets, number of valid targets); default: cross-entropy, targets of -100 ignored.
    forward(model, inputs) -> logits; default model(inputs). Autocast belongs in here.
    **options: of the method (`functional-sam methods` lists them), and ascent= / path= to leave the named combination.
    Raises UserError (a ValueError) for an unknown method or option, a negative rho, an optimizer without the state it needs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        method: str = "functional-sam",
        rho: float | None = None,
        *,
        loss_fn: LossFn = cross_entropy,
        forward: Callable[..., Any] | None = None,
        **options: Any,
    ):
        self.model, self.optimizer = model, optimizer
        self.method, self.rho, self.options = resolve(method, rho, options, model, optimizer)
        self.passes = Passes(model, loss_fn, forward, self.options["keep"], self.options["keep_dtype"])
        self.only = subset(model, self.options["only"])
        self.lr_max = self.options["lr_max"] or max(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
        self.steps = 0
        self.mix: Mix | None = MIXES[self.method.mix](self) if self.method.mix else None
        self._theta: dict[Tensor, Tensor] = {}
        self._pass = "pass 1"

    def backward(self, batches: Sequence[Batch]) -> Tensor:
        """Replace .grad by the method's gradient on the micro-batches of ONE step; return the mean loss at the unperturbed weights.

        batches: [(inputs, targets), ...]. Loss and gradient are means over all valid targets of the step, over all micro-batches
        and ranks, however they are cut. The loss is a detached scalar (momentum-sam, which never visits the unperturbed weights,
        returns the loss at the perturbed ones).
        Raises FloatingPointError naming step and pass when a loss or gradient is not finite, UserError for an empty list.
        Whatever is raised, by us or by the caller's model, the weights are restored first.
        """
        if not isinstance(batches, list) or not batches:
            got = "an empty list" if isinstance(batches, list) else f"a {type(batches).__name__}"
            raise UserError(f"backward takes a non-empty list of micro-batches, [(inputs, targets), ...]; got {got}")
        self.steps += 1
        self._pass = "pass 1"
        self.passes.begin(batches)
        if self.options["m"] == "microbatch":
            kept: list[Kept] = []
            onto: dict[Tensor, Tensor] = {}
            for i, batch in enumerate(batches):
                kept += self._gradient(Step([batch], sync=i == len(batches) - 1, onto=onto))
                onto = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        else:
            kept = self._gradient(Step(batches))
        loss, correction = self.passes.finish(kept)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if correction != 1.0:
            torch._foreach_mul_(grads, correction)
        self._require_finite(float(loss), "loss")
        self._require_finite(norm(grads), "gradient")
        return loss

    def _gradient(self, step: Step) -> list[Kept]:
        """The method's gradient on the batches of `step`, added to step.onto; what pass 1 kept (its losses)."""
        passes, path = self.passes, self.method.path
        step.radii = self.radii()
        due = path != "plain" and (self.steps - 1) % self.options["interval"] == 0 and any(step.radii.values())
        if self.mix is not None:
            due = self.mix.prepare(step) and due

        if due and self.method.ascent == "momentum" and self.mix is None:
            step.params = [p for p in step.radii if p.requires_grad]
            self._ascend(step, [])
            if step.size > 0.0:
                self._reset(step.onto)
                return PATHS[path](self, step, None)
            due = False  # no momentum yet

        self._reset({} if due else step.onto)
        kept = passes.gradient(
            step.batches, remember=due and path == "functional", sync=step.sync if not due else self.options["m"] == "global"
        )
        if due:
            step.params = [p for p in step.radii if p.grad is not None]
            base: dict[Tensor, Tensor] = {p: p.grad for p in self.model.parameters() if p.grad is not None}
            if self.mix is not None and getattr(self.model, "gradient_as_bucket_view", False):
                base = {p: g.clone() for p, g in base.items()}  # DDP will write the next pass into the same memory
            self._ascend(step, [base[p] for p in step.params])
            if step.size > 0.0:
                if self.mix is None:
                    base.clear()
                PATHS[path](self, step, kept)
            elif step.onto or self.options["m"] != "global":  # eps = 0: the plain gradient, which pass 1 left unsynchronized
                self._reset(step.onto)
                passes.gradient(step.batches, like=kept, sync=step.sync)
            if self.mix is not None:
                self.mix.combine(base)
        elif self.mix is not None:
            self.mix.reuse()
        return kept

    def _ascend(self, step: Step, grads: list[Tensor]) -> None:
        """Fill in direction and size of `step`."""
        own = {key: self.options[key] for key in ("form", "eta", "sign", "preconditioned") if key in self.options}
        assert self.method.ascent is not None
        with torch.no_grad():
            step.directions, step.size = ASCENTS[self.method.ascent](
                step.params, grads, optimizer=self.optimizer, consume=self.mix is None, **own
            )
        self._require_finite(step.size, "gradient")

    # ------------------------------------------------------------------ weights, gradients, radii

    @contextlib.contextmanager
    def perturbed(self, step: Step) -> Iterator[dict[Tensor, Tensor]]:
        """The weights at theta' inside the block, theta bit for bit after it; yields {parameter: theta}. Gradients start anew.

        Restores by copy: theta + eps - eps is not theta in floating point.
        """
        with torch.no_grad():
            theta = {p: self._copy(p) for p in step.params}
            try:
                for radius in set(step.radii.values()):
                    chosen = [i for i, p in enumerate(step.params) if step.radii[p] == radius]
                    if chosen and radius:
                        torch._foreach_add_(
                            [step.params[i] for i in chosen], [step.directions[i] for i in chosen], alpha=radius / step.size
                        )
                self._pass = "pass 2"
                step.directions = []  # frees them, gradients of pass 1 mostly, before pass 2 allocates its own
                self._reset(step.onto)
                with torch.enable_grad():
                    yield theta
            finally:
                for p, value in theta.items():
                    p.copy_(value)

    def _copy(self, p: Tensor) -> Tensor:
        """A copy of p's values in memory that is kept from step to step."""
        copy = self._theta.get(p)
        if copy is None or copy.shape != p.shape or copy.dtype != p.dtype or copy.device != p.device:
            copy = self._theta[p] = p.detach().clone()
            return copy
        return copy.copy_(p.detach())

    def _reset(self, onto: dict[Tensor, Tensor]) -> None:
        for p in self.model.parameters():
            p.grad = onto.get(p)

    def radii(self) -> dict[Tensor, float]:
        """Radius of this step for each parameter that may be perturbed: rho (or its group's "rho") under the schedule.

        constant rho; warmup rho * min(1, step / warmup_steps); lr rho_min + (rho - rho_min) (lr - lr_min) / (lr_max - lr_min).
        """
        options, result = self.options, {}
        for p, group in owners(self.optimizer).items():
            if self.only is not None and p not in self.only:
                continue
            rho = float(group.get("rho", self.rho))
            if options["rho_schedule"] == "warmup":
                rho *= min(1.0, self.steps / options["warmup_steps"])
            elif options["rho_schedule"] == "lr":
                span = self.lr_max - options["lr_min"]
                fraction = (group["lr"] - options["lr_min"]) / span if span else 1.0
                rho = options["rho_min"] + (rho - options["rho_min"]) * min(max(fraction, 0.0), 1.0)
            result[p] = rho * (self.mix.radius if self.mix is not None else 1.0)
        return result

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"step {self.steps}, {self._pass}: the {what} is not finite ({value}); the weights are unchanged. "
                "A smaller rho or learning rate, or a longer warm-up, is the usual remedy"
            )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What the method carries from step to step: the step count, and the state of its mix. The optimizer's is its own."""
        return {"steps": self.steps, "mix": self.mix.state_dict() if self.mix is not None else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.steps = int(state["steps"])
        if self.mix is not None:
            self.mix.load_state_dict(state["mix"])

"""SharpnessAware: `backward` in the place of `loss.backward()`, for every method of the table."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy
from functional_sam.sharpness.ascent import ASCENTS, norm, owners, subset
from functional_sam.sharpness.mix import GradientNormPenalty, LookSAM, Mix, SurrogateGap, WeightedSharpness
from functional_sam.sharpness.options import resolve
from functional_sam.sharpness.passes import Batch, Kept, LossFn, Passes
from functional_sam.sharpness.path import PATHS, needs_cotangent
from functional_sam.sharpness.tram import TrustRegion

MIXES: dict[str, type[Mix]] = {
    "gnp": GradientNormPenalty,
    "wsam": WeightedSharpness,
    "gsam": SurrogateGap,
    "looksam": LookSAM,
    "tram": TrustRegion,
}
AT_THETA, AT_PERTURBED = "pass 1 (at theta)", "pass 2 (at theta + eps)"


@dataclass
class Step:
    """One perturbation: the micro-batches it is for, and where to."""

    batches: Sequence[Batch]
    sync: bool = True  # the pass that leaves the gradient averages over ranks
    onto: dict[Tensor, Tensor] = field(default_factory=dict)  # gradients of earlier micro-batches (m="microbatch")
    like: Sequence[Kept] | None = None  # a pass before pass 1 whose randomness pass 1 repeats (tram)
    base: dict[Tensor, Tensor] = field(default_factory=dict)  # g, for a mix and for the penalty path
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
        self.steps = 0
        self.mix: Mix | None = MIXES[self.method.mix](self) if self.method.mix else None
        self.where = AT_THETA  # named in errors
        self._theta: dict[Tensor, Tensor] = {}

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
        try:
            return self._backward(batches)
        except BaseException:
            self.steps -= 1
            raise

    def _backward(self, batches: Sequence[Batch]) -> Tensor:
        self.where = AT_THETA
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
        unvisited = self.method.ascent == "momentum" and self.method.path in ("sam", "logit") and self.mix is None
        self.require_finite(float(loss), "loss", self.where if unvisited else AT_THETA)
        self.require_finite(norm(grads), "gradient", self.where)
        if self.mix is not None:
            self.mix.done()
        return loss

    def _gradient(self, step: Step) -> list[Kept]:
        """The method's gradient on the batches of `step`, added to step.onto; what pass 1 kept (its losses)."""
        passes, path, mix = self.passes, self.method.path, self.mix
        everyone = self.options["m"] == "global"
        step.radii = self.radii()
        due = path != "plain" and (self.steps - 1) % self.options["interval"] == 0 and any(step.radii.values())
        if mix is not None:
            due = mix.prepare(step, due)

        if due and self.method.ascent == "momentum" and mix is None and path != "penalty":
            step.params = [p for p in step.radii if p.requires_grad]
            self._ascend(step, [])
            if step.size > 0.0:
                self._reset(step.onto)
                return PATHS[path](self, step, None)
            due = False  # no momentum yet

        self._reset({} if due else step.onto)
        kept = passes.gradient(
            step.batches,
            like=step.like,
            remember=due and needs_cotangent(path, self.options),
            logits=due and mix is not None and mix.compares_logits,
            sync=everyone if due else step.sync,
        )
        if not due:
            if mix is not None:
                mix.reuse(any(step.radii.values()))
            return kept

        if self.options["m"] != "microbatch":
            correction = passes.settle(kept)
            if correction != 1.0:
                torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], correction)
        if mix is not None:
            mix.measure(step, kept)
        step.params = [p for p in step.radii if p.grad is not None]
        if mix is not None or path == "penalty":
            step.base = {p: p.grad for p in self.model.parameters() if p.grad is not None}
            if any(replica.gradient_as_bucket_view for replica in passes.replicas):  # the next pass writes to the same memory
                step.base = {p: g.clone() for p, g in step.base.items()}
        self._ascend(step, [g for g in (step.base.get(p, p.grad) for p in step.params) if g is not None])
        if step.size == 0.0 or not any(step.radii.values()):  # eps = 0: the plain gradient
            if everyone:
                return kept  # which pass 1 left
            step.size, step.radii = 1.0, dict.fromkeys(step.radii, 0.0)  # all ranks take the same passes
        PATHS[path](self, step, kept)
        if mix is not None:
            mix.combine(step.base)
        return kept

    def _ascend(self, step: Step, grads: list[Tensor]) -> None:
        """Fill in direction and size of `step`."""
        own = {key: self.options[key] for key in ("form", "eta", "sign", "preconditioned") if key in self.options}
        assert self.method.ascent is not None
        with torch.no_grad():
            step.directions, step.size = ASCENTS[self.method.ascent](
                step.params, grads, optimizer=self.optimizer, consume=not step.base, **own
            )
        if self.passes.world > 1 and self.options["m"] != "global" and not math.isfinite(step.size):
            step.size = 0.0  # raising here would leave the other ranks waiting: pass 2 at theta finds it again, for all of them
        self.require_finite(step.size, "gradient", self.where)

    # ------------------------------------------------------------------ weights, gradients, radii

    @contextlib.contextmanager
    def moved(self, params: Iterable[Tensor], move: Callable[[], None]) -> Iterator[dict[Tensor, Tensor]]:
        """The weights where `move` puts them inside the block, as they were, bit for bit, after it; yields {parameter: theta}.

        Restores by copy: theta + eps - eps is not theta in floating point.
        """
        with torch.no_grad():
            theta = {p: self._copy(p) for p in params}
            try:
                move()
                torch.clear_autocast_cache()  # casts of the weights as they were, if the caller has autocast around it all
                with torch.enable_grad():
                    yield theta
            except BaseException:
                self.passes.reshard()
                raise
            finally:
                for p, value in theta.items():
                    p.copy_(value)
                torch.clear_autocast_cache()

    @contextlib.contextmanager
    def perturbed(self, step: Step, scale: float = 1.0) -> Iterator[dict[Tensor, Tensor]]:
        """The weights at theta + scale * eps inside the block, where gradients start anew; yields {parameter: theta}."""
        with self.moved(step.params, partial(self._displace, step, scale)) as theta:
            self.at_perturbed()
            step.directions = []  # frees them, gradients of pass 1 mostly, before pass 2 allocates its own
            self._reset(step.onto)
            yield theta

    def at_perturbed(self) -> None:
        """From here on errors are of pass 2."""
        self.where = AT_PERTURBED

    def _displace(self, step: Step, scale: float) -> None:
        for radius in set(step.radii.values()):
            chosen = [i for i, p in enumerate(step.params) if step.radii[p] == radius]
            if chosen and radius:
                params, directions = [step.params[i] for i in chosen], [step.directions[i] for i in chosen]
                torch._foreach_add_(params, directions, alpha=scale * radius / step.size)

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

        constant rho; warmup rho * min(1, step / warmup_steps); lr rho_min + (rho - rho_min) (lr - lr_min) / (lr_max - lr_min),
        the fraction held in [0, 1].
        """
        options, result = self.options, {}
        for p, group in owners(self.optimizer).items():
            if self.only is not None and p not in self.only:
                continue
            rho = float(group.get("rho", self.rho))
            if options["rho_schedule"] == "warmup":
                rho *= min(1.0, self.steps / options["warmup_steps"])
            elif options["rho_schedule"] == "lr":
                fraction = (group["lr"] - options["lr_min"]) / (options["lr_max"] - options["lr_min"])
                rho = options["rho_min"] + (rho - options["rho_min"]) * min(max(fraction, 0.0), 1.0)
            result[p] = rho
        return result

    def require_finite(self, value: float, what: str, where: str) -> None:
        """Raise FloatingPointError, naming step and pass, unless `value` is finite."""
        if not math.isfinite(value):
            raise FloatingPointError(
                f"step {self.steps}, {where}: the {what} is not finite ({value}); the weights are unchanged. "
                "A smaller rho or learning rate, or a longer warm-up, is the usual remedy"
            )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What the method carries from step to step: the step count, the lr that rho follows, and the state of its mix.

        The optimizer's state is its own. Tensors are named by parameter and are the live ones, as in an optimizer's state_dict.
        """
        mix = self.mix.state_dict() if self.mix is not None else {}
        return {"steps": self.steps, "lr_max": self.options["lr_max"], "mix": mix}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, by the same method on a model with the same parameters."""
        known = set(self.mix.state_dict()) if self.mix is not None else set()
        if set(state) != {"steps", "lr_max", "mix"} or set(state["mix"]) != known:
            raise UserError(f"this state is not one of mix {self.method.mix!r}: load it into the method that saved it")
        self.steps, self.options["lr_max"] = int(state["steps"]), state["lr_max"]
        if self.mix is not None:
            self.mix.load_state_dict(state["mix"])

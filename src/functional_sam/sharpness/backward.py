"""SharpnessAware: `backward` in the place of `loss.backward()`, for every method of the table."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack  # which torch brings; typing has it from Python 3.11 on

from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy
from functional_sam.moments import owners, unwrapped_optimizer
from functional_sam.sharpness import first_step
from functional_sam.sharpness.checks import check, radius, require_moments, require_some_left, require_synchronized
from functional_sam.sharpness.dose import dose_of_step, plain_gradient
from functional_sam.sharpness.methods import needs_cotangent, resolve
from functional_sam.sharpness.mix import MIXES, Mix
from functional_sam.sharpness.options import MethodName, Options
from functional_sam.sharpness.passes import Batch, Kept, LossFn, Passes
from functional_sam.sharpness.path import PATHS
from functional_sam.sharpness.perturbation import AT_THETA, Perturbation, Rho, Step, gradients_of
from functional_sam.sharpness.steps import StepsSeen
from functional_sam.sharpness.trial import trial
from functional_sam.vectors import norm
from functional_sam.weights import reshard


class SharpnessAware:
    """Gradient of a sharpness-aware method, left in .grad for any optimizer; the weights come back bit for bit.

    theta' = theta + eps, eps = rho * d / size by the method's ascent; .grad = the derivative by the method's path:
    sam J(theta')^T u(theta'), functional J(theta')^T u(theta), logit J(theta)^T u(theta'), with z = model(inputs) the logits,
    u = dL/dz, J = dz/dtheta. `METHODS` is the table of names, sharpness/README.md the explanation.

    model: maps inputs to logits. DistributedDataParallel and FSDP2 models are understood: the same gradient as one process.
    optimizer: the one that will step, or a list of them; adam and momentum ascents read its state, a group's "rho" overrides rho.
    rho: radius, in the units of the parameters, or a function of the number of steps done; None: the method's published default.
    loss_fn(logits, targets) -> (sum over valid targets, number of valid targets); default: cross-entropy, targets of -100 ignored.
    forward(model, inputs) -> logits; default model(inputs). Autocast belongs in here.
    **options: of the method (sharpness/options.py lists them), and ascent= / path= to leave the named combination.
    dose: |gradient of the method - g| / |g| of the last step that was asked for it, None after any other.
    Raises UserError (a ValueError) for an unknown method or option, a negative rho, an optimizer without the state it needs.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        method: MethodName = "functional-sam",
        rho: Rho | None = None,
        *,
        loss_fn: LossFn = cross_entropy,
        forward: Callable[..., Any] | None = None,
        **options: Unpack[Options],
    ):
        inner = unwrapped_optimizer(optimizer)
        self.model = model
        self.optimizer: Any = optimizer  # as it was given
        self.method, self.options = resolve(method, options)
        rho = self.method.rho if rho is None else rho
        check(self.method, self.options, model, inner, loss_fn)
        self._perturbation = Perturbation(model, inner, self.method, rho if callable(rho) else radius(rho), self.options)
        self._passes = Passes(model, loss_fn, forward, self.options["keep"], self.options["keep_dtype"])
        self._passes.watched = list(owners(inner))  # until a first step has gone well
        self._mix: Mix | None = MIXES[self.method.mix](model, inner, self.options) if self.method.mix else None
        self._seen = StepsSeen(inner)
        self._moments_known = False
        self.dose: float | None = None

    @property
    def _has_first_pass(self) -> bool:
        return self.method.has_first_pass(self.options)

    @property
    def steps(self) -> int:
        """Steps done."""
        return self._perturbation.steps

    @property
    def rho(self) -> Rho:
        """The radius, or the function that gives it."""
        return self._perturbation.rho

    def backward(self, batches: Sequence[Batch], *, measure_dose: bool = False) -> Tensor:
        """Replace .grad by the method's gradient on the micro-batches of ONE step; return the mean loss at the unperturbed weights.

        batches: [(inputs, targets), ...], inputs whatever `forward` takes. Loss and gradient are means over all valid targets of
        the step, over all micro-batches and ranks, however they are cut. The loss is a detached scalar (of momentum-sam,
        random-sam and with ascent_part=, which do not visit the unperturbed weights with all of it, at the perturbed ones).
        measure_dose: take the plain gradient g besides, with the same random numbers, and leave |gradient - g| / |g| in `dose`; it
        costs a gradient and a copy of one, on all ranks alike, and changes nothing of the step.
        Raises FloatingPointError naming step, pass and parameter when a loss or gradient is not finite, UserError for no batch
        and for a second call with the first one's gradients still there.
        Whatever is raised, by us or by the caller's model: weights and buffers are restored first, and .grad is left empty.
        """
        _require_micro_batches(batches)
        _require_gradients_on()
        self._seen.require_a_step(self.model)
        require_synchronized(self._passes.replicas, self._passes.units)
        if self._seen.steps and not self._moments_known:
            require_moments(self.method, self.options, self.model, self._perturbation.optimizer, stepped=True)
            self._moments_known = True
        if self._passes.watched is not None and self.method.path != "plain":
            first_step.require_repeatable(batches)
        restore_buffers = self._passes.buffers.saved()
        self.dose = None
        self._perturbation.steps += 1
        unmoved = self._fingerprints()
        try:
            g = plain_gradient(self._passes, batches) if measure_dose else None
            loss = self._backward(batches)
            first_step.require_unmoved(unmoved)
            dose = None if g is None else dose_of_step(self.model, g, self._mix.beside() if self._mix is not None else {})
        except BaseException:
            self._perturbation.steps -= 1
            for p in self.model.parameters():
                p.grad = None
            if self._mix is not None:
                self._mix.drop()
            restore_buffers()
            raise
        if self.method.path != "plain":
            first_step.warn_of_others(self._passes.others)
        self._passes.watched, self._passes.others, self.dose = None, [], dose
        self._seen.left_gradients()
        return loss

    def check(self, batches: Sequence[Batch]) -> None:
        """Try the set-up on these micro-batches and undo it; call it once, before training. Costs three to four steps.

        Raises UserError, with what is wrong, unless two passes at the same weights agree, rho -> 0 gives the plain gradient, and a
        step of `backward` leaves the weights bit for bit and the optimizer alone. Under DDP and FSDP2 all ranks call it.
        """
        _require_gradients_on()
        trial(self, batches)

    def reshard(self) -> None:
        """Drop the whole parameters that FSDP2 still holds after a forward of the caller's own (an evaluation)."""
        reshard(self.model)

    def _fingerprints(self) -> first_step.Fingerprints:
        """Fingerprint what the optimizer does not train, in the first step alone; plain has one pass, and needs none."""
        if self._passes.watched is None or self.method.path == "plain":
            return []
        reshard(self.model)  # what is gathered is not what is there afterwards
        return first_step.fingerprints(self.model, set(self._passes.watched))

    def _backward(self, batches: Sequence[Batch]) -> Tensor:
        """Leave the method's gradient in .grad and return the mean loss; `backward` without the checks of its call."""
        passes, perturbation = self._passes, self._perturbation
        perturbation.where = AT_THETA
        passes.begin(batches)
        if self.options["scope"] == "micro-batch":
            kept: list[Kept] = []
            earlier: dict[Tensor, Tensor] = {}
            for i, batch in enumerate(batches):
                passes.buffers.mark()
                kept += self._gradient(Step([batch], i, sync=i == len(batches) - 1, earlier=earlier))
                earlier = gradients_of(self.model)
        else:
            kept = self._gradient(Step(batches))
        loss, correction = passes.finish(kept)
        self._scale_gradients(correction)
        unvisited = self.method.path in ("sam", "logit") and not self._has_first_pass
        perturbation.require_finite(float(loss), "loss", perturbation.where if unvisited else AT_THETA)
        perturbation.require_finite(norm(list(gradients_of(self.model).values()), fast=True), "gradient")
        if self._mix is not None:
            self._mix.done(perturbation)
        return loss

    def _gradient(self, step: Step) -> list[Kept]:
        """Leave the method's gradient on the batches of `step`, plus step.earlier, in .grad; return what pass 1 kept (its losses).

        Pass 1 at theta gives g, the ascent makes eps of it, and the path takes its derivative at theta + eps. Where eps needs no g
        of the whole step (momentum, random, ascent_part) it comes first, and the path alone is taken. A step without a perturbed
        pass (not due by `every`, a radius of zero, nothing to point along) is pass 1 alone.
        """
        passes, perturbation, mix, path = self._passes, self._perturbation, self._mix, self.method.path
        step.radii = perturbation.radii()
        due = path != "plain" and (self.steps - 1) % self.options["every"] == 0 and any(step.radii.values())
        if mix is not None:
            due = mix.prepare(passes, perturbation, step, due)

        if due and not self._has_first_pass:
            self._ascend_ahead(step)
            if step.size > 0.0:
                perturbation.start_gradients(step.earlier)
                return PATHS[path](passes, perturbation, step, None)
            due = False  # no momentum yet, or a gradient of zero

        kept = self._first_pass(step, due)
        if not due:
            if mix is not None:
                mix.reuse(any(step.radii.values()))
        elif self._ascend_along_g(step, kept):
            PATHS[path](passes, perturbation, step, kept)
            if mix is not None:
                mix.combine(step.base)
        return kept

    def _first_pass(self, step: Step, due: bool) -> list[Kept]:
        """Leave g at theta in .grad; with `due`, the perturbed pass to come, keep what it needs of this one."""
        passes, scope = self._passes, self.options["scope"]
        self._perturbation.start_gradients({} if due else step.earlier)
        kept = passes.gradient(
            step.batches,
            repeated=step.repeated,
            remember=due and needs_cotangent(self.method, self.options),
            logits=due and self._mix is not None and self._mix.compares_logits,
            sync=scope == "step" if due else step.sync,
        )
        if due and scope != "micro-batch":
            self._scale_gradients(passes.settle(kept))
        return kept

    def _ascend_along_g(self, step: Step, kept: list[Kept]) -> bool:
        """Fill in eps after pass 1; return whether a pass at theta + eps follows. Where eps = 0, g is the result already."""
        passes, mix = self._passes, self._mix
        if mix is not None:
            mix.measure(passes, self._perturbation, step, kept)
        reached = set(gradients_of(self.model))  # what the optimizer still holds of a head that was replaced has an old .grad
        step.params = [p for p in step.radii if p in reached]
        if not step.params:
            require_some_left(self.model, self._perturbation.optimizer)
        if mix is not None or self.method.path == "penalty":
            step.base = gradients_of(self.model)
            if any(replica.gradient_as_bucket_view for replica in passes.replicas):  # the next pass writes to the same memory
                step.base = {p: g.clone() for p, g in step.base.items()}
        self._ascend(step, self._ascent_vectors(step), kept)
        if self.options["ascent_steps"] > 1:
            self._climb(step, step.batches, kept)
        if not _moves(step):
            if self.options["scope"] == "step":
                return False
            step.size, step.radii = 1.0, dict.fromkeys(step.radii, 0.0)  # eps is this rank's own: all take the same passes
        return True

    def _scale_gradients(self, factor: float) -> None:
        if factor != 1.0:
            torch._foreach_mul_(list(gradients_of(self.model).values()), factor)

    def _ascend(self, step: Step, grads: list[Tensor], kept: list[Kept]) -> None:
        """Fill in direction and size of `step` along `grads`; a loss of pass 1 that is not finite is named before their norm."""
        try:
            self._perturbation.ascend(step, grads, together=self._passes.world == 1 or self.options["scope"] == "step")
        except FloatingPointError:
            if kept:
                self._perturbation.require_finite(float(self._passes.finish(kept)[0]), "loss")
            raise

    def _ascent_vectors(self, step: Step) -> list[Tensor]:
        """g, or what a mix puts in its place, of step.params. Give it no name: pass 2 is to find the memory of g free."""
        grads = [g for g in (step.base.get(p, p.grad) for p in step.params) if g is not None]
        return grads if self._mix is None else self._mix.towards(step.params, grads)

    def _ascend_ahead(self, step: Step) -> None:
        """Fill in eps where there is no pass 1: of no gradient, or of that of the first micro-batches, which leaves no trace."""
        reshard(self.model)  # gathered parameters are not the optimizer's
        inside = set(self.model.parameters())
        step.params = [p for p in step.radii if p.requires_grad and p in inside]
        part = self.options["ascent_part"]
        if part == 1.0:
            self._ascend(step, [], [])
            return
        batches, passes = first_part(step.batches, part), self._passes
        g = plain_gradient(passes, batches)
        step.params = [p for p in step.params if p in g]
        self._perturbation.ascend(step, [g[p] for p in step.params], together=True)
        del g  # its memory is the next pass's
        if self.options["ascent_steps"] > 1:
            self._climb(step, batches, None)
        passes.begin(step.batches)

    def _climb(self, step: Step, batches: Sequence[Batch], kept: list[Kept] | None) -> None:
        """Take the other k - 1 steps of the ascent: eps = rho / k times the sum of d / size, each at the point reached so far."""
        perturbation, k = self._perturbation, self.options["ascent_steps"]
        if not _moves(step):
            return
        total, step.directions = torch._foreach_div(step.directions, step.size), []
        for _ in range(k - 1):
            there = Step(batches, params=step.params, directions=list(total), size=float(k), radii=step.radii)
            with perturbation.applied(there), self._passes.buffers.later():
                if kept is None:
                    g = plain_gradient(self._passes, batches)
                else:
                    self._passes.gradient(batches, repeated=kept)
                    g = {p: p.grad for p in step.params if p.grad is not None}
                perturbation.ascend(there, [g[p] if p in g else torch.zeros_like(p) for p in step.params], together=True)
                del g
            if there.size > 0.0:
                torch._foreach_add_(total, there.directions, alpha=1.0 / there.size)
            there.directions = []
        step.directions, step.size = list(total), float(k)

    # ------------------------------------------------------------------ state

    @property
    def _point(self) -> str:
        """ascent-path-mix, which tells whose state a state_dict is."""
        return "-".join(str(axis) for axis in (self.method.ascent, self.method.path, self.method.mix))

    def state_dict(self) -> dict[str, Any]:
        """What the method carries from step to step: the step count, the lr that rho follows, and the state of its mix.

        The optimizer's state is its own. Tensors are named by parameter and are the live ones, as in an optimizer's state_dict.
        """
        mix = self._mix.state_dict() if self._mix is not None else {}
        return {"method": self._point, "steps": self.steps, "lr_max": self.options["lr_max"], "mix": mix}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, by the same method on a model with the same parameters."""
        known, saved = set(self._mix.state_dict()) if self._mix is not None else set(), state.get("method", self._point)
        if set(state) - {"method"} != {"steps", "lr_max", "mix"} or set(state["mix"]) != known:
            raise UserError(f"this state is not one of mix {self.method.mix!r}: load it into the method that saved it")
        if saved != self._point:
            raise UserError(f"this state is of {saved!r}, not of {self._point!r}: load it into the method that saved it")
        self._perturbation.steps, self.options["lr_max"] = int(state["steps"]), state["lr_max"]
        if self._mix is not None:
            self._mix.load_state_dict(state["mix"])


def _moves(step: Step) -> bool:
    """Whether eps is not zero."""
    return step.size != 0.0 and any(step.radii.values())


def first_part(batches: Sequence[Batch], part: float) -> Sequence[Batch]:
    """The first `part` of the micro-batches, 0 < part <= 1. Raises UserError where that is no whole number of them."""
    number = part * len(batches)
    if abs(number - round(number)) > 1e-6 * len(batches) or round(number) < 1:
        raise UserError(
            f"ascent_part={part:g} of {len(batches)} micro-batches is {number:g}: it takes whole ones, the first of each process; "
            f"cut the step into {math.ceil(1 / part - 1e-9)} or a multiple of it"
        )
    return batches[: round(number)]


def _require_gradients_on() -> None:
    if not torch.is_grad_enabled():
        raise UserError("called under torch.no_grad() or torch.inference_mode(): there is no gradient there, call it outside")


def _require_micro_batches(batches: object) -> None:
    shape = "a non-empty sequence of micro-batches, [(inputs, targets), ...]"
    if not isinstance(batches, Sequence) or isinstance(batches, str) or not batches:
        got = "an empty one" if isinstance(batches, Sequence) else f"a {type(batches).__name__}"
        raise UserError(f"backward takes {shape}; got {got}")
    for batch in batches:
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            raise UserError(
                f"backward takes {shape}; got one whose entry is a {type(batch).__name__}: a single micro-batch goes into a list, "
                "[(inputs, targets)]"
            )

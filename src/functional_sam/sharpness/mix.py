"""What some methods do with both gradients: g at theta (base) and g' at theta' (now in .grad).

A Mix may also set the radius (tram) or let a step go without its own perturbed pass (looksam).
"""

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sam.errors import UserError
from functional_sam.moments import owners
from functional_sam.sharpness.divergence import divergence, noisy_inputs
from functional_sam.sharpness.passes import Kept, Passes
from functional_sam.sharpness.perturbation import Perturbation, Step, complete, gradients_of
from functional_sam.sharpness.steps import listen
from functional_sam.vectors import dot, norm
from functional_sam.weights import unwrapped

Gradients = dict[Tensor, Tensor]


class Mix:
    """Keep g' as it is. Subclasses override what they need; the keys of a mix's state_dict are always the same."""

    compares_logits = False  # pass 1 keeps its logits for `measure`

    def __init__(self, model: torch.nn.Module, optimizer: Any, options: dict[str, Any]) -> None:
        self.model, self.optimizer, self.options = model, optimizer, options

    def prepare(self, passes: Passes, perturbation: Perturbation, step: Step, due: bool) -> bool:
        """Called before pass 1; return whether the step has a perturbed pass, which it is `due` by its number and radius."""
        return due

    def measure(self, passes: Passes, perturbation: Perturbation, step: Step, kept: Sequence[Kept]) -> None:
        """Called after pass 1 of a step with a perturbed pass; may set other radii for it."""

    def towards(self, params: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Called with g of the parameters to perturb, before the ascent; return what the ascent is given in its place."""
        return grads

    def combine(self, base: Gradients) -> None:
        """Called with g after the perturbed pass; the result goes to .grad. It may use up g."""

    def reuse(self, active: bool) -> None:
        """Called after pass 1 of a step without a perturbed pass; `active`: rho is not zero."""

    def done(self, perturbation: Perturbation) -> None:
        """Called at the end of every step, weights restored."""

    def beside(self) -> Gradients:
        """What the coming optimizer.step() will apply beside .grad, in its units."""
        return {}

    def drop(self) -> None:
        """Called when .grad is given up: what goes with it goes too."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _both(self, base: Gradients) -> tuple[list[Tensor], list[Tensor]]:
        """Return g and g' as lists over the parameters that have either; zeros are filled in for the other."""
        complete(self.model, base)
        pairs = [(g, p.grad) for p, g in base.items() if p.grad is not None]
        return [g for g, _ in pairs], [there for _, there in pairs]


def named(model: torch.nn.Module, tensors: Gradients) -> dict[str, Tensor]:
    """Key the tensors by the name of their parameter, the same inside DDP and torch.compile."""
    return {name: tensors[p] for name, p in unwrapped(model).named_parameters() if p in tensors}


def unnamed(model: torch.nn.Module, tensors: dict[str, Tensor]) -> Gradients:
    """Invert `named`, with copies on each parameter's device and in its dtype."""
    parameters = dict(unwrapped(model).named_parameters())
    for name in tensors:
        if name not in parameters:
            raise UserError(
                f"this state is of another model: it has a parameter {name!r}, which {type(unwrapped(model)).__name__} lacks"
            )
    return {parameters[name]: torch.zeros_like(parameters[name]).detach().copy_(value) for name, value in tensors.items()}


class GradientNormPenalty(Mix):
    """GNP: (1 - alpha) g + alpha g'; alpha = 1 is SAM. Source: Zhao et al. 2022 (r 0.1, alpha 0.8)."""

    def combine(self, base: Gradients) -> None:
        g, there = self._both(base)
        torch._foreach_mul_(there, self.options["alpha"])
        torch._foreach_add_(there, g, alpha=1.0 - self.options["alpha"])


class WeightedSharpness(Mix):
    """WSAM: the gradient of L + w (L(theta') - L), w = gamma / (1 - gamma), that is g + w (g' - g).

    decoupled (as published): .grad = g, and when optimizer.step() has made its step, theta -= lr w (g' - g), as decoupled weight
    decay does: the optimizer's moments see g alone. Whatever is done to .grad between the two, clipping above all, does not
    reach that correction (the published code clips g and g' each). It goes with the tensors that backward left in .grad, changed
    in place or not: where there are none any more (zero_grad) it is left out, and where others are, with a warning.
    decoupled=False: g + w (g' - g) goes to .grad, where clipping sees all of it.
    Source: Yue et al. 2023 (rho 0.05, gamma 0.9, decoupled), Algorithm 1.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, options: dict[str, Any]) -> None:
        super().__init__(model, optimizer, options)
        self.weight = self.options["gamma"] / (1.0 - self.options["gamma"])
        self.pending: Gradients = {}  # g' - g
        self._left: Gradients = {}  # g, the tensors that go with it; not known of what a state brought
        self._listen()

    def _listen(self) -> None:
        if self.options["decoupled"]:
            listen(self.optimizer, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose optimizer has come without hooks."""
        self.__dict__.update(state)
        self._listen()

    def prepare(self, passes: Passes, perturbation: Perturbation, step: Step, due: bool) -> bool:
        self.drop()
        return due

    def drop(self) -> None:
        self.pending, self._left = {}, {}

    def combine(self, base: Gradients) -> None:
        g, there = self._both(base)
        torch._foreach_add_(there, g, alpha=-1.0)
        if self.options["decoupled"]:
            corrections = {p: p.grad for p in base if p.grad is not None}
            for p in corrections:
                p.grad = base[p]
            stepped = owners(self.optimizer)
            self.pending = {p: correction for p, correction in corrections.items() if p in stepped}
            self._left = {p: base[p] for p in self.pending}
        else:
            torch._foreach_mul_(there, self.weight)
            torch._foreach_add_(there, g)

    def done(self, perturbation: Perturbation) -> None:
        perturbation.require_finite(norm(list(self.pending.values()), fast=True), "gradient")  # not in .grad, where the core looks

    def beside(self) -> Gradients:
        return {p: correction * self.weight for p, correction in self.pending.items()}

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the correction where .grad is no longer what backward left."""
        others = [p for p in owners(optimizer) if p in self._left and p.grad is not self._left.pop(p)]
        if any(p.grad is not None for p in others):
            warnings.warn(
                "wsam: .grad is not what its backward left, so this step is made without the correction that goes with it. If the "
                "gradient was dropped on purpose, all is well; to change it, do so in place, or give decoupled=False",
                stacklevel=2,
            )
        for p in others:
            del self.pending[p]

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """theta -= lr w (g' - g)."""
        for p, group in owners(optimizer).items():
            self._left.pop(p, None)  # still there after a step that took its gradient itself, by a closure
            if p in self.pending:
                p.add_(self.pending.pop(p), alpha=-float(group["lr"]) * self.weight)

    def state_dict(self) -> dict[str, Any]:
        """Empty between steps; the correction when taken between backward and optimizer.step()."""
        return {"pending": named(self.model, self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drop()
        self.pending = unnamed(self.model, state["pending"])


class SurrogateGap(Mix):
    """GSAM: g' - alpha g_orth, g_orth = g - (g . g' / |g'|^2) g' the part of g orthogonal to g': lowers the surrogate gap
    L(theta') - L without raising L(theta').

    Source: Zhuang et al. 2022, Algorithm 1 (alpha and rho by task; ViT-S/16 on ImageNet: alpha 1, rho 0.6 following the lr to 0).
    """

    def combine(self, base: Gradients) -> None:
        g, there = self._both(base)
        square, alpha = norm(there, fast=True) ** 2, self.options["alpha"]
        if square > 0.0:
            torch._foreach_mul_(there, 1.0 + alpha * dot(g, there, fast=True) / square)
            torch._foreach_add_(there, g, alpha=-alpha)


class LookSAM(Mix):
    """LookSAM: every so many steps g' and g_v = g' - (g . g' / |g|^2) g, the part of g' orthogonal to g; in the steps between
    g + alpha (|g| / |g_v|) g_v.

    Keeps g_v. With the functional or logit path g' is that path's. Source: Liu et al. 2022, Algorithm 1 (every 10, alpha 0.7).
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, options: dict[str, Any]) -> None:
        super().__init__(model, optimizer, options)
        self.orthogonal: Gradients = {}
        self.size = 0.0
        self._next: tuple[Gradients, float] | None = None

    def prepare(self, passes: Passes, perturbation: Perturbation, step: Step, due: bool) -> bool:
        self._next = None
        return due

    def combine(self, base: Gradients) -> None:
        g, there = self._both(base)
        if not g:
            return
        torch._foreach_mul_(g, -dot(g, there, fast=True) / norm(g, fast=True) ** 2)
        torch._foreach_add_(g, there)
        self._next = ({p: base[p] for p in base if p.grad is not None}, norm(g, fast=True))
        # g' parallel to g leaves rounding alone, which the steps between would blow up to the size of g.
        if self._next[1] <= 8 * torch.finfo(g[0].dtype).eps * norm(there, fast=True):
            self._next = ({}, 0.0)

    def done(self, perturbation: Perturbation) -> None:
        if self._next is not None:  # taken over only now, when the step is known to be sound
            (self.orthogonal, self.size), self._next = self._next, None

    def reuse(self, active: bool) -> None:
        if not active or self.size == 0.0:
            return
        grads = list(gradients_of(self.model).values())
        pairs = [(p.grad, orthogonal) for p, orthogonal in self.orthogonal.items() if p.grad is not None]
        factor = self.options["alpha"] * norm(grads, fast=True) / self.size
        torch._foreach_add_([g for g, _ in pairs], [orthogonal for _, orthogonal in pairs], alpha=factor)

    def state_dict(self) -> dict[str, Any]:
        return {"orthogonal": named(self.model, self.orthogonal), "size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.orthogonal, self.size = unnamed(self.model, state["orthogonal"]), float(state["size"])


class TrustRegion(Mix):
    """Radius rho * D, D = mean over valid targets of KL(softmax(z_old) || softmax(z)) in nats, z the logits at theta.

    z_old by divergence: "previous" at theta_{t-1}, the weights of the previous step; "initial" at theta_0, those of the first one;
    "noise" at theta, of inputs x + z with z ~ N(0, sigma^2) (noisy_inputs). Both forwards see the same dropout mask. Without an
    earlier step D = 0: the plain gradient. One forward more than SAM; keeps through a step the logits (with a readout: h, twice)
    and, but for noise, a copy of the parameters. Rows without a target are left out where targets are class indices; for another
    loss_fn every row counts.
    Source: Sherborne et al. 2023, equations 4 and 5, TRAM-theta_{t-1}, -theta_0 and -x (sigma .1). Theirs has rho = 1 and ASAM's
    ascent (equation 7): ascent="adaptive". The factor rho, and the ascent along the gradient where none is named, are ours.
    """

    compares_logits = True

    def __init__(self, model: torch.nn.Module, optimizer: Any, options: dict[str, Any]) -> None:
        super().__init__(model, optimizer, options)
        self.old: dict[Tensor, Tensor] = {}
        self._there: list[Kept] = []

    def prepare(self, passes: Passes, perturbation: Perturbation, step: Step, due: bool) -> bool:
        noise = self.options["divergence"] == "noise"
        if not due or not (noise or self.old):
            return False
        if noise:
            seed = (torch.initial_seed() * 1_000_003 + perturbation.steps) % 2**63  # another one each step, whoever seeds the steps
            elsewhere: contextlib.AbstractContextManager[Any] = noisy_inputs(self.model, self.options["sigma"], seed)
        else:
            elsewhere = perturbation.moved(self.old, self._go_back)
        with elsewhere, passes.buffers.later():
            self._there = passes.cotangents(step.batches, logits=True)
        step.repeated = self._there
        return True

    def _go_back(self) -> None:
        for p, value in self.old.items():
            p.copy_(value)

    def measure(self, passes: Passes, perturbation: Perturbation, step: Step, kept: Sequence[Kept]) -> None:
        total, count = zip(
            *(
                divergence(there, here, self.old, targets)
                for there, here, (_, targets) in zip(self._there, kept, step.batches, strict=True)
            ),
            strict=True,
        )
        moved, valid = passes.sum_over_ranks(torch.stack(total).sum(), torch.stack(count).sum())
        # Rounding may leave a divergence of about -1e-8 between logits that are the same.
        factor = max(moved / max(valid, 1.0), 0.0)
        if not math.isfinite(factor):
            perturbation.require_finite(float(passes.finish(kept)[0]), "loss")  # from which it may follow
            perturbation.require_finite(factor, "divergence, which sets the radius,")
        step.radii = {p: radius * factor for p, radius in step.radii.items()}
        self._there = []
        for memory in kept:
            memory.logits = None

    def done(self, perturbation: Perturbation) -> None:
        keeps = self.options["divergence"]
        if keeps == "previous" or (keeps == "initial" and not self.old):
            for p in self.model.parameters():
                if p.requires_grad or p in self.old:  # frozen by now, it is to be where it stays
                    if p in self.old:
                        self.old[p].copy_(p.detach())
                    else:
                        self.old[p] = p.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return {"old": named(self.model, self.old)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.old = unnamed(self.model, state["old"])


class Averaged(Mix):
    """Average g over perturbed steps: m <- decay m + (1 - decay) g, the first time m = g. Keeps m; g' goes to .grad as it is."""

    def __init__(self, model: torch.nn.Module, optimizer: Any, options: dict[str, Any]) -> None:
        super().__init__(model, optimizer, options)
        self.average: Gradients = {}
        self._perturbed: Sequence[Tensor] = ()
        self._next: Gradients = {}

    def prepare(self, passes: Passes, perturbation: Perturbation, step: Step, due: bool) -> bool:
        self._next = {}
        return due

    def towards(self, params: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
        self._perturbed = params
        return grads

    def combine(self, base: Gradients) -> None:
        self._next = {p: base[p] for p in self._perturbed}
        self._average_into(self._next)

    def _average_into(self, g: Gradients) -> None:
        """Replace g by the m that it makes, in place."""
        known = [p for p in g if p in self.average]
        if known:
            torch._foreach_mul_([g[p] for p in known], 1.0 - self.options["decay"])
            torch._foreach_add_([g[p] for p in known], [self.average[p] for p in known], alpha=self.options["decay"])

    def done(self, perturbation: Perturbation) -> None:
        if self._next:  # taken over only now, when the step is known to be sound
            self.average, self._next = {**self.average, **self._next}, {}

    def state_dict(self) -> dict[str, Any]:
        return {"average": named(self.model, self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = unnamed(self.model, state["average"])


class Friendly(Averaged):
    """Friendly-SAM: the ascent follows g - sigma m, the noise of this step's g, with m of the steps before (the first time g).

    Source: Li et al. 2024, as in their code (sigma 1, lambda = decay 0.9). An m with this step's g in it, as others write it, gives
    the same direction at sigma = 1.
    """

    def towards(self, params: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
        g, m, sigma = super().towards(params, grads), self.average, self.options["sigma"]
        return [torch.sub(x, m[p], alpha=sigma) if p in m else x for p, x in zip(params, g, strict=True)]


class VarianceSuppressed(Averaged):
    """VaSSO: the ascent follows m, with this step's g in it.

    Source: Li & Giannakis 2023, as in their code (theta = 1 - decay = 0.9).
    """

    def towards(self, params: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
        m = {p: g.clone() for p, g in zip(params, super().towards(params, grads), strict=True)}
        self._average_into(m)
        return list(m.values())


MIXES: dict[str, type[Mix]] = {
    "gnp": GradientNormPenalty,
    "wsam": WeightedSharpness,
    "gsam": SurrogateGap,
    "looksam": LookSAM,
    "tram": TrustRegion,
    "friendly": Friendly,
    "vasso": VarianceSuppressed,
}

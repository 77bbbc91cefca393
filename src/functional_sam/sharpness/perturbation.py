"""theta' = theta + eps: how far and where to, the weights moved there and back, and what an error says of where it was met."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from functional_sam.ascents import ASCENTS
from functional_sam.moments import has_rho_of_its_own, owners, parts_of
from functional_sam.sharpness.checks import chosen, radius
from functional_sam.sharpness.methods import Method
from functional_sam.sharpness.passes import Batch, Kept
from functional_sam.sharpness.randomness import generator_of
from functional_sam.vectors import local, norm
from functional_sam.weights import moved, process_group, reshard, unwrapped

AT_THETA, AT_PERTURBED = "pass 1 (at theta)", "pass 2 (at theta + eps)"
Rho = float | Callable[[int], float]
ASCENT_WORDS = ("normalize_by", "eta", "per", "direction", "preconditioned")  # options that an ascent takes


@dataclass
class Step:
    """One perturbation: the micro-batches it is for, eps, and what its passes hand to each other."""

    batches: Sequence[Batch]
    number: int = 0  # of the micro-batch that it is for (scope="micro-batch")
    sync: bool = True  # the pass that leaves the gradient averages over ranks
    earlier: dict[Tensor, Tensor] = field(default_factory=dict)  # gradients of micro-batches before (scope="micro-batch")
    repeated: Sequence[Kept] | None = None  # a pass before pass 1 whose randomness pass 1 repeats (tram)
    base: dict[Tensor, Tensor] = field(default_factory=dict)  # g, for a mix and for the penalty path
    params: list[Tensor] = field(default_factory=list)
    directions: list[Tensor] = field(default_factory=list)  # eps = radius * direction / size
    size: float = 0.0
    radii: dict[Tensor, float] = field(default_factory=dict)


def gradients_of(model: torch.nn.Module) -> dict[Tensor, Tensor]:
    """The .grad of every parameter that has one."""
    return {p: p.grad for p in model.parameters() if p.grad is not None}


def complete(model: torch.nn.Module, base: dict[Tensor, Tensor]) -> None:
    """Fill in zeros where g (`base`) or g' (.grad) is missing: a parameter may be used at one of the two weights only."""
    for p in model.parameters():
        if p.grad is None and p in base:
            p.grad = torch.zeros_like(base[p])
        elif p.grad is not None and p not in base:
            base[p] = torch.zeros_like(p.grad)


class Perturbation:
    """Radii, directions and the weights' way there and back, for one model, optimizer and method.

    steps: begun so far, the one at work included. where: the pass at work, named in errors.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, method: Method, rho: Rho, options: dict[str, Any]) -> None:
        self.model, self.optimizer, self.method, self.rho, self.options = model, optimizer, method, rho, options
        self._chosen_of = set(model.parameters())
        self.chosen = chosen(model, options["subset"])
        self.steps = 0
        self.fixed: float | None = None  # in the place of every radius (a trial)
        self.where = AT_THETA
        self._theta: dict[Tensor, Tensor] = {}  # memory of the copies, kept from step to step

    def _choose_again(self) -> None:
        """Choose anew what is perturbed, where the model has other parameters than it had then (a head that was replaced)."""
        if self.chosen is None:
            return
        reshard(self.model)  # gathered parameters are others too
        if (inside := set(self.model.parameters())) != self._chosen_of:
            self._chosen_of, self.chosen = inside, chosen(self.model, self.options["subset"])

    def radii(self) -> dict[Tensor, float]:
        """Return the radius of this step for each parameter that may be perturbed: rho, or its group's "rho", under rho_schedule.

            constant      rho
            warmup        rho * min(1, step / warmup_steps)
            after-warmup  0 for warmup_steps steps, then rho
            in-warmup     rho for warmup_steps steps, then 0
            lr            rho_min + (rho - rho_min) * fraction, fraction = (lr - lr_min) / (lr_max - lr_min) held in [0, 1]

        A rho that is a function is called with the number of steps before this one. The "rho" of an optimizer that has a
        hyperparameter of that name (Adadelta) is that one, and no radius.
        """
        self._choose_again()
        options, result = self.options, {}
        general = radius(self.rho(self.steps - 1), f"of step {self.steps - 1}") if callable(self.rho) else self.rho
        own = {p for part in parts_of(self.optimizer) if has_rho_of_its_own(part) for p in owners(part)}
        for p, group in owners(self.optimizer).items():
            if self.chosen is not None and p not in self.chosen:
                continue
            rho = general if p in own or "rho" not in group else radius(group["rho"], "in a parameter group")
            if options["rho_schedule"] == "warmup":
                rho *= min(1.0, self.steps / options["warmup_steps"])
            elif options["rho_schedule"] == "after-warmup":
                rho *= self.steps > options["warmup_steps"]
            elif options["rho_schedule"] == "in-warmup":
                rho *= self.steps <= options["warmup_steps"]
            elif options["rho_schedule"] == "lr":
                # Numbers, whatever lr is (a tensor, for a compiled step): radii are compared, and equal tensors are not one key.
                fraction = (float(group["lr"]) - options["lr_min"]) / (options["lr_max"] - options["lr_min"])
                if fraction > 1.0 + 1e-6:
                    warnings.warn(
                        f'rho_schedule="lr": a learning rate is above lr_max={options["lr_max"]:g}, where rho cannot follow it: '
                        "give lr_max=, the highest of the run",
                        stacklevel=4,
                    )
                rho = options["rho_min"] + (rho - options["rho_min"]) * min(max(fraction, 0.0), 1.0)
            result[p] = float(rho if self.fixed is None else self.fixed)
        return result

    def ascend(self, step: Step, grads: list[Tensor], together: bool) -> None:
        """Fill in direction and size of `step` by the method's ascent. together: all ranks know this size, so all raise or none."""
        words = {key: self.options[key] for key in ASCENT_WORDS if key in self.options}
        if "seed" in self.options:
            words["generator"] = self._generator(step)
        assert self.method.ascent is not None
        with torch.no_grad():
            step.directions, step.size = ASCENTS[self.method.ascent](
                step.params, grads, optimizer=self.optimizer, consume=not step.base, **words
            )
        if not together and not math.isfinite(step.size):
            step.size = 0.0  # raising here would leave the other ranks waiting: pass 2 at theta finds it again, for all of them
        self.require_finite(step.size, "gradient")

    def _generator(self, step: Step) -> torch.Generator:
        """Make a generator of seed, step and micro-batch, the same on all ranks, and of the rank where eps is a rank's own."""
        group = process_group(self.model) if self.options["scope"] != "step" else None
        rank = dist.get_rank(group) if group is not None else 0
        device = next(self.model.parameters()).device
        return generator_of(device, self.options["seed"], self.steps, step.number, rank)

    @contextlib.contextmanager
    def applied(self, step: Step, scale: float = 1.0) -> Iterator[dict[Tensor, Tensor]]:
        """Hold the weights at theta + scale * eps inside the block, where gradients start anew; yield {parameter: theta}."""
        with self.moved(step.params, partial(self._displace, step, scale)) as theta:
            self.where = AT_PERTURBED
            step.directions = []  # frees them, gradients of pass 1 mostly, before pass 2 allocates its own
            self.start_gradients(step.earlier)
            yield theta

    def moved(self, params: Iterable[Tensor], move: Callable[[], None]) -> contextlib.AbstractContextManager[dict[Tensor, Tensor]]:
        """Hold the weights where `move` puts them inside the block; copies of theta go to memory that is kept from step to step."""
        return moved(self.model, params, move, self._theta)

    @staticmethod
    def _displace(step: Step, scale: float) -> None:
        for rho in set(step.radii.values()):
            those = [i for i, p in enumerate(step.params) if step.radii[p] == rho]
            if those and rho:
                params, directions = [step.params[i] for i in those], [step.directions[i] for i in those]
                torch._foreach_add_(params, directions, alpha=scale * rho / step.size)

    @staticmethod
    def length(step: Step) -> float:
        """|eps|, over all radii."""
        parts = []
        for rho in set(step.radii.values()):
            those = [d for p, d in zip(step.params, step.directions, strict=True) if step.radii[p] == rho]
            parts.append(rho * norm(those, fast=True) / step.size)
        return math.hypot(*parts)

    def start_gradients(self, earlier: dict[Tensor, Tensor]) -> None:
        """Set .grad for a pass to add to: empty, or what earlier micro-batches left."""
        for p in self.model.parameters():
            p.grad = earlier.get(p)

    def require_finite(self, value: float, what: str, where: str | None = None) -> None:
        """Raise FloatingPointError, naming step and pass, and of gradients the first bad one, unless `value` is finite."""
        if not math.isfinite(value):
            bad = self._first_bad() if what == "gradient" else ""
            raise FloatingPointError(
                f"step {self.steps}, {where or self.where}: the {what} is not finite ({value}{bad}); the weights are unchanged. "
                "A smaller rho or learning rate, or a longer warm-up, is the usual remedy"
            )

    def _first_bad(self) -> str:
        for name, p in unwrapped(self.model).named_parameters():
            if p.grad is not None and not bool(local(p.grad).isfinite().all()):
                return f", first in {name}"
        return ""

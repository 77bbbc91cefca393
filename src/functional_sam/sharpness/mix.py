"""What some methods do with both gradients: g at theta (base) and g' at theta' (now in .grad).

A Mix may also set the radius (tram) or let a step go without its own perturbed pass (looksam).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from functional_sam.sharpness.backward import SharpnessAware, Step

Gradients = dict[Tensor, Tensor]


class Mix:
    """Keep g' as it is. Subclasses change what they need."""

    radius = 1.0  # factor on rho

    def __init__(self, sharpness: "SharpnessAware"):
        self.sharpness, self.options = sharpness, sharpness.options

    def prepare(self, step: "Step") -> bool:
        """Called before pass 1; False lets this step go without a perturbed pass."""
        return True

    def combine(self, base: Gradients) -> None:
        """Called with g after the perturbed pass; the result goes to .grad."""

    def reuse(self) -> None:
        """Called after pass 1 of a step without a perturbed pass."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _both(self, base: Gradients) -> tuple[list[Tensor], list[Tensor]]:
        """(g, g') as lists over the parameters that have both."""
        pairs = [(g, p.grad) for p, g in base.items() if p.grad is not None]
        return [g for g, _ in pairs], [there for _, there in pairs]


class GradientNormPenalty(Mix):
    """GNP: (1 - alpha) g + alpha g'; alpha = 1 is SAM. Source: Zhao et al. 2022 (r 0.1, alpha 0.8)."""

    def combine(self, base: Gradients) -> None:
        g, there = self._both(base)
        torch._foreach_mul_(there, self.options["alpha"])
        torch._foreach_add_(there, g, alpha=1.0 - self.options["alpha"])


MIXES: dict[str, type[Mix]] = {"gnp": GradientNormPenalty}

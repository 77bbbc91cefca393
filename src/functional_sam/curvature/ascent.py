"""Directions d of ascent along which the curvature is asked for: those that training takes (functional_sam.ascents).

Only eps = d / |d| matters here, so methods that differ in the length of the step alone, as normalize_by of the preconditioned
ascent, are one direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from functional_sam.ascents import ASCENTS
from functional_sam.errors import UserError
from functional_sam.moments import owners, require_state

Ascent = str | Sequence[Tensor]


def direction(
    ascent: Ascent,
    g: list[Tensor],
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer | None = None,
    eta: float | None = None,
) -> Sequence[Tensor]:
    """d for one ascent.

        "gradient"         g (SAM)
        "adam"             P g = g / (sqrt(v_hat) + e), v_hat the second moment of the optimizer (Adam's family, RMSprop,
                           Adagrad), e its own; a parameter without one stays; while none has one, d = g
        "adaptive"         T^2 g, T = |theta| + eta for tensors of two or more dimensions, 1 for others (ASAM); eta 0.01
        "fisher"           g / (1 + eta g^2), by the damped diagonal of the batch's empirical Fisher (Fisher-SAM); eta 1
        "momentum"         the first moment of the optimizer; a parameter without one stays
        a list of tensors  itself

    Raises UserError for an unknown ascent, and for "adam" or "momentum" without an optimizer that holds all parameters
    and keeps that state.
    """
    if not isinstance(ascent, str):
        return ascent
    if ascent not in ASCENTS:
        known = ", ".join(ASCENTS)
        raise UserError(f"ascent={ascent!r}: choose one of {known}, or give a list of tensors shaped like the parameters")
    if ascent in ("adam", "momentum"):
        require_holder(parameters, optimizer, f"ascent={ascent!r}")
        assert optimizer is not None
        require_state(ascent, optimizer)
    options = {} if eta is None else {"eta": eta}
    with torch.no_grad():
        d, _ = ASCENTS[ascent](parameters, g, optimizer=optimizer, consume=False, **options)
    return [d_i.to(p.dtype) for d_i, p in zip(d, parameters, strict=True)]


def require_holder(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None, asked: str) -> None:
    """Raise UserError unless there is an optimizer that holds all of the parameters."""
    if optimizer is None:
        raise UserError(f"{asked} needs optimizer=, the one that trains the model")
    held = owners(optimizer)
    if not all(p in held for p in parameters):
        raise UserError(f"{asked} needs an optimizer that holds every trainable parameter of the model")

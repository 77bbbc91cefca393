"""Activation checkpointing: second derivatives go through it, or it is refused; never a correction of zero."""

import pytest
import torch
from conftest import adamw, gradients, make_model
from test_sharpness_oracle import close
from torch.utils.checkpoint import checkpoint

from functional_sam import SharpnessAware, UserError


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("phi", [0.0, 45.0, 90.0])
def test_second_derivatives_through_checkpointing(phi, head):
    """As peft has it: a frozen trunk, whose output is made to require a gradient, and what is trained in a checkpointed block.

    With use_reentrant=True autograd.grad does not enter the block: the correction would be zero there.
    """

    class Frozen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.block, self.head = torch.nn.Linear(4, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)
            self.trunk.requires_grad_(False)
            self.head.requires_grad_(head)
            self.unused, self.how = torch.nn.Parameter(torch.ones(2)), {}

        def forward(self, x):
            h, block = self.trunk(x).requires_grad_(), lambda h: self.block(h).tanh()
            h = checkpoint(block, h, **self.how) if self.how else block(h)
            return self.head(h) + 0.0 * self.unused.sum()

    model = make_model(Frozen)
    batch = (torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,)))
    sharpness = SharpnessAware(model, adamw(model), "angle-sam", rho=0.3, phi=phi)
    sharpness.backward([batch])
    expected = gradients(model)
    for derivative, reentrant in (("exact", False), ("difference", True)):
        model.how = {"use_reentrant": reentrant}
        SharpnessAware(model, adamw(model), "angle-sam", rho=0.3, phi=phi, derivative=derivative, step=1e-6).backward([batch])
        close(gradients(model), expected, 1e-5)
    model.zero_grad()
    with pytest.raises(UserError, match=r"block.weight has a gradient and no second derivative.*use_reentrant=False.*difference"):
        sharpness.backward([batch])

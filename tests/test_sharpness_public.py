"""Against the SAM and GSAM of a public library, where the formulas agree (its base optimizer the same AdamW)."""

import pytest
import pytorch_optimizer as public
import torch
from conftest import make_batch, make_model
from torch.nn import functional as F

from functional_sam import SharpnessAware

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-9, "weight_decay": 0.1}


def public_steps(model, optimizer, steps):
    for step in range(steps):
        inputs, targets = make_batch(seed=step)

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)


def our_steps(model, method, steps, **options):
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    sharpness = SharpnessAware(model, optimizer, method, **options)
    for step in range(steps):
        sharpness.backward([make_batch(seed=step)])
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rho", [0.05, 0.5])
def test_sam_takes_the_same_steps(rho):
    """Five steps end at the same weights, up to the public one's 1e-12 in the norm and its restoring by copy."""
    ours, theirs = make_model(), make_model()
    our_steps(ours, "sam", 5, rho=rho)
    public_steps(theirs, public.SAM(theirs.parameters(), torch.optim.AdamW, rho=rho, **SETTINGS), 5)
    start = make_model()
    for a, b, c in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        assert not torch.allclose(a, c)


def test_gsam_gradient_is_the_same():
    """One GSAM gradient: g' minus alpha times the part of g orthogonal to g'."""
    ours, theirs = make_model(), make_model()
    inputs, targets = make_batch()
    SharpnessAware(
        ours, torch.optim.AdamW(ours.parameters(), **SETTINGS), "gsam", rho=0.3, alpha=0.4, rho_schedule="constant"
    ).backward([(inputs, targets)])
    base = torch.optim.SGD(theirs.parameters(), lr=1.0)
    schedule = type("Constant", (), {"step": lambda self: 0.3})()
    optimizer = public.GSAM(theirs.parameters(), base, theirs, schedule, alpha=0.4)
    before = [p.detach().clone() for p in theirs.parameters()]
    optimizer.set_closure(lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()), inputs, targets)
    optimizer.step()
    for p, b, q in zip(ours.parameters(), before, theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, b - q.detach(), rtol=1e-6, atol=1e-8)

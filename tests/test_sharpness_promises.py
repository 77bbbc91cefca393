"""What a second adversarial user got without a word: right now, or refused with the way out; what is done rightly goes on."""

import numpy as np
import pytest
import torch
from test_sharpness_silent import batch, close, flat, mlp, sam_by_hand, sgd
from torch import nn
from torch.nn import functional as F

from functional_sam import SharpnessAware, UserError
from functional_sam.curvature import CurvatureProducts


def summed(z, t):
    return F.cross_entropy(z, t, reduction="sum"), len(t)


# ---------------------------------------------------------------------- functions of the caller's own


class Kernel(torch.autograd.Function):
    """tanh, computed outside of autograd in both directions, as Triton and CUDA kernels are."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * (1 - np.tanh(x.detach().numpy()) ** 2))


class Followed(Kernel):
    """The same, with a backward that autograd follows."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh().square())


class Injected(torch.autograd.Function):
    """The identity, and a gradient of `scale` for an auxiliary loss, as Megatron's MoE layers have."""

    @staticmethod
    def forward(ctx, z, auxiliary):
        return z.view_as(z)

    @staticmethod
    def backward(ctx, g):
        return g, torch.full((), 0.1, dtype=g.dtype)


class LossKernel(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in forward, and scaled outside of autograd."""

    @staticmethod
    def forward(ctx, z, t):
        ctx.save_for_backward(z.softmax(-1) - F.one_hot(t, z.shape[-1]))
        return F.cross_entropy(z, t, reduction="sum")

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0].detach() * g.item(), None


class LinearLoss(torch.autograd.Function):
    """A loss linear in the logits, whose gradient rightly does not depend on them."""

    @staticmethod
    def forward(ctx, z, t):
        ctx.save_for_backward(F.one_hot(t, z.shape[-1]))
        return (z * ctx.to_save[0]).sum()

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g, None


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.net, self.function = mlp(), function

    def forward(self, x):
        return self.net[2](self.function(self.net[0](x)))


class WithAuxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return Injected.apply(self.net(x), self.net[0].weight.square().sum())


OUTSIDE = r"Kernel, a torch.autograd.Function, computes its backward outside of autograd"


@pytest.mark.parametrize("phi", [0.0, 45.0, 90.0])
def test_second_derivatives_of_a_kernel_outside_of_autograd_are_refused(phi):
    def backward(model, **words):
        SharpnessAware(model, sgd(model), "angle-sam", rho=0.5, phi=phi, **words).backward([batch()])
        return flat(model)

    with pytest.raises(UserError, match=OUTSIDE):
        backward(Applied(Kernel.apply))
    with pytest.raises(UserError, match=OUTSIDE):
        backward(mlp(), loss_fn=lambda z, t: (LossKernel.apply(z, t), len(t)))
    wanted = backward(Applied(torch.tanh))
    assert torch.allclose(backward(Applied(Followed.apply)), wanted, rtol=1e-12, atol=1e-14)
    close_to = backward(Applied(Kernel.apply), derivative="difference", step=1e-5)
    assert torch.allclose(close_to, wanted, rtol=1e-3, atol=1e-5)
    linear = backward(mlp(), loss_fn=lambda z, t: (LinearLoss.apply(z, t), len(t)))
    assert torch.equal(linear, backward(mlp(), loss_fn=lambda z, t: ((z * F.one_hot(t, 4)).sum(), len(t))))


def test_second_derivatives_of_an_injected_auxiliary_loss_are_refused():
    """The derivative of u goes through the same backward, which injects the term's gradient once more."""
    model = WithAuxiliary()
    with pytest.raises(UserError, match=r"Injected, a torch.autograd.Function, .* or adds a constant"):
        SharpnessAware(model, sgd(model), "penalty-sam", rho=0.3).backward([batch()])
    with pytest.raises(UserError, match=r"Injected, a torch.autograd.Function, .* or adds a constant"):
        CurvatureProducts(WithAuxiliary(), [batch()]).hessian([torch.ones_like(p) for p in model.parameters()])


@pytest.mark.parametrize("what", ["hessian", "gauss_newton", "functional"])
def test_curvature_of_a_kernel_outside_of_autograd_is_refused(what):
    v = [torch.ones_like(p) for p in mlp().parameters()]

    def product(model, **words):
        return getattr(CurvatureProducts(model, [batch()], **words), what)(v)

    with pytest.raises(UserError, match=OUTSIDE):
        product(Applied(Kernel.apply))
    with pytest.raises(UserError, match=OUTSIDE):
        product(mlp(), loss_fn=lambda z, t: (LossKernel.apply(z, t), len(t)))
    wanted = product(Applied(torch.tanh))
    for other in (product(Applied(Followed.apply)), product(Applied(torch.tanh), loss_fn=summed)):
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(other, wanted, strict=True))


def test_a_graph_whose_kernels_are_watched_is_freed():
    import gc
    import weakref

    model = Applied(Followed.apply)
    nodes = []
    model.net[2].register_forward_hook(lambda module, given, z: nodes.append(weakref.ref(given[0].grad_fn)))
    gc.disable()
    try:
        SharpnessAware(model, sgd(model), "penalty-sam", rho=0.3).backward([batch()])
        assert nodes
        assert all(node() is None for node in nodes)
    finally:
        gc.enable()

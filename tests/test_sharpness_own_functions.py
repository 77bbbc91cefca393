"""Functions and hooks of the caller's own: second derivatives and differences through them are right, or refused."""

import numpy as np
import pytest
import torch
from test_sharpness_silent import batch, close, flat, mlp, sgd
from torch import nn
from torch.nn import functional as F

from functional_sam import SharpnessAware, UserError
from functional_sam.curvature import CurvatureProducts

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
    for other in (
        product(Applied(Followed.apply)),
        product(Applied(torch.tanh), loss_fn=lambda z, t: (F.cross_entropy(z, t, reduction="sum"), len(t))),
    ):
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


# ---------------------------------------------------------------------- differences


def with_decay():
    model = mlp()
    for p in model.parameters():
        p.register_hook(lambda g, p=p: g + 0.05 * p.detach())
    return model


def with_scaled():
    model = mlp()
    model[0].weight.register_hook(lambda g: 2 * g)
    return model


class Clipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        h = self.net[1](self.net[0](x))
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return self.net[2](h)


class Normalising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.view_as(z)

    @staticmethod
    def backward(ctx, g):
        return g / g.norm()


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return Normalising.apply(self.net(x))


@pytest.mark.parametrize("phi", [0.0, 30.0, 90.0])
def test_parts_by_difference_need_a_backward_linear_in_the_cotangent(phi):
    words = {"rho": 0.1, "phi": phi, "derivative": "difference", "step": 1e-5}
    for build in (with_decay, Clipped, Normalised, WithAuxiliary):
        model = build()
        with pytest.raises(UserError, match=r"phi other than 45 needs a backward that is linear in u"):
            SharpnessAware(model, sgd(model), "angle-sam", **words).backward([batch()])
    model = with_scaled()
    SharpnessAware(model, sgd(model), "angle-sam", **words).backward([batch()], measure_dose=True)


def test_the_difference_of_gradients_is_of_any_hook():
    """phi = 45 with a hook that adds decay: H eps of the loss with its decay, eps along the gradient of both."""
    model, (x, y) = with_decay(), batch()
    SharpnessAware(model, sgd(model), "penalty-sam", rho=0.1, derivative="difference", step=1e-6).backward([(x, y)])
    plain = mlp()
    params = list(plain.parameters())
    decay = sum(0.025 * p.square().sum() for p in params)
    g = torch.autograd.grad(F.cross_entropy(plain(x), y) + decay, params, create_graph=True)
    size = torch.cat([p.flatten() for p in g]).norm().detach()
    Heps = torch.autograd.grad(g, params, [0.1 * p.detach() / size for p in g])
    close(model, [a.detach() + b for a, b in zip(g, Heps, strict=True)], 1e-6)


def test_looking_at_it_changes_no_number_of_the_step():
    """Dropout, running statistics and the random numbers after it are those of a step that is not looked at."""
    found = []
    for first in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.3), nn.Linear(7, 4)).double()
        sharpness = SharpnessAware(model, sgd(model), "angle-sam", phi=20.0, derivative="difference")
        if not first:
            sharpness._passes.watched = None
        torch.manual_seed(1)
        sharpness.backward([batch(), batch(2)])
        found.append((flat(model), model[1].running_mean.clone(), torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------------- what exact second derivatives would go through twice


def deep():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def halved(module, given, incoming):
    return (given[0] / 2,)


@pytest.mark.parametrize("phi", [0.0, 45.0, 90.0])
def test_a_modules_hook_that_changes_a_gradient_is_refused(phi):
    def backward(hook, **words):
        model = deep()
        if hook is not None:
            model[2].register_full_backward_hook(hook)
        SharpnessAware(model, sgd(model), "angle-sam", rho=0.5, phi=phi, **words).backward([batch()])
        return flat(model)

    with pytest.raises(UserError, match="full backward hook changes a gradient"):
        backward(halved)
    torch.testing.assert_close(backward(lambda *_: None), backward(None), rtol=1e-12, atol=1e-14)
    assert backward(halved, derivative="difference", step=1e-5).isfinite().all()


@pytest.mark.parametrize("what", ["hessian", "gauss_newton", "functional"])
def test_curvature_through_a_modules_hook_is_refused(what):
    model = deep()
    v = [torch.ones_like(p) for p in model.parameters()]
    wanted = getattr(CurvatureProducts(model, [batch()]), what)(v)
    handle = model[2].register_full_backward_hook(lambda *_: None)
    for mine, before in zip(getattr(CurvatureProducts(model, [batch()]), what)(v), wanted, strict=True):
        torch.testing.assert_close(mine, before, rtol=1e-12, atol=1e-14)
    handle.remove()
    model[2].register_full_backward_hook(halved)
    with pytest.raises(UserError, match="full backward hook changes a gradient"):
        getattr(CurvatureProducts(model, [batch()]), what)(v)


def test_hooks_on_parameters_are_refused_whenever_they_come():
    def twice(p):
        p.grad.mul_(2)

    model = deep()
    sharpness = SharpnessAware(model, sgd(model), "penalty-sam", rho=0.5)
    sharpness.backward([batch()])
    model.zero_grad()
    handle = model[0].weight.register_post_accumulate_grad_hook(twice)
    for call in (lambda: SharpnessAware(model, sgd(model), "penalty-sam"), lambda: sharpness.backward([batch()])):
        with pytest.raises(UserError, match=r"0.weight has a hook on its gradient"):
            call()
    handle.remove()
    sharpness.backward([batch()])


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_in_training_is_no_constant(norm):
    model = nn.Sequential(norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 4)).double()
    with pytest.raises(UserError, match=r"spectral_norm at 0.* in training mode .* derivative='difference'"):
        SharpnessAware(model, sgd(model), "penalty-sam", rho=0.5).backward([batch()])
    SharpnessAware(model, sgd(model), "penalty-sam", rho=0.5, derivative="difference").backward([batch()])
    model.zero_grad()
    model[0].eval()
    SharpnessAware(model.eval(), sgd(model), "penalty-sam", rho=0.5).backward([batch()])


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 5).double(), nn.Linear(5, 4).double()

    def forward(self, ids):
        return self.head(self.bag(ids).tanh())


def test_derivatives_that_pytorch_lacks_are_named_with_the_way_out():
    model, given = Bag(), [(torch.arange(6).view(3, 2), torch.arange(3))]
    v = [torch.ones_like(p) for p in model.parameters()]
    missing = r"_embedding_bag_backward' is not implemented.*derivative='difference', method='difference'"
    with pytest.raises(UserError, match=missing):
        SharpnessAware(model, sgd(model), "penalty-sam", rho=0.5).backward(given)
    with pytest.raises(UserError, match=missing):
        CurvatureProducts(model, given).hessian(v)
    SharpnessAware(model, sgd(model), "penalty-sam", rho=0.5, derivative="difference").backward(given)
    CurvatureProducts(model, given, method="difference").hessian(v)

"""Counts, means, groups and states of the caller's own that were wrong without a word: right now, or refused with the way out."""

import pytest
import torch
from test_sharpness_silent import batch, close, flat, mlp, sam_by_hand, sgd
from torch import nn
from torch.nn import functional as F

from functional_sam import SharpnessAware, UserError
from functional_sam.curvature import CurvatureProducts


def summed(z, t):
    return F.cross_entropy(z, t, reduction="sum"), len(t)


# ---------------------------------------------------------------------- counts and means


def focal(z, t):
    each = F.cross_entropy(z, t, reduction="none")
    weight = (1 - (-each).exp()).square()
    return (weight * each).sum(), weight.sum()


def hard(z, t):
    each = F.cross_entropy(z, t, reduction="none")
    kept = each > 1.35
    return each[kept].sum(), kept.sum()


@pytest.mark.parametrize("method", ["plain", "sam", "functional-sam", "logit-sam", "angle-sam"])
def test_a_count_with_a_gradient_is_refused(method):
    model = mlp()
    with pytest.raises(UserError, match=r"a count that depends on the logits \(focal weights\)"):
        SharpnessAware(model, sgd(model), method, loss_fn=focal).backward([batch()])
    model = mlp()
    numbered = SharpnessAware(model, sgd(model), method, loss_fn=lambda z, t: (focal(z, t)[0], len(t)))
    numbered.backward([batch()])


@pytest.mark.parametrize("method", ["sam", "logit-sam", "gsam", "asam"])
def test_a_count_of_other_weights_is_refused_when_it_comes(method):
    """Hard examples: in the first step the same at both weights, later not."""
    model, (x, y) = mlp(), batch()
    radii = [1e-6, 5.0]
    words = {"rho_schedule": "constant"} if method == "gsam" else {}
    sharpness = SharpnessAware(model, sgd(model), method, rho=radii.__getitem__, loss_fn=hard, **words)
    sharpness.backward([(x, y)])
    model.zero_grad()
    with pytest.raises(UserError, match=r"counted other targets in a later pass"):
        sharpness.backward([(x, y)])
    assert all(p.grad is None for p in model.parameters())


def test_hard_examples_of_theta_are_right_where_only_theta_counts():
    """functional-sam takes u, and so the count, at theta alone."""
    model, (x, y) = mlp(), batch()
    SharpnessAware(model, sgd(model), "functional-sam", rho=2.0, loss_fn=hard).backward([(x, y)])
    found, model = flat(model), mlp()
    z = model(x)
    mask = F.cross_entropy(z, y, reduction="none") > 1.35
    masked = lambda z, t: (F.cross_entropy(z[mask], t[mask], reduction="sum"), mask.sum())  # noqa: E731
    SharpnessAware(model, sgd(model), "functional-sam", rho=2.0, loss_fn=masked).backward([(x, y)])
    assert 0 < int(mask.sum()) < len(y)
    assert torch.equal(found, flat(model))


W = torch.tensor([1.0, 5.0, 0.2, 2.0], dtype=torch.float64)


class Weighted(nn.Module):
    """nn.CrossEntropyLoss(weight=W), whose weights are a buffer."""

    def __init__(self, reduction):
        super().__init__()
        self.criterion, self.reduction = nn.CrossEntropyLoss(weight=W, reduction=reduction), reduction
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, t):
        self.calls += 1
        return self.criterion(z, t), W[t].sum() if self.reduction == "sum" else len(t)


MEANS = {
    "class weights": lambda z, t: (F.cross_entropy(z, t, weight=W), len(t)),
    "class weights, their count": lambda z, t: (F.cross_entropy(z, t, weight=W), W[t].sum()),
    "smoothed": lambda z, t: (F.cross_entropy(z, t, label_smoothing=0.1), len(t)),
    "squares": lambda z, t: (F.mse_loss(z, F.one_hot(t, 4).double()), t.numel()),
    "a module with buffers": Weighted("mean"),
}


def infonce(z, t):
    """In-batch negatives: no sum over rows, and no mean of them either."""
    n = F.normalize(z, dim=-1)
    other = n @ n.T - 1e9 * torch.eye(len(z), dtype=z.dtype)
    return F.cross_entropy(other, torch.arange(len(z)) ^ 1, reduction="sum"), len(z)


def barlow(z, t):
    """A statistic of the batch, which its rows twice do not change: the mean of one number, counted as one."""
    n = (z - z.mean(0)) / z.std(0, unbiased=False)
    return (n.T @ n / len(z) - torch.eye(4, dtype=z.dtype)).square().sum(), 1


SUMS = {
    "class weights": lambda z, t: (F.cross_entropy(z, t, weight=W, reduction="sum"), W[t].sum()),
    "a hinge of zero": lambda z, t: ((z - 1e3).relu().sum() + 0.0 * z.sum(), len(t)),
    "contrastive": infonce,
    "a statistic": barlow,
    "a module with buffers": Weighted("sum"),
    "fixed": lambda z, t: (F.cross_entropy(z, t), 1),
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_of_any_weights_is_refused(name):
    with pytest.raises(UserError, match=r"returned a mean .* and the count"):
        SharpnessAware(model := mlp(), sgd(model), "plain", loss_fn=MEANS[name]).backward([batch()])
    with pytest.raises(UserError, match=r"returned a mean .* and the count"):
        CurvatureProducts(mlp(), [batch()], loss_fn=MEANS[name]).gradient()


def test_a_mean_of_targets_in_a_tree_is_refused():
    x, y = batch()
    weight = torch.ones(6, dtype=torch.float64)
    for targets, take in (((y, weight), lambda t: t), ({"y": y, "w": weight, "name": "a"}, lambda t: (t["y"], t["w"]))):

        def mean(z, t, take=take):
            wanted, w = take(t)
            return (F.cross_entropy(z, wanted, reduction="none") * w).mean(), len(wanted)

        def total(z, t, mean=mean):
            value, n = mean(z, t)
            return value * n, n

        model = mlp()
        with pytest.raises(UserError, match=r"returned a mean .* and the count 6"):
            SharpnessAware(model, sgd(model), "sam", loss_fn=mean).backward([(x, targets)])
        model = mlp()
        SharpnessAware(model, sgd(model), "sam", rho=0.3, loss_fn=total).backward([(x, targets)])
        close(model, sam_by_hand(model, lambda model=model: F.cross_entropy(model(x), y), 0.3))


@pytest.mark.parametrize("name", SUMS)
def test_sums_and_losses_of_the_batch_are_taken(name):
    loss_fn, model = SUMS[name], mlp()
    SharpnessAware(model, sgd(model), "plain", loss_fn=loss_fn).backward([batch()])
    if name == "a module with buffers":
        assert float(loss_fn.calls) == 1.0


# ---------------------------------------------------------------------- set-ups


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.complex64])
def test_a_dtype_that_cannot_hold_u_is_refused(dtype):
    with pytest.raises(UserError, match=r"keep_dtype=torch.*1 / \(number of targets\)"):
        SharpnessAware(model := mlp(), sgd(model), "functional-sam", keep_dtype=dtype)
    for right in (torch.bfloat16, torch.float32, torch.float64):
        SharpnessAware(model := mlp(), sgd(model), "functional-sam", keep_dtype=right).backward([batch()])


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_radius_of_a_group_that_comes_later_is_looked_at(rho):
    model = mlp()
    optimizer = sgd(model)
    sharpness = SharpnessAware(model, optimizer, "sam", rho=0.1)
    optimizer.param_groups[0]["rho"] = rho
    with pytest.raises(UserError, match=rf"rho={rho!r} in a parameter group"):
        sharpness.backward([batch()])
    optimizer.param_groups[0]["rho"] = 0.3
    sharpness.backward([batch()])
    x, y = batch()
    close(model, sam_by_hand(model, lambda: F.cross_entropy(model(x), y), 0.3))


def grouped(model, **second):
    groups = [{"params": model[0].parameters(), "momentum": 0.9}, {"params": model[2].parameters(), "momentum": 0.0, **second}]
    return torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("method", ["momentum-sam", "momentum-functional-sam"])
def test_a_group_without_momentum_is_refused_where_momentum_is_the_ascent(method):
    def train(optimizer, **words):
        sharpness = SharpnessAware(model, optimizer, method, rho=0.3, **words)
        for _ in range(2):
            sharpness.backward([batch()])
            optimizer.step()
            optimizer.zero_grad()

    model = mlp()
    with pytest.raises(UserError, match=r"parameter group 1 of SGD has momentum=0.0: it would never be perturbed"):
        train(grouped(model))
    train(grouped(model, rho=0.0))
    train(grouped(model), subset=lambda name, p: name.startswith("0"))
    unused = mlp()
    unused.register_parameter("extra", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    model = unused
    train(torch.optim.SGD([{"params": list(unused.parameters())[1:]}, {"params": [unused.extra]}], lr=0.1, momentum=0.9))


def test_two_parameters_in_the_same_memory_are_refused():
    def tied(share):
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)).double()
        model[1].weight = share(model[0].weight)
        return model

    for share in (lambda w: nn.Parameter(w.data), lambda w: nn.Parameter(w.data.view(-1)[:].view(7, 4))):
        model = tied(share)
        with pytest.raises(UserError, match=r"0.weight and 1.weight are two Parameters in the same memory"):
            SharpnessAware(model, sgd(model), "sam")
        SharpnessAware(model, sgd(model), "plain")
    SharpnessAware(model := tied(lambda w: w), sgd(model), "sam")
    whole = torch.randn(40, dtype=torch.float64)  # one buffer for all, as of flattened weights of an LSTM
    model = nn.ParameterList([nn.Parameter(whole[:20].view(4, 5)), nn.Parameter(whole[20:].view(5, 4))])
    SharpnessAware(model, sgd(model), "sam")
    columns = torch.randn(4, 6)
    model = nn.ParameterList([nn.Parameter(columns[:, :3]), nn.Parameter(columns[:, 3:])])
    SharpnessAware(model, sgd(model), "sam")


def test_a_grad_scaler_from_the_second_step_on_is_refused():
    model = mlp().float()
    optimizer = sgd(model)
    sharpness, scaler = SharpnessAware(model, optimizer, "sam"), torch.amp.GradScaler("cpu")
    x, y = batch()
    sharpness.backward([(x.float(), y)])
    optimizer.step()
    optimizer.zero_grad()
    sharpness.backward([(x.float(), y)])
    scaler.scale(torch.ones(()))
    with pytest.raises(UserError, match="this step is taken by a GradScaler"):
        scaler.step(optimizer)


class Momentum(nn.Module):
    """As in the public MoCo: forward moves the key encoder, which nobody trains."""

    def __init__(self, how):
        super().__init__()
        self.query, self.key, self.how = mlp(), mlp().requires_grad_(False), how
        self.key[0].weight.data += 0.3

    @torch.no_grad()
    def forward_key(self):
        for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
            if self.how == "assigned":
                k.data = 0.9 * k.data + 0.1 * q.data
            elif self.how == "data":
                k.data.mul_(0.9).add_(q.data, alpha=0.1)
            elif self.how == "in place":
                k.mul_(0.9).add_(q, alpha=0.1)
            elif self.how == "in another order":
                k.copy_(k.roll(1, 0))

    def forward(self, x):
        self.forward_key()
        return self.query(x) + self.key(x)


@pytest.mark.parametrize("how", ["assigned", "data", "in place", "in another order"])
@pytest.mark.parametrize("method", ["sam", "functional-sam", "logit-sam", "random-sam", "gsam"])
def test_parameters_that_forward_moves_are_refused(method, how):
    model = Momentum(how)
    with pytest.raises(UserError, match=r"key.0.weight, which the optimizer does not train, moved during backward"):
        SharpnessAware(model, sgd(model.query), method).backward([batch()])
    model = Momentum(how)
    SharpnessAware(model, sgd(model.query), "plain").backward([batch()])
    still = Momentum("not at all")
    SharpnessAware(still, sgd(still.query), method).backward([batch()])


class Centred(nn.Module):
    """DINO's loss: a running centre of the logits, read and then moved by every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.tensor([1.0, 0.3, 0.0, -0.5], dtype=torch.float64))

    def forward(self, z, t):
        total = F.cross_entropy(z - self.centre, t, reduction="sum")
        self.centre.copy_(0.5 * self.centre + 0.5 * z.detach().mean(0))
        return total, len(t)


CENTRED = [("plain", {}), ("sam", {}), ("functional-sam", {}), ("logit-sam", {}), ("gsam", {"rho_schedule": "constant"})]
CENTRED += [("angle-sam", {"phi": phi, **words}) for phi in (30.0, 45.0) for words in ({}, {"derivative": "difference"})]


@pytest.mark.parametrize(("method", "words"), [*CENTRED, ("sam", {"ascent_steps": 2})])
def test_a_state_of_the_loss_is_that_of_the_first_pass_in_all_of_them(method, words):
    """The gradient is that of the loss with its centre held, and the centre is moved once."""
    model, loss, (x, y) = mlp(), Centred(), batch()
    before, z = loss.centre.clone(), model(x).detach()
    sharpness = SharpnessAware(model, sgd(model), method, rho=1.0, loss_fn=loss, **words)
    sharpness.check([(x, y)])
    assert torch.equal(loss.centre, before)
    sharpness.backward([(x, y)], measure_dose=True)
    assert torch.allclose(loss.centre, 0.5 * before + 0.5 * z.mean(0), rtol=1e-14)
    held = mlp()
    fixed = SharpnessAware(held, sgd(held), method, rho=1.0, loss_fn=lambda z, t: summed(z - before, t), **words)
    fixed.backward([(x, y)], measure_dose=True)
    close(model, [p.grad for p in held.parameters()])
    assert sharpness.dose == pytest.approx(fixed.dose, rel=1e-12)


@pytest.mark.parametrize("path", ["sam", "functional", "logit"])
def test_a_state_of_the_loss_moves_once_where_there_is_no_first_pass(path):
    model, loss = mlp(), Centred()
    sharpness = SharpnessAware(model, sgd(model), "random-sam", path=path, rho=1e-9, loss_fn=loss)
    before, z = loss.centre.clone(), model(batch()[0]).detach()
    sharpness.backward([batch()])
    assert torch.allclose(loss.centre, 0.5 * before + 0.5 * z.mean(0), rtol=1e-6)

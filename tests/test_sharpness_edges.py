"""The edges: what would be wrong without a word is right, or refused with the value, the place and the way out."""

import copy
import functools
import random
import warnings

import numpy as np
import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, parts_of, warmed_up
from test_sharpness_oracle import close, theta_of
from torch.nn import functional as F

from functional_sam import METHODS, SharpnessAware, UserError


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


# ---------------------------------------------------------------------- model and optimizer


def test_parameters_outside_the_model_are_refused():
    """A head that forward applies: its gradient would be g + g', never cleared."""
    model, head = make_model(), torch.nn.Linear(11, 3).double()
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()])
    with pytest.raises(UserError, match=r"2 of the optimizer's parameters are not in TinyModel \(the first has shape \[3, 11\]\)"):
        SharpnessAware(model, optimizer, "sam", forward=lambda m, x: head(m(x)))


def test_an_optimizer_of_another_model():
    model = make_model()
    with pytest.raises(UserError, match="optimizer is of another model"):
        SharpnessAware(copy.deepcopy(model), adamw(model), "sam")


def test_trainable_parameters_that_nobody_trains_are_named_once():
    model = make_model()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if not n.startswith("norm")])
    with pytest.warns(UserWarning, match=r"2 trainable parameters of TinyModel are not the optimizer's \(norm.weight, norm.bias\)"):
        sharpness = SharpnessAware(model, optimizer, "sam")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharpness.backward([make_batch()])
        model.norm.requires_grad_(False)
        SharpnessAware(model, optimizer, "sam")


def test_nothing_to_train_and_no_memory():
    model = make_model()
    optimizer = adamw(model)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of TinyModel requires a gradient"):
        SharpnessAware(model, optimizer, "sam")
    meta = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(UserError, match="parameter weight of Linear is on the meta device"):
        SharpnessAware(meta, adamw(meta), "sam")


@pytest.mark.parametrize("method", ["adamw", "sam"])
def test_sparse_gradients_are_refused(method):
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4, sparse=True), torch.nn.Linear(4, 3))
    with pytest.raises(UserError, match=r"Embedding\(sparse=True\)"):
        SharpnessAware(model, sgd(model), method)

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = torch.nn.Parameter(torch.randn(7, 4)), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.head(F.embedding(x, self.table, sparse=True))

    hidden = Hidden()
    with pytest.raises(UserError, match="sparse gradients are not supported"):
        SharpnessAware(hidden, sgd(hidden), method).backward([(torch.tensor([1, 2]), torch.tensor([0, 1]))])


def test_sharded_models_of_other_kinds_are_refused():
    """By class: FSDP1 has one flat shard a rank, whose norm is not the gradient's; its own tests need several processes."""

    class FullyShardedDataParallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    class DeepSpeedEngine(FullyShardedDataParallel):
        pass

    model = make_model()
    for kind in (FullyShardedDataParallel, DeepSpeedEngine):
        with pytest.raises(UserError, match="fully_shard"):
            SharpnessAware(kind(model), adamw(model), "sam")
        with pytest.raises(UserError, match="fully_shard"):
            SharpnessAware(torch.nn.Sequential(kind(model)), adamw(model), "sam")


class Complex(torch.nn.Module):
    """A complex layer, or the same one held as (re, im)."""

    def __init__(self, pairs):
        super().__init__()
        torch.manual_seed(3)
        weight = torch.randn(5, 4, dtype=torch.complex128)
        self.weight = torch.nn.Parameter(torch.view_as_real(weight) if pairs else weight)
        self.head, self.pairs = torch.nn.Linear(5, 3).double(), pairs

    def forward(self, x):
        weight = torch.view_as_complex(self.weight) if self.pairs else self.weight
        return self.head((x.to(weight.dtype) @ weight.T).abs().tanh())


@pytest.mark.parametrize("method", METHODS)
def test_complex_parameters_equal_their_pairs_or_are_refused(method):
    batches = [(torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))) for _ in range(3)]
    results = []
    for pairs in (True, False):
        model = Complex(pairs)
        optimizer = adamw(model)
        options = {"subset": None} if method == "sam-on" else {}
        try:
            sharpness = SharpnessAware(model, optimizer, method, rho=0.2, **options)
        except UserError as error:
            assert not pairs
            assert "complex parameters" in str(error)  # noqa: PT017
            norms_alone = METHODS[method].ascent in ("gradient", "momentum") and METHODS[method].path != "penalty"
            assert not norms_alone or METHODS[method].mix in ("gsam", "looksam", "tram")
            return
        for batch in batches:
            sharpness.backward([batch])
            optimizer.step()
        results.append({n: torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for n, p in model.named_parameters()})
    close(results[1], results[0], 1e-12)


# ---------------------------------------------------------------------- loss and outputs


def test_a_loss_may_be_a_method_of_the_model():
    class WithLoss(type(make_model())):
        def loss(self, z, t):
            return F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="sum"), t.numel()

        def decayed(self, z, t):
            total, count = self.loss(z, t)
            return total + next(self.parameters()).square().sum(), count

    grads = []
    for own in (False, True):
        model = make_model(WithLoss)
        loss_fn = model.loss if own else lambda z, t: WithLoss.loss(None, z, t)
        SharpnessAware(model, adamw(model), "functional-sam", loss_fn=loss_fn).backward([make_batch()])
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with pytest.raises(UserError, match="loss_fn has a term that depends on the model's"):
        SharpnessAware(model, adamw(model), "functional-sam", loss_fn=model.decayed).backward([make_batch()])


@pytest.mark.parametrize("how", ["module", "bound", "closure", "partial"])
def test_a_trainable_loss_is_refused(how):
    class Tempered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, z, t):
            return F.cross_entropy((z / self.temperature).flatten(0, 1), t.flatten(), reduction="sum"), t.numel()

    loss = Tempered()
    loss_fn = {
        "module": loss,
        "bound": loss.forward,
        "closure": lambda z, t: loss(z, t),
        "partial": functools.partial(lambda a, z, t: a(z, t), loss),
    }[how]
    model = make_model()
    with pytest.raises(UserError, match=r"loss_fn .* move (it|them) into the model"):
        SharpnessAware(model, adamw(model), "sam", loss_fn=loss_fn).backward([make_batch()])


def test_a_mean_beside_a_count_is_refused():
    model = make_model()
    mean = SharpnessAware(
        model, adamw(model), "sam", loss_fn=lambda z, t: (F.cross_entropy(z.flatten(0, 1), t.flatten()), t.numel())
    )
    with pytest.raises(UserError, match=r"returned a mean .* return the SUM"):
        mean.backward([make_batch()])
    detached = SharpnessAware(model, adamw(model), "sam", loss_fn=lambda z, t: (z.detach().sum() * model.norm.weight.sum(), 1))
    with pytest.raises(UserError, match=r"other than by its logits|does not depend on the logits"):
        detached.backward([make_batch()])
    negative = SharpnessAware(model, adamw(model), "sam", loss_fn=lambda z, t: (z.sum(), -2))
    with pytest.raises(UserError, match="counted no valid target"):
        negative.backward([make_batch()])


def test_a_loss_that_draws_random_numbers_draws_no_more_of_them_for_being_looked_at():
    def loss_fn(z, t):
        noise = torch.rand(len(z), dtype=z.dtype)
        return (F.cross_entropy(z.movedim(-1, 1), t, reduction="none").sum(1) * noise).sum(), t.numel()

    model = make_model()
    torch.manual_seed(5)
    torch.rand(4, dtype=torch.float64)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    SharpnessAware(model, adamw(model), "adamw", loss_fn=loss_fn).backward([make_batch(4)])
    assert torch.equal(torch.get_rng_state(), expected)


def test_outputs_and_targets_that_do_not_fit():
    model = make_model()
    inputs, targets = make_batch(4, 5)

    class Output:
        def __init__(self, logits):
            self.logits = logits

    cases = [
        ({"forward": lambda m, x: Output(m(x))}, targets, r"returned a Output.*model\(inputs\).logits"),
        ({"forward": lambda m, x: (m(x),)}, targets, "returned a tuple"),
        ({"forward": lambda m, x: m(x).movedim(-1, 1)}, targets, "classes are the LAST dimension"),
        ({}, targets.T, r"logits \[4, 5, 11\] and targets \[5, 4\]"),
        ({}, targets[:, :3], r"targets \[4, 3\]"),
        ({}, targets.double(), r"targets \[4, 5\] of torch.float64: targets are class indices"),
        ({}, None, "targets are a NoneType: .* loss_fn="),
    ]
    for kind in (TinyModel, TinyReadout):
        model = make_model(kind)
        for options, given, words in cases:
            if not (kind is TinyReadout and "forward" in options):
                with pytest.raises(UserError, match=words):
                    SharpnessAware(model, adamw(model), "sam", **options).backward([(inputs, given)])
    for given in (targets.flatten(), targets[..., None], targets):
        SharpnessAware(model, adamw(model), "sam").backward([(inputs, given)])
        model.zero_grad()


@pytest.mark.parametrize("batch", [([1, 2], [3, 4, 5]), ("ab", "cd"), ({"x": 1}, {"y": 2})])
def test_a_batch_that_is_not_in_a_list(batch):
    model = make_model()
    with pytest.raises(UserError, match="a single micro-batch goes into a list"):
        SharpnessAware(model, adamw(model), "sam").backward(batch)


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("method", METHODS)
def test_soft_labels(method, kind):
    """One-hot rows give the gradient of their indices; any cut into micro-batches the same."""
    results = []
    for soft in (False, True):
        model = make_model(kind)
        optimizer = warmed_up(model)
        sharpness = SharpnessAware(model, optimizer, method, rho=0.2)
        for step in range(2):
            inputs, targets = make_batch(6, seed=step)
            if soft:
                targets = F.one_hot(targets, 11).double()
            loss = sharpness.backward(parts_of((inputs, targets), [1, 4] if soft else []))
            optimizer.step()
        results.append({**theta_of(model), "loss": loss})
    close(results[1], results[0], 1e-9)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "tram"])
def test_no_targets_at_all(method):
    """An autoencoder: (inputs, None), with a loss that does without."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Tanh(), torch.nn.Linear(3, 4)).double()
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, method, rho=0.1, loss_fn=lambda z, _: (z.square().sum(), len(z)))
    losses = []
    for _ in range(3):
        losses.append(sharpness.backward([(torch.ones(2, 4, dtype=torch.float64), None)]))
        optimizer.step()
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------------- steps


def test_two_calls_without_a_step_are_refused():
    """How frameworks accumulate: one backward a micro-batch. Only the last would count."""
    model = make_model()
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, "sam")
    sharpness.backward([make_batch()])
    with pytest.raises(UserError, match=r"twice without a step.*ONE call, backward\(\[\(inputs, targets\), ...\]\)"):
        sharpness.backward([make_batch()])
    assert model.up.weight.grad is not None  # the first one's is still there
    optimizer.step()
    sharpness.backward([make_batch()])
    for to_none in (True, False):
        optimizer.zero_grad(set_to_none=to_none)
        sharpness.backward([make_batch()])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # patches step
    optimizer.step()
    sharpness.backward([make_batch()])


def test_a_grad_scaler_is_refused():
    model = make_model(dtype=torch.float32)
    optimizer = adamw(model)
    for enabled in (False, True):
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        sharpness = SharpnessAware(model, optimizer, "sam")
        loss = sharpness.backward([make_batch()])
        scaler.scale(loss)
        if enabled:
            with pytest.raises(UserError, match=r"GradScaler.*bfloat16"):
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)


@pytest.mark.parametrize("method", ["adamw", "sam", "functional-sam"])
def test_an_optimizer_that_steps_inside_of_backward_is_refused(method):
    model = make_model()
    optimizer = adamw(model)
    inside = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(p):
        inside[p].step()
        inside[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    with pytest.raises(UserError, match="steps inside of it"):
        SharpnessAware(model, optimizer, method).backward([make_batch()])


# ---------------------------------------------------------------------- randomness, inputs, buffers


class Noisy(TinyModel):
    """Noise from Python's and numpy's generators, as augmentations and stochastic depth draw it."""

    def forward(self, tokens):
        return super().forward(tokens) * (1.0 + random.random()) + np.random.rand()


@pytest.mark.parametrize("method", METHODS)
def test_both_passes_see_the_same_numbers_of_other_generators(method):
    """A radius too small to move a weight leaves the plain gradient, and the generators where one pass leaves them."""
    results = []
    for name, rho in [("adamw", None), (method, 1e-300)]:
        random.seed(1)
        np.random.seed(1)
        model = make_model(Noisy)
        optimizer = warmed_up(model)
        SharpnessAware(model, optimizer, name, rho=rho).backward(parts_of(make_batch(), [1]))
        results.append((gradients(model), random.random(), np.random.rand()))
    close(results[1][0], results[0][0], 1e-12)
    assert results[0][1:] == results[1][1:]


def test_a_forward_that_changes_its_inputs_is_refused():
    class Writes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)

        def forward(self, inputs):
            x = inputs["x"]
            if "scale" in inputs:
                x = x * inputs.pop("scale")
            else:
                x.mul_(0.5)
            return self.linear(x)

    model = Writes()
    targets = torch.tensor([0, 1])
    for inputs, words in [
        ({"x": torch.ones(2, 4)}, r"inputs\['x'\]"),
        ({"x": torch.ones(2, 4), "scale": torch.ones(())}, r"\['scale'\]"),
    ]:
        with pytest.raises(UserError, match=f"forward changed {words if 'scale' not in inputs else 'inputs' + words}"):
            SharpnessAware(model, sgd(model), "sam").backward([(inputs, targets)])


@pytest.mark.parametrize("method", ["sam", "functional-sam", "logit-sam", "tram"])
def test_a_part_in_training_under_a_root_in_eval(method):
    """Fine-tuning with a frozen trunk: model.eval(), the head in train(). Its statistics move once a step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)).double()
    model.eval()
    model[1].train()
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
    for _ in range(2):
        batch = (torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,)))
        twin = copy.deepcopy(model)
        twin(batch[0])
        sharpness.backward([batch], measure_dose=True)
        for (name, buffer), (_, expected) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
            assert torch.equal(buffer, expected), name
        optimizer.step()


# ---------------------------------------------------------------------- after an error


@pytest.mark.parametrize("method", ["adamw", "sam", "functional-sam", "gsam"])
def test_after_a_loss_that_is_not_finite(method):
    """Statistics as before, .grad empty, the loss named before the gradient that follows from it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, method)
    before = {n: b.clone() for n, b in model.named_buffers()}
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"step 1, pass 1 .* the loss is not finite"):
            sharpness.backward([(torch.full((4, 4), float("nan")), torch.tensor([0, 1, 2, 0]))])
        assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
        assert all(p.grad is None for p in model.parameters())
    assert torch.isfinite(sharpness.backward([(torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))]))


def test_the_first_bad_gradient_is_named():
    class Root(torch.nn.Module):
        """sqrt of zero: a finite loss whose gradient is not."""

        def __init__(self):
            super().__init__()
            self.fine, self.bad = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x * self.fine + self.bad.sqrt()

    model = Root()
    for method in ("adamw", "sam"):
        with pytest.raises(FloatingPointError, match=r"the gradient is not finite \((inf|nan), first in bad\)"):
            SharpnessAware(model, sgd(model), method).backward([(torch.ones(2, 3), torch.tensor([0, 1]))])


def test_a_state_of_another_method():
    model = make_model()
    state = SharpnessAware(model, adamw(model), "sam").state_dict()
    with pytest.raises(UserError, match="of 'gradient-sam-None', not of 'gradient-functional-None'"):
        SharpnessAware(model, adamw(model), "functional-sam").load_state_dict(state)
    del state["method"]  # as it was saved before it had a name
    SharpnessAware(model, adamw(model), "functional-sam").load_state_dict(state)


@pytest.mark.parametrize("rho", [True, torch.tensor(0.1), "0.1", float("inf")])
def test_a_radius_is_a_number(rho):
    model = make_model()
    with pytest.raises(UserError, match="the radius is a finite number >= 0"):
        SharpnessAware(model, adamw(model), "sam", rho=rho)

"""Moments of optimizers that no one here wrote: read where they are kept, or refused, and never a plain gradient for ever."""

import warnings

import pytest
import pytorch_optimizer as public
import torch
from conftest import adamw, gradients, make_batch, make_model, warmed_up
from test_sharpness_oracle import close, norm, oracle, theta_of

from functional_sam import SharpnessAware, UserError

pytestmark = pytest.mark.filterwarnings("ignore")


def steps(model, optimizer, number=2):
    """Plain steps of an optimizer, so that it has state."""
    for step in range(number):
        SharpnessAware(model, optimizer, "adamw").backward([make_batch(seed=step)])
        optimizer.step()
        optimizer.zero_grad()


def tensors(state):
    """Of one parameter; some keep another thing beside."""
    return [v for v in state.values() if isinstance(v, torch.Tensor)] if isinstance(state, dict) else []


def built(name):
    """An optimizer of the public library on the tiny model, or None where it takes more than parameters and gradients."""
    model = make_model(dtype=torch.float32)
    try:
        optimizer = public.load_optimizer(name)(model.parameters())
        steps(model, optimizer)
    except Exception:
        return None
    return model, optimizer


@pytest.mark.parametrize("method", ["precond-sam", "momentum-sam"])
def test_every_optimizer_is_read_or_refused(method):
    """After its steps the gradient is not the plain one, or an error says what is missing. 100 optimizers."""
    read, refused = [], []
    for name in public.get_supported_optimizers():
        if (pair := built(name)) is None:
            continue
        model, optimizer = pair
        try:
            sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
            sharpness.backward([make_batch()])
            optimizer.step()  # one that keeps nothing at all is known by this
            state = {p: [v.clone() for v in tensors(s)] for p, s in optimizer.state.items()}
            sharpness.backward([make_batch()])
        except UserError as error:
            assert "moment" in str(error), name  # noqa: PT017
            refused.append(name)
            continue
        after = {p: tensors(s) for p, s in optimizer.state.items()}
        assert all(torch.equal(a, b) for p in state for a, b in zip(state[p], after[p], strict=True)), name
        ours = gradients(model)
        SharpnessAware(model, optimizer, "adamw").backward([make_batch()])
        assert norm({n: g - ours[n] for n, g in gradients(model).items()}) > 1e-3 * norm(ours), name
        read.append(name)
    assert len(read) >= 45, (read, refused)
    assert {"stableadamw", "adamp", "lamb", "adam", "adamw", "lion"} - set(read) == ({"lion"} if method == "precond-sam" else set())
    assert {"soap", "galore"} & set(refused) >= {"soap"}
    assert ("schedulefreeadamw" in read) == (method == "precond-sam")


@pytest.mark.parametrize("method", ["precond-sam", "momentum-sam"])
def test_what_shows_only_after_a_step_is_refused_then(method):
    """Built before any state: the first step is plain, the second knows."""
    late = []
    for name in public.get_supported_optimizers():
        model = make_model(dtype=torch.float32)
        try:
            optimizer = public.load_optimizer(name)(model.parameters())
            sharpness = SharpnessAware(model, optimizer, method, rho=0.3)
            sharpness.backward([make_batch()])
            optimizer.step()
        except Exception:
            continue
        try:
            for step in (1, 2):  # ADOPT's first step leaves moments of zero
                sharpness.backward([make_batch(seed=step)])
                if step == 1:
                    optimizer.step()
        except UserError as error:
            assert "moment" in str(error)  # noqa: PT017
            late.append(name)
            continue
        ours = gradients(model)
        SharpnessAware(model, optimizer, "adamw").backward([make_batch(seed=2)])
        assert norm({n: g - ours[n] for n, g in gradients(model).items()}) > 1e-4 * norm(ours), name
    assert "soap" in late


@pytest.mark.parametrize(
    ("name", "beta"), [("StableAdamW", 0.99), ("AdamP", 0.999), ("Lamb", 0.999), ("ScheduleFreeAdamW", 0.999), ("Adan", 0.99)]
)
def test_a_step_count_in_the_group(name, beta):
    """The preconditioned gradient by its formula, v_hat = v / (1 - beta^t) with t from the group."""
    model = make_model()
    optimizer = getattr(public, name)(model.parameters())
    steps(model, optimizer, 3)
    group = optimizer.param_groups[0]
    assert group["step"] == 3
    P = {n: 1 / ((optimizer.state[p]["exp_avg_sq"] / (1 - beta**3)).sqrt() + group["eps"]) for n, p in model.named_parameters()}
    _, expected = oracle(model, theta_of(model), make_batch(), "adam", "functional", 0.2, None, P, normalize_by="energy")
    SharpnessAware(model, optimizer, "precond-functional-sam", rho=0.2, normalize_by="energy").backward([make_batch()])
    close(gradients(model), expected)


def test_optimizers_that_never_will_are_refused_at_construction():
    model = make_model()
    for optimizer in (torch.optim.SGD(model.parameters()), torch.optim.Rprop(model.parameters())):
        for method in ("precond-sam", "momentum-sam"):
            with pytest.raises(UserError, match=f"moment, which {type(optimizer).__name__} does not keep"):
                SharpnessAware(model, optimizer, method)
    adafactor = torch.optim.Adafactor(model.parameters())
    steps(model, adafactor)
    with pytest.raises(UserError, match=r"second moment, which Adafactor does not keep \(its state: step, "):
        SharpnessAware(model, adafactor, "precond-sam")
    SharpnessAware(model, adafactor, "sam").backward([make_batch()])


def test_a_wrapper_is_unwrapped():
    """As Accelerate and Lightning wrap them: the state, the groups and the steps are the inner optimizer's."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def state(self):
            return {}

        @property
        def param_groups(self):
            return self.optimizer.param_groups

        def step(self, closure=None):
            self.optimizer.step()

    results = []
    for wrap in (lambda x: x, Wrapper, lambda x: Wrapper(Wrapper(x)), lambda x: [x]):
        model = make_model()
        optimizer = warmed_up(model)
        given = wrap(optimizer)
        sharpness = SharpnessAware(model, given, "precond-sam", rho=0.3)
        assert sharpness.optimizer is given
        for step in range(2):
            sharpness.backward([make_batch(seed=step)])
            (given[0] if isinstance(given, list) else given).step()
        results.append(theta_of(model))
    for result in results[1:]:
        close(result, results[0], 0)


@pytest.mark.parametrize("method", ["sam", "functional-sam", "momentum-sam", "wsam", "gsam"])
def test_a_list_of_optimizers(method):
    """Two AdamW on two halves of the parameters take the steps of one on all; a step of either counts as one."""
    results = []
    for split in (False, True):
        model = make_model()
        parameters = list(model.parameters())
        halves = [parameters[::2], parameters[1::2]] if split else [parameters]
        optimizers = [torch.optim.AdamW(half, lr=1e-2) for half in halves]
        sharpness = SharpnessAware(model, optimizers if split else optimizers[0], method, rho=0.2)
        for step in range(3):
            sharpness.backward([make_batch(seed=step)])
            for optimizer in optimizers:
                optimizer.step()
        results.append(theta_of(model))
    close(results[1], results[0], 1e-12)


@pytest.mark.parametrize("beside", [False, True])
def test_a_hyperparameter_of_the_optimizers_own_that_is_called_rho(beside):
    """Adadelta's decay, 0.9, is no radius, and that of a group of the AdamW beside it is one."""
    model = make_model()
    ours, theirs = ([n for n, p in model.named_parameters() if (p.ndim == 1) == vector] for vector in (True, False))
    radii = {**dict.fromkeys(ours, 0.05), **dict.fromkeys(theirs, 0.4 if beside else 0.05)}
    named = dict(model.named_parameters())
    if beside:
        group = {"params": [named[n] for n in theirs], "rho": 0.4}
        optimizer = [torch.optim.Adadelta([named[n] for n in ours]), torch.optim.AdamW([group])]
    else:
        optimizer = torch.optim.Adadelta(model.parameters())
    _, expected = oracle(model, theta_of(model), make_batch(), path="sam", rho=radii)
    SharpnessAware(model, optimizer, "sam", rho=0.05).backward([make_batch()])
    close(gradients(model), expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon is of torch 2.9")
def test_muon_beside_adamw():
    """Momentum of both is read; Muon's matrices have no second moment, and a subset leaves them out."""
    model = make_model(dtype=torch.float32)
    matrices = [model.up.weight, model.down.weight]
    muon = torch.optim.Muon(matrices, lr=1e-3)
    rest = torch.optim.AdamW([p for p in model.parameters() if all(p is not m for m in matrices)])
    sharpness = SharpnessAware(model, [muon, rest], "momentum-functional-sam", rho=0.2)
    for step in range(2):
        sharpness.backward([make_batch(seed=step)])
        muon.step()
        rest.step()
    with pytest.raises(UserError, match="second moment, which Muon does not keep"):
        SharpnessAware(model, [muon, rest], "precond-sam")
    SharpnessAware(model, [muon, rest], "precond-sam", subset=lambda name, p: p.ndim < 2).backward([make_batch()])


def test_what_is_no_optimizer():
    model = make_model()
    for optimizer, words in [
        ([], r"optimizer=\[\]"),
        (model, "optimizer is a TinyModel"),
        ([adamw(model), 3], "optimizer is a int"),
    ]:
        with pytest.raises(UserError, match=words):
            SharpnessAware(model, optimizer, "sam")


def test_warnings_are_not_raised_by_a_common_set_up():
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharpness = SharpnessAware(model, adamw(model), "precond-functional-sam")
        sharpness.backward([make_batch()])

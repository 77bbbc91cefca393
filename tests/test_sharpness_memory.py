"""What is held: no tensor of N x V anywhere when the model has a readout, and no dL/dlogits kept. Compiled models."""

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model
from test_sharpness_oracle import close, theta_of
from torch.utils._python_dispatch import TorchDispatchMode

from functional_sam import METHODS, SharpnessAware, head


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


ROWS, LENGTH, VOCAB = 8, 64, 150  # N = 512 targets, V = 150; the parameters and activations are all smaller than N x V


def largest(method, monkeypatch, **options):
    """Of a step with perturbation, for a chunk budget of 64 rows of logits."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 64 * VOCAB * 4)
    model = make_model(TinyReadout, dtype=torch.float32, vocab=VOCAB, width=8)
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, method, **options)
    sharpness.backward([make_batch(ROWS, LENGTH, VOCAB)])
    optimizer.step()
    with Largest() as seen:
        sharpness.backward([make_batch(ROWS, LENGTH, VOCAB, seed=2)])
    return seen.numel


FUSED = [(name, {"derivative": "difference"} if METHODS[name].path == "penalty" else {}) for name in METHODS]


@pytest.mark.parametrize(("method", "options"), FUSED, ids=[name for name, _ in FUSED])
def test_no_tensor_of_all_logits(method, options, monkeypatch):
    chunk, activations = 64 * VOCAB, ROWS * LENGTH * 16
    assert largest(method, monkeypatch, **options) <= max(chunk, activations) < ROWS * LENGTH * VOCAB


def test_the_measure_sees_them_where_they_are(monkeypatch):
    assert largest("functional-sam", monkeypatch, keep="cotangent") >= ROWS * LENGTH * VOCAB


@pytest.mark.parametrize("method", ["functional-sam", "momentum-functional-sam", "logit-sam", "tram", "angle-sam"])
def test_what_pass_one_keeps(method, monkeypatch):
    """With a readout h [.., D] and the head; never u or logits."""
    model = make_model(TinyReadout)
    optimizer = adamw(model)
    options = {"derivative": "difference", "phi": 30.0} if method == "angle-sam" else {}
    sharpness = SharpnessAware(model, optimizer, method, **options)
    kept = []
    for name in ("gradient", "cotangents"):
        original = getattr(sharpness._passes, name)
        monkeypatch.setattr(sharpness._passes, name, lambda *a, original=original, **k: kept.append(original(*a, **k)) or kept[-1])
    for step in range(2):
        sharpness.backward([make_batch(seed=step), make_batch(seed=9 + step)])
        optimizer.step()
    memories = [memory for memories in kept for memory in memories]
    assert any(memory.h is not None for memory in memories)
    assert all(memory.u is None and memory.logits is None for memory in memories)
    assert len({id(memory.weight) for memory in kept[-1]}) == 1  # one head for all micro-batches


def test_no_gradient_of_a_step_outlives_it():
    """Between steps only the copy of the parameters stays, in memory that is used again."""
    model = make_model(TinyReadout)
    sharpness = SharpnessAware(model, adamw(model), "functional-sam")
    sharpness.backward([make_batch()])
    addresses = {p: copy.data_ptr() for p, copy in sharpness._perturbation._theta.items()}
    model.zero_grad()
    sharpness.backward([make_batch(seed=2)])
    assert addresses == {p: copy.data_ptr() for p, copy in sharpness._perturbation._theta.items()}
    assert set(addresses) == set(model.parameters())


class DropsRows(TinyReadout):
    """Whole words are dropped from the embedding and the tied head, others in each micro-batch, as in AWD-LSTM."""

    def forward(self, tokens, readout=None):
        kept = torch.rand(len(self.embedding.weight), 1) > 0.3
        weight = self.embedding.weight * kept
        h = self.norm(torch.nn.functional.embedding(tokens, weight))
        return h @ weight.T if readout is None else readout(h, weight)


@pytest.mark.parametrize("method", ["functional-sam", "logit-sam"])
def test_a_head_that_differs_between_micro_batches(method):
    grads = []
    for keep in ("hidden", "cotangent"):
        model = make_model(DropsRows)
        sharpness = SharpnessAware(model, adamw(model), method, rho=0.3, keep=keep)
        torch.manual_seed(0)
        sharpness.backward([make_batch(seed=seed) for seed in range(3)])
        grads.append(gradients(model))
    close(*grads, 1e-10)


# ---------------------------------------------------------------------- torch.compile


def called_alike(name):
    """Equal for methods that make the same calls of the model, and differ in what they do with vectors."""
    method = METHODS[name]
    return method.path, method.mix, method.ascent in ("momentum", "random"), "phi" in method.options


ONE_OF_EACH = {called_alike(name): name for name in reversed(METHODS)}.values()


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward"])
@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
def test_a_compiled_model(kind, how):
    """The same gradients, for every method (without a readout: for one of those that call the model alike), and after its first
    steps no recompilation: weights move under the compiled code."""
    from torch._dynamo.testing import CompileCounterWithBackend

    every = METHODS if kind is TinyReadout else ONE_OF_EACH
    for method in every if how == "wrapped" else ("functional-sam", "logit-sam", "momentum-functional-sam"):
        torch._dynamo.reset()
        counter, thetas = CompileCounterWithBackend("aot_eager"), []
        for compiled in (False, True):
            model = make_model(kind)
            optimizer = adamw(model)
            given, options = model, {}
            if compiled and how == "wrapped":
                given = torch.compile(model, backend=counter)
            elif compiled and how == "in place":
                model.compile(backend=counter)
            elif compiled and kind is TinyReadout:
                options = {"forward": torch.compile(lambda model, x, readout=None: model(x, readout), backend=counter)}
            elif compiled:
                options = {"forward": torch.compile(lambda model, x: model(x), backend=counter)}
            sharpness = SharpnessAware(given, optimizer, method, **options, **({"every": 2} if method == "looksam" else {}))
            frames = []
            for step in range(5):
                sharpness.backward([make_batch(seed=step)])
                optimizer.step()
                optimizer.zero_grad()
                frames.append(counter.frame_count)
            if compiled:
                assert frames[4] <= 4, f"{method} compiles the head: {frames}"
                assert 0 < frames[2] == frames[4], f"{method} compiles anew at every step: {frames}"
            thetas.append(theta_of(model))
        close(thetas[1], thetas[0], 1e-9)
        if compiled:
            assert sharpness._passes.fused == (kind is TinyReadout)
    torch._dynamo.reset()


def test_gradients_are_named_alike_when_compiled():
    """A state saved from a compiled model loads into a plain one."""
    model = make_model()
    optimizer = adamw(model)
    given = torch.compile(model, backend="eager")
    sharpness = SharpnessAware(given, optimizer, "tram")
    sharpness.backward([make_batch()])
    assert set(gradients(model)) == {name for name, _ in model.named_parameters()}
    SharpnessAware(model, optimizer, "tram").load_state_dict(sharpness.state_dict())

"""sharpness.check(batches): silent where all is well, and nothing changed by it; it says what is wrong where it is not."""

import numpy as np
import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, gradients, make_batch, make_model, parts_of, warmed_up
from test_sharpness_dose import Normalized
from test_sharpness_oracle import close, theta_of

from functional_sam import METHODS, SharpnessAware, UserError


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout, Normalized])
@pytest.mark.parametrize("method", METHODS)
def test_it_changes_nothing(method, kind):
    """Training goes on as if it had not been asked, bit for bit: dropout, BatchNorm, state of looksam, tram, wsam."""
    results = []
    for asked in (False, True):
        model = make_model(kind, dtype=torch.float32, dropout=0.3)
        optimizer = adamw(model)
        sharpness = SharpnessAware(model, optimizer, method, rho=0.2, **({"every": 3} if method == "looksam" else {}))
        torch.manual_seed(4)
        for step in range(4):
            if asked:
                rows = 6 if step else 2
                assert sharpness.check(parts_of(make_batch(rows, seed=20), [1])) is None
                assert sharpness.steps == step
                assert step or sharpness._passes.keep_u is None  # of fewer rows u would be kept: that is the run's to decide
                assert not gradients(model)
            sharpness.backward(parts_of(make_batch(6, seed=step), [2]))
            optimizer.step()
            optimizer.zero_grad()
        results.append({**theta_of(model), **{n: b.clone() for n, b in model.named_buffers()}})
    close(results[1], results[0], 0)


def test_a_generator_of_the_models_own():
    class Own(TinyModel):
        def forward(self, tokens):
            self.generator = getattr(self, "generator", np.random.default_rng(0))
            return super().forward(tokens) * self.generator.uniform(0.5, 1.5)

    model = make_model(Own)
    with pytest.raises(UserError, match=r"two plain gradients at the same weights differ by .*%"):
        SharpnessAware(model, adamw(model), "functional-sam").check([make_batch()])


def test_a_state_that_forward_reads_and_changes():
    class Counts(TinyModel):
        def __init__(self):
            super().__init__()
            self.calls = torch.zeros(())

        def forward(self, tokens):
            self.calls += 1
            return super().forward(tokens) * self.calls

    model = make_model(Counts)
    with pytest.raises(UserError, match=r"two plain gradients .* a state that it changes"):
        SharpnessAware(model, adamw(model), "sam").check([make_batch()])
    model = make_model(Counts)
    calls, model.calls = model.calls, None
    del model.calls
    model.register_buffer("calls", calls.zero_())
    SharpnessAware(model, adamw(model), "sam").check([make_batch()])  # in a buffer it is the same in all passes
    assert model.calls == 0
    with pytest.raises(UserError, match=r"two plain gradients .* a state that it changes"):  # in eval no pass keeps buffers
        SharpnessAware(model.eval(), adamw(model), "sam").check([make_batch()])
    assert model.calls == 0


def test_weights_that_something_else_writes_to():
    class Writes(TinyModel):
        def forward(self, tokens):
            self.down.weight.data.add_(1e-3)
            return super().forward(tokens)

    model = make_model(Writes)
    before = theta_of(model)
    with pytest.raises(UserError, match=r"left down.weight changed"):
        SharpnessAware(model, adamw(model), "sam").check([make_batch()])
    close(theta_of(model), before, 0)


def test_an_optimizer_that_steps_inside_of_backward():
    """Hooked up after a first step, which alone looks at every pass."""
    model = make_model()
    optimizer = adamw(model)
    sharpness = SharpnessAware(model, optimizer, "sam")
    sharpness.backward([make_batch()])
    optimizer.step()
    model.up.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    before = theta_of(model)
    with pytest.raises(UserError, match="the optimizer stepped inside of backward"):
        sharpness.check([make_batch()])
    close(theta_of(model), before, 0)


def test_a_gradient_that_no_step_has_used_is_not_thrown_away():
    model = make_model()
    sharpness = SharpnessAware(model, adamw(model), "sam")
    sharpness.backward([make_batch()])
    found = gradients(model)
    with pytest.raises(UserError, match="twice without a step"):
        sharpness.check([make_batch(seed=3)])
    close(gradients(model), found, 0)


def test_after_an_error_the_set_up_is_as_it_was():
    model = make_model()
    optimizer = warmed_up(model)
    sharpness = SharpnessAware(model, optimizer, "sam", rho=0.3)
    inputs, targets = make_batch()
    with pytest.raises(UserError, match="no valid target"):
        sharpness.check([(inputs, torch.full_like(targets, -100))])
    sharpness.backward([make_batch()])
    found = gradients(model)
    model.zero_grad()
    SharpnessAware(model, optimizer, "sam", rho=0.3).backward([make_batch()])
    close(gradients(model), found, 0)


@pytest.mark.parametrize("method", METHODS)
def test_it_may_be_called_twice_and_after_a_gradient_that_was_dropped(method):
    model = make_model()
    sharpness = SharpnessAware(model, adamw(model), method, rho=0.2)
    for _ in range(2):
        sharpness.check([make_batch()])
    sharpness.backward([make_batch()])
    model.zero_grad()
    sharpness.check([make_batch()])
    sharpness.backward([make_batch()])
    with pytest.raises(UserError, match="twice without a step"):
        sharpness.backward([make_batch()])

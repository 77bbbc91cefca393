"""TRAM's divergences: from noisy inputs, and of a single output; those of other weights are in test_sharpness_methods."""

import pytest
import torch
from conftest import TinyModel, TinyReadout, make_batch, make_model

from functional_sam import SharpnessAware
from functional_sam.errors import UserError
from functional_sam.sharpness import cost
from functional_sam.sharpness.divergence import noisy_inputs


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def one_step(model, batches, method, rho, seed=3, lr=0.0, **options):
    """Loss and gradient of one step from the same random state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    sharpness = SharpnessAware(model, optimizer, method, rho=rho, **options)
    torch.manual_seed(seed)
    loss = sharpness.backward(batches)
    found = gradients(model)
    model.zero_grad()
    return loss, found


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("ascent", ["gradient", "adaptive"])
def test_noise_sets_the_radius_of_an_otherwise_plain_ascent(kind, ascent):
    """Radius rho KL(softmax(z(x + z')) || softmax(z(x))): SAM along the same ascent with that radius has the same gradient."""
    model = make_model(kind)
    inputs, targets = make_batch(rows=6)
    targets[:2, :3] = -100
    with torch.no_grad():
        torch.manual_seed(3)
        with noisy_inputs(model, 0.3, (torch.initial_seed() * 1_000_003 + 1) % 2**63):
            log_p = model(inputs).log_softmax(-1)[targets != -100]
        log_q = model(inputs).log_softmax(-1)[targets != -100]
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert kl > 1e-4
    options = {"divergence": "noise", "sigma": 0.3, "ascent": ascent}
    loss, found = one_step(model, [(inputs, targets)], "tram", 2.0, **options)
    expected_loss, expected = one_step(model, [(inputs, targets)], "sam", 2.0 * kl, ascent=ascent)
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_noise_leaves_dropout_alone_and_differs_from_step_to_step():
    """g is that of the plain step under the same random state; two steps of one state draw other noise."""
    model, batch = make_model(dropout=0.4).train(), make_batch(rows=6)
    loss, found = one_step(model, [batch], "tram", 1e-9, divergence="noise")
    expected_loss, expected = one_step(model, [batch], "plain", 0.0)
    assert float(loss) == float(expected_loss)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sharpness = SharpnessAware(model, optimizer, "tram", rho=50.0, divergence="noise", sigma=0.5)
    outcomes = []
    for _ in range(2):
        torch.manual_seed(3)
        sharpness.backward([batch])
        outcomes.append(torch.cat([g.flatten() for g in gradients(model)]))
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(outcomes[0], outcomes[1], rtol=1e-3)


def test_noise_has_its_variance_and_goes_away():
    model, sigma = make_model(), 0.25
    tokens = torch.zeros(2000, 5, dtype=torch.long)
    with noisy_inputs(model, sigma, 0):
        noisy = model.embedding(tokens)
    clean = model.embedding(tokens)
    assert (noisy - clean).std().item() == pytest.approx(sigma, rel=0.02)
    assert torch.equal(clean, model.embedding.weight[tokens])
    net = torch.nn.Sequential(torch.nn.Linear(3, 2)).double()  # no embedding: the inputs themselves
    x = torch.ones(2000, 3, dtype=torch.float64)
    with noisy_inputs(net, sigma, 0):
        outputs = net(x)
    assert not torch.allclose(outputs, net(x), atol=0.01)
    assert torch.equal(x, torch.ones_like(x))


def test_noise_that_reaches_nothing_is_refused():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = torch.nn.Parameter(torch.randn(11, 4))

        def forward(self, x):
            return self.tokens[x] @ self.tokens.T

    with pytest.raises(UserError, match="get_input_embeddings"):
        one_step(Own(), [make_batch()], "tram", 1.0, divergence="noise")
    for options, words in [({"divergence": "noises"}, "did you mean 'noise'"), ({"sigma": 0.0}, "sigma=0.0")]:
        with pytest.raises(UserError, match=words):
            one_step(make_model(), [make_batch()], "tram", 1.0, **options)


def test_one_output_is_the_mean_of_a_normal():
    """KL(N(a, 1) || N(b, 1)) = (a - b)^2 / 2, where a softmax of one class would never move."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    squared = lambda outputs, grades: ((outputs[:, 0] - grades).square().sum(), torch.tensor(len(grades)))  # noqa: E731
    sharpness = SharpnessAware(model, optimizer, "tram", rho=3.0, loss_fn=squared)
    batch = (torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64))
    sharpness.backward([batch])
    before = model(batch[0]).detach()
    optimizer.step()
    optimizer.zero_grad()
    moved = float((model(batch[0]) - before).detach().square().mean()) / 2
    assert moved > 1e-3
    sharpness.backward([batch])
    found = gradients(model)
    model.zero_grad()
    SharpnessAware(model, optimizer, "sam", rho=3.0 * moved, loss_fn=squared).backward([batch])
    for one, other in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_noise_carries_no_weights():
    assert cost("tram", {"divergence": "noise"}).carried == 0
    assert cost("tram").carried == 1
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sharpness = SharpnessAware(model, optimizer, "tram", divergence="noise")
    sharpness.backward([make_batch()])
    assert sharpness.state_dict()["mix"] == {"old": {}}


class Masked(torch.nn.Module):
    """Four classes of which the last is masked out, or three; every `bad` call of forward returns what is not finite."""

    def __init__(self, masked):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        self.masked, self.calls, self.bad = masked, 0, {}

    def forward(self, x):
        self.calls += 1
        z = self.net(x) * self.bad.get(self.calls, 1.0)
        return torch.cat([z, torch.full_like(z[..., :1], float("-inf"))], -1) if self.masked else z


def test_classes_that_are_masked_out_do_not_count():
    """0 log 0 = 0: the radius, and all that follows, is that of the model without them."""
    torch.manual_seed(0)
    batches = [(torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))) for _ in range(3)]
    results = []
    for masked in (False, True):
        model = make_model(Masked, masked=masked)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        sharpness = SharpnessAware(model, optimizer, "tram", rho=10.0)
        for batch in batches:
            sharpness.backward([batch], measure_dose=True)
            results.append((sharpness.dose, gradients(model)))
            optimizer.step()
    for (dose, found), (expected_dose, expected) in zip(results[:3], results[3:], strict=True):
        assert dose == pytest.approx(expected_dose, rel=1e-9, abs=1e-14)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert results[2][0] > 1e-3


def test_a_divergence_that_is_not_finite_is_an_error():
    """At the earlier weights alone, in the second step; and a loss that is not finite is named before it."""
    batch = (torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,)))
    for call, what in ((2, "divergence"), (3, "loss")):
        model = make_model(Masked, masked=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        sharpness = SharpnessAware(model, optimizer, "tram", rho=10.0)
        sharpness.backward([batch])
        optimizer.step()
        before = [p.detach().clone() for p in model.parameters()]
        model.bad = {call: float("nan")}
        with pytest.raises(FloatingPointError, match=f"step 2, pass 1 .* the {what}.* is not finite"):
            sharpness.backward([batch])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert not gradients(model)

"""The two parts of H eps on a batch of two halves, float64: against the whole batch, and an expectation in closed form."""

import itertools

import pytest
import torch
from test_curvature import both, case, directions

from functional_sam.curvature import CurvatureProducts, decompose, split_in_halves
from functional_sam.vectors import unit

POPULATION = [(1.0, 5.0), (-2.0, 1.0), (0.5, 3.0), (1.5, -1.0)]  # x and y of an example
EPS = (0.6, -0.8)


class Product(torch.nn.Module):
    """z = a b x, so that d2z/dadb = x and all else of the second derivative is zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (0.7, -1.3))

    def forward(self, x):
        return self.a * self.b * x


def squared(z, y):
    return 0.5 * (z - y).square().sum(), torch.tensor(float(len(y)))


def products(examples):
    x, y = torch.tensor(examples, dtype=torch.float64).unbind(1)
    return CurvatureProducts(Product(), [(x, y)], squared)


def by_hand(x, y):
    """H_G eps and H_F eps of one example: u = z - y, J = x (b, a)."""
    a, b, eps = 0.7, -1.3, torch.tensor(EPS, dtype=torch.float64)
    J = torch.tensor([b, a], dtype=torch.float64) * x
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    return J * (J @ eps), (a * b * x - y) * x * (swap @ eps)


@pytest.mark.parametrize("method", ["exact", "difference"])
@both
def test_on_the_whole_batch_it_is_the_decomposition(kind, method):
    """Also where the halves have other numbers of valid targets."""
    model, batches = case(kind)
    inputs, targets = batches[0]
    targets, middle = targets.clamp(min=0), len(inputs) // 2
    if method == "difference":
        targets[:middle].view(-1)[1:4] = -100
    first, second = [(inputs[:middle], targets[:middle])], [(inputs[middle : 2 * middle], targets[middle : 2 * middle])]
    d = directions(CurvatureProducts(model, first))
    found = split_in_halves(*(CurvatureProducts(model, half, method=method) for half in (first, second)), unit(d))
    whole = decompose(model, [*first, *second], ascent=d, method=method)
    for name in ("norm_logit", "norm_func", "cosine", "share"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-9 if method == "exact" else 1e-5), name


def test_the_inner_product_of_the_halves_has_no_noise_in_it():
    """Over all pairs of halves of two examples, drawn with replacement, the mean is |E d|^2 exactly; that of |d|^2 is more."""
    shaped = [torch.tensor([value], dtype=torch.float64) for value in EPS]
    halves = [products(pair) for pair in itertools.product(POPULATION, repeat=2)]
    found = [split_in_halves(first, second, shaped) for first, second in itertools.product(halves, repeat=2)]
    for part, name in enumerate(("logit", "func")):
        each = torch.stack([by_hand(*example)[part] for example in POPULATION])
        mean = each.mean(0)
        noise = (each - mean).square().sum(1).mean()  # of one example; a batch of four has a quarter
        unbiased = torch.tensor([getattr(one, f"square_{name}") for one in found], dtype=torch.float64).mean()
        plain = torch.tensor([getattr(one, f"norm_{name}") ** 2 for one in found], dtype=torch.float64).mean()
        assert float(unbiased) == pytest.approx(float(mean @ mean), rel=1e-12)
        assert float(plain) == pytest.approx(float(mean @ mean + noise / 4), rel=1e-12)
        assert noise / 4 > 0.05 * (mean @ mean)  # there was noise to leave out


def test_a_negative_square_counts_as_zero():
    """Two halves whose delta_func points in opposite directions."""
    shaped = [torch.tensor([value], dtype=torch.float64) for value in EPS]
    found = split_in_halves(products([(1.0, 3.0)]), products([(1.0, -4.0)]), shaped)
    assert found.square_func < 0 < found.square_logit
    assert found.share_without_noise == 0.0
    assert 0.0 < found.share < 1.0

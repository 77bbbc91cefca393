"""Lanczos, density and trace on matrices whose spectrum is known, in float64; estimators within three standard errors.

P the size of a matrix, k eigenvalues at an end.
"""

import math

import pytest
import torch
from scipy.special import ndtr
from test_curvature import case, decoder, error, flat, moved, seeded, sentences  # noqa: F401

from functional_sam.curvature import CurvatureProducts, density, eigenvalues, hutch_plus_plus, hutchinson, quadratic, smooth
from functional_sam.curvature.lanczos import Lanczos
from functional_sam.errors import UserError
from functional_sam.vectors import Space

SHAPES = [(3, 4), (8,), (2, 2, 5), (160,)]
LIKE = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
P = sum(t.numel() for t in LIKE)  # 200


def matrix(values, seed=0):
    """A symmetric matrix with these eigenvalues in a random basis, as a product on lists."""
    values = torch.as_tensor(values, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(P, P, dtype=torch.float64, generator=seeded(seed)))[0]
    A = basis @ torch.diag(values) @ basis.T
    space = Space(LIKE)
    return A, lambda v: space.tensors(A @ space.flat(v))


def indefinite(seed=1):
    """A bulk around zero with outliers at both ends, as H_F has them."""
    bulk = 0.1 * torch.randn(P - 5, dtype=torch.float64, generator=seeded(seed))
    return torch.cat([bulk, torch.tensor([3.0, 2.0, 1.5, -2.5, -1.0], dtype=torch.float64)]).sort().values


def budget(vectors):
    return vectors * P * 8


# --- eigenvalues ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["both", "top", "bottom"])
@pytest.mark.parametrize("vectors", [200, 14])
def test_ends_of_a_known_spectrum(end, vectors):
    """With room for all vectors, and restarted in a basis of 14."""
    values, k = indefinite(), 3
    _, product = matrix(values)
    found = eigenvalues(product, LIKE, k, end, max_basis_bytes=budget(vectors), tolerance=1e-8, generator=seeded())
    assert found.converged
    assert found.basis_bytes <= budget(vectors)
    assert (found.num_restarts > 0) == (vectors == 14)
    for ours, exact in ((found.top, values.flip(0)), (found.bottom, values)):
        assert len(ours) == (0 if end == {id(found.top): "bottom", id(found.bottom): "top"}[id(ours)] else k)
        for eigenvalue, value in zip(ours, exact.tolist(), strict=False):
            assert eigenvalue.value == pytest.approx(value, abs=1e-10)
            assert eigenvalue.residual < 1e-7


@pytest.mark.parametrize("vectors", [60, 12])
@pytest.mark.parametrize("max_products", [8, 15, 40])
def test_residuals_bound_the_error_at_every_stage(vectors, max_products):
    """Converged or not, an eigenvalue lies within the residual; the flag says no more than the residual does."""
    A, product = matrix(torch.randn(P, dtype=torch.float64, generator=seeded(2)))
    values = torch.linalg.eigvalsh(A)
    found = eigenvalues(product, LIKE, 2, max_products=max_products, max_basis_bytes=budget(vectors), generator=seeded())
    assert found.num_products <= max_products
    largest = max(abs(e.value) for e in found.top + found.bottom)
    for e in found.top + found.bottom:
        assert (values - e.value).abs().min() <= e.residual + 1e-14
        assert e.converged == (e.residual <= 1e-3 * largest)
    assert not eigenvalues(product, LIKE, 2, max_products=8, generator=seeded()).converged


def test_residual_is_that_of_the_vector():
    """beta |s_j| against |A y - theta y| with y made, before and after a restart."""
    A, product = matrix(indefinite())
    lanczos = Lanczos(product, Space(LIKE), 12, seeded())
    for restart in range(3):
        while not lanczos.exhausted:
            lanczos.step()
        values, residuals, s = lanczos.ritz()
        Q = lanczos.Q[: lanczos.size]
        assert (Q @ Q.T - torch.eye(12, dtype=Q.dtype)).abs().max() < 1e-13
        vectors = s.T @ Q
        made = (vectors @ A - values.unsqueeze(1) * vectors).norm(dim=1)
        assert torch.allclose(made, residuals, rtol=1e-6, atol=1e-12), restart
        lanczos.contract(s[:, [0, 1, 2, 9, 10, 11]])


def test_low_rank_multiple_and_zero():
    """An invariant subspace is left by a new vector: copies of an eigenvalue are found, and the zeros."""
    _, product = matrix([5.0, 5.0, 2.0, *[0.0] * (P - 3)])
    found = eigenvalues(product, LIKE, 4, tolerance=1e-9, generator=seeded())
    assert [e.value for e in found.top] == pytest.approx([5, 5, 2, 0], abs=1e-9)
    assert [e.value for e in found.bottom] == pytest.approx([0] * 4, abs=1e-9)
    nothing = eigenvalues(lambda v: [torch.zeros_like(t) for t in v], LIKE, 2, generator=seeded())
    assert nothing.converged
    assert [e.value for e in nothing.top + nothing.bottom] == [0] * 4


def test_more_than_there_are():
    like = [torch.zeros(3, dtype=torch.float64)]
    found = eigenvalues(lambda v: [v[0] * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)], like, 10, generator=seeded())
    assert found.converged
    assert [e.value for e in found.top] == pytest.approx([3, 1, -2])
    assert [e.value for e in found.bottom] == pytest.approx([-2, 1, 3])


@pytest.mark.parametrize("name", ["hessian", "gauss_newton", "functional"])
def test_eigenvalues_of_a_decoder(name):
    """Against the dense matrix, in float32 too."""
    model = decoder(vocab=7, width=4, depth=1, heads=2, length=6, mlp=8)
    inputs = torch.randint(7, (3, 6), generator=seeded(1))
    batches = [(inputs, inputs.roll(-1, 1))]
    products = CurvatureProducts(model, batches)
    space = Space(products.parameters)
    product = getattr(products, name)
    A = torch.stack([space.flat(product(space.tensors(e))) for e in torch.eye(space.size, dtype=torch.float64)])
    exact = torch.linalg.eigvalsh(A)
    found = eigenvalues(product, products.parameters, 2, tolerance=1e-6, generator=seeded())
    assert [e.value for e in found.top] == pytest.approx(exact.flip(0)[:2].tolist(), rel=1e-6)
    # Of zero, which H_G has many times over, one copy is found at first.
    count = 1 if name == "gauss_newton" else 2
    assert [e.value for e in found.bottom[:count]] == pytest.approx(exact[:count].tolist(), abs=1e-6 * float(exact.abs().max()))
    narrow = CurvatureProducts(model.float(), batches)
    found = eigenvalues(getattr(narrow, name), narrow.parameters, 2, generator=seeded())
    assert found.converged
    assert found.top[0].value == pytest.approx(float(exact[-1]), rel=1e-4)


def test_refusals_of_lanczos():
    _, product = matrix(indefinite())
    for words, arguments in {
        "holds 4 vectors": {"k": 2, "max_basis_bytes": budget(5)},
        "'left'": {"end": "left"},
        "k=0": {"k": 0},
    }.items():
        with pytest.raises(UserError, match=words):
            eigenvalues(product, LIKE, **arguments)
    with pytest.raises(FloatingPointError, match="not finite"):
        eigenvalues(lambda v: [t * math.nan for t in v], LIKE)
    with pytest.raises(FloatingPointError, match="not finite"):
        density(lambda v: [t * math.inf for t in v], LIKE)


# --- density --------------------------------------------------------------------------------------------------------------


def smoothed(values, edges, sigma):
    """The exact density of the eigenvalues in the bins."""
    below = torch.from_numpy(ndtr(((edges.unsqueeze(1) - values) / sigma).numpy()))
    return below.mean(1).diff() / edges.diff()


@pytest.mark.parametrize("vectors", [200, 10])
def test_density_is_that_of_a_known_spectrum(vectors):
    """Within three standard errors where there is a density to speak of; with the basis whole, and with its last vectors alone."""
    values = indefinite()
    _, product = matrix(values)
    edges = torch.linspace(-4, 5, 91, dtype=torch.float64)
    found = density(product, LIKE, 20, 60, 0.2, edges, max_basis_bytes=budget(vectors), generator=seeded())
    assert found.reorthogonalized == (vectors == 200)
    assert found.num_products == 20 * 60
    exact = smoothed(values, edges, 0.2)
    live = exact > 1e-3 * exact.max()
    assert ((found.density - exact).abs() < 3 * found.stderr + 1e-3 * exact.max())[live].double().mean() > 0.97
    assert found.integral == pytest.approx(1, abs=1e-6)
    trace, stderr = found.trace
    assert abs(trace - values.sum()) < 3 * stderr


@pytest.mark.parametrize("sigma", [None, 1e-6, 0.5])
@pytest.mark.parametrize("grid", [50, 1024])
def test_density_integrates_to_one(sigma, grid):
    """However narrow the Gaussian beside the bins, and with an invariant subspace smaller than the order."""
    for values in (indefinite(), [2.0, 1.0, *[0.0] * (P - 2)], [3.0] * P):
        _, product = matrix(values)
        found = density(product, LIKE, 2, 30, sigma, grid, generator=seeded())
        assert found.integral == pytest.approx(1, abs=1e-6)
        assert (found.density >= 0).all()
        assert len(found.grid) == len(found.density) == grid


def test_quadrature_has_the_moments_of_the_vector():
    """sum of weights * nodes^m is q^T A^m q up to m = 2 * order - 1."""
    A, product = matrix(indefinite())
    found = density(product, LIKE, 1, 4, generator=seeded(5))
    q = Space(LIKE).gaussian(seeded(5))
    q = q / q.norm()
    power = q
    for m in range(8):
        assert float((found.weights * found.nodes**m).sum()) == pytest.approx(float(q @ power), rel=1e-9, abs=1e-12), m
        power = A @ power
    assert math.isnan(found.trace[1])
    assert found.stderr.isnan().all()


def test_density_of_given_edges_and_its_refusals():
    _, product = matrix(indefinite())
    found = density(product, LIKE, 2, 30, 0.01, torch.tensor([-0.5, 0.0, 0.5]), generator=seeded())
    assert 0.9 < found.integral < 1  # the outliers are outside
    _, again = smooth(found.nodes, found.weights, found.sigma, torch.tensor([-0.5, 0.0, 0.5]))
    assert torch.equal(again.mean(0), found.density)
    for words, arguments in {
        "probes=0": {"probes": 0},
        "order=0": {"order": 0},
        "sigma=-1": {"sigma": -1.0},
        "edges": {"grid": torch.tensor([1.0, 1.0])},
        "vectors": {"max_basis_bytes": budget(2)},
    }.items():
        with pytest.raises(UserError, match=words):
            density(product, LIKE, **{"probes": 1, "order": 3, **arguments})


# --- trace ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [hutchinson, hutch_plus_plus])
@pytest.mark.parametrize("kind", ["indefinite", "flat", "decaying"])
def test_trace_within_three_standard_errors(estimator, kind):
    values = {
        "indefinite": indefinite(),
        "flat": torch.rand(P, dtype=torch.float64, generator=seeded()),
        "decaying": torch.arange(1, P + 1, dtype=torch.float64) ** -2,
    }[kind]
    _, product = matrix(values)
    for seed in range(5):
        found = estimator(product, LIKE, 60, generator=seeded(seed))
        assert found.num_products == 60
        assert abs(found.mean - float(values.sum())) < 3 * found.stderr
        assert found.n == (60 if estimator is hutchinson else 20)


def test_standard_error_is_the_spread_of_the_estimates():
    values = indefinite()
    A, product = matrix(values)
    found = [hutchinson(product, LIKE, 40, generator=seeded(seed)) for seed in range(60)]
    spread = torch.tensor([e.mean for e in found]).std()
    exact = math.sqrt(2 * float(A.square().sum() - A.diagonal().square().sum()) / 40)
    assert float(spread) == pytest.approx(exact, rel=0.3)
    assert sum(e.stderr for e in found) / 60 == pytest.approx(exact, rel=0.1)


def test_hutch_plus_plus_gains_where_a_few_eigenvalues_rule():
    _, product = matrix(torch.arange(1, P + 1, dtype=torch.float64) ** -2)
    plain, plus = (f(product, LIKE, 30, generator=seeded()) for f in (hutchinson, hutch_plus_plus))
    assert plus.stderr < plain.stderr / 10
    _, low_rank = matrix([4.0, 2.0, *[0.0] * (P - 2)])
    exact = hutch_plus_plus(low_rank, LIKE, 30, generator=seeded())
    assert (exact.mean, exact.stderr) == (pytest.approx(6), pytest.approx(0, abs=1e-12))
    tight = hutch_plus_plus(product, LIKE, 30, max_basis_bytes=budget(4), generator=seeded())
    assert (tight.num_products, tight.n) == (30, 24)


def test_quadratic_form():
    A, product = matrix(indefinite())
    d = Space(LIKE).gaussian(seeded(3))
    assert quadratic(product, Space(LIKE).tensors(d)) == pytest.approx(float(d @ A @ d / (d @ d)), rel=1e-12)
    with pytest.raises(UserError, match="is zero"):
        quadratic(product, LIKE)
    for estimator, count in ((hutchinson, 0), (hutch_plus_plus, 5)):
        with pytest.raises(UserError, match="or more are needed"):
            estimator(product, LIKE, count)


def test_estimates_are_reproducible():
    model, batches = case("decoder")
    products = CurvatureProducts(model, batches)
    found = [
        (
            eigenvalues(products.functional, products.parameters, max_products=5, generator=seeded(4)).top[0].value,
            hutchinson(products.functional, products.parameters, 2, generator=seeded(4)).mean,
            density(products.functional, products.parameters, 1, 4, generator=seeded(4)).density.sum().item(),
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]

"""Lanczos with full reorthogonalization, inside a budget of memory, restarted where the basis would outgrow it.

A a symmetric matrix known by its products, Q [m, P] an orthonormal basis of rows, T = Q A Q^T [m, m].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from functional_sam.errors import UserError
from functional_sam.vectors import Space

Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]

MAX_BASIS_BYTES = 2**30


class Lanczos:
    """A basis that grows by one product at a time.

    After each step A Q_j = T_j Q_j + beta e_j q_{j+1} (rows; e_j the last unit vector), so that a pair (theta, s) of T_j, |s| = 1,
    belongs to the Ritz vector s Q with |A y - theta y| = beta |s_j|: there is an eigenvalue of A within that of theta.
    Every new vector is orthogonalized against all rows. `contract` replaces the rows by chosen Ritz vectors, in place, and
    goes on from the same residual (thick restart: Wu and Simon 2000, SIAM J. Matrix Anal. 22).
    Raises FloatingPointError for a product that is not finite.
    """

    def __init__(self, product: Product, space: Space, rows: int, generator: Generator | None) -> None:
        self.product, self.space, self.generator = product, space, generator
        self.num_products, self.size, self.beta = 0, 0, 0.0
        self.Q = torch.empty(rows + 1, space.local_size, dtype=space.dtype, device=space.device)
        self.T = torch.zeros(rows, rows, dtype=torch.float64)
        self.scale = 0.0  # an estimate of |A| from below
        self._start(self.space.gaussian(generator))

    @property
    def exhausted(self) -> bool:
        """Whether the rows span everything, or all that the budget holds."""
        return self.size == len(self.T) or self.size == self.space.size

    def step(self) -> None:
        """One product and one row more."""
        j = self.size
        w = self.space.flat(self.product(self.space.tensors(self.Q[j])))
        self.num_products += 1
        # First the two rows that it is not orthogonal to in exact arithmetic, so that one pass over the others is accurate.
        coefficients = torch.zeros(j + 1, dtype=torch.float64)
        coefficients[max(j - 1, 0) :] = orthogonalize(w, self.Q[max(j - 1, 0) : j + 1], self.space)
        coefficients += orthogonalize(w, self.Q[: j + 1], self.space)
        beta = self.space.norm(w)
        if not bool(coefficients.isfinite().all()) or not beta < float("inf"):
            raise FloatingPointError(f"product {self.num_products} of Lanczos is not finite: nor are the weights or the loss")
        self.T[: j + 1, j] = self.T[j, : j + 1] = coefficients
        self.scale = max(self.scale, float(coefficients.norm()), beta)
        self.size += 1
        # A residual of rounding alone: the rows span an invariant subspace, and any other vector leads on.
        if beta <= 10 * torch.finfo(w.dtype).eps * self.scale:
            self.beta = 0.0
            if self.size < self.space.size:
                self._start(self.space.gaussian(self.generator))
        else:
            self.beta = beta
            self.Q[self.size] = w.div_(beta)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ascending, their residuals, and the coefficients s as columns; float64.

        To the residual of exact arithmetic ten units in the last place of |A| are added, the rounding of a product.
        """
        values, s = torch.linalg.eigh(self.T[: self.size, : self.size])
        return values, self.beta * s[-1].abs() + 10 * torch.finfo(self.space.dtype).eps * values.abs().max(), s

    def contract(self, s: Tensor) -> None:
        """Keep the Ritz vectors of these columns of s, and the residual as the row to go on with."""
        kept, size = s.shape[1], self.size
        values = s.T @ self.T[:size, :size] @ s
        coefficients = s.T.to(self.Q.dtype).to(self.Q.device)
        width = max(1, 2**22 // (len(self.Q) * self.Q.element_size()))  # of the columns turned at once: 4 MB
        for start in range(0, self.space.local_size, width):
            columns = slice(start, start + width)
            self.Q[:kept, columns] = coefficients @ self.Q[:size, columns]
        self.Q[kept] = self.Q[size]
        self.T.zero_()
        self.T[:kept, :kept] = values
        self.size = kept

    def _start(self, vector: Tensor) -> None:
        """Make it a unit row orthogonal to the others."""
        orthogonalize(vector, self.Q[: self.size], self.space)
        self.Q[self.size] = vector.div_(self.space.norm(vector))


def orthogonalize(w: Tensor, rows: Tensor, space: Space) -> Tensor:
    """Take orthonormal rows out of w, in place; what was taken, in float64 on the CPU.

    One pass, and another if w has become less than half as long and so has lost digits ("twice is enough").
    """
    taken = torch.zeros(len(rows), dtype=torch.float64)
    for _ in range(2 if len(rows) else 0):
        before = space.norm(w)
        coefficients = space.summed(torch.mv(rows, w))
        w.addmv_(rows.T, coefficients, alpha=-1)
        taken += coefficients.double().cpu()
        if not space.norm(w) < 0.5 * before:
            break
    return taken


def rows_within(max_basis_bytes: int, space: Space, least: int) -> int:
    """How many rows of a basis fit beside the residual. Raises UserError if fewer than `least` do."""
    rows = min(max_basis_bytes // max(space.row_bytes, 1) - 1, space.size)
    if rows < min(least, space.size):
        needed = (least + 1) * space.row_bytes
        raise UserError(
            f"max_basis_bytes={max_basis_bytes} holds {max(rows, 0)} vectors of {space.row_bytes} bytes, {least} are needed: "
            f"give {needed} or more, ask for less, or take a subset of the parameters"
        )
    return int(rows)

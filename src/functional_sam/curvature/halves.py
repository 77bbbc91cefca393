"""delta_func and delta_logit with their sampling noise told apart: one direction, two independent halves of a batch.

Let A_1, A_2 be H_F (or H_G) on two batches of as many targets, drawn independently, and eps a direction fixed before. Their
products d_i = A_i eps have the same mean m = E[A] eps and independent noise, so that

    E |d_i|^2 = |m|^2 + E |d_i - m|^2      the plain norm counts the noise
    E <d_1, d_2> = <E d_1, E d_2> = |m|^2  the inner product of the halves does not

and of the whole batch, d = (d_1 + d_2) / 2, |d|^2 = (|d_1|^2 + |d_2|^2 + 2 <d_1, d_2>) / 4 counts half the noise of one of them.
<d_1, d_2> may come out negative where the noise is larger than m.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from functional_sam.curvature.products import CurvatureProducts
from functional_sam.vectors import dot, ratio


@dataclass(frozen=True)
class HalvesSplit:
    """The two parts of H eps on a batch of two halves. eps is a unit vector."""

    norm_logit: float  # |H_G eps| on the whole batch
    norm_func: float  # |H_F eps| on the whole batch
    cosine: float  # between the two
    square_logit: float  # <H_G eps on the first half, on the second>: |E H_G eps|^2 without bias where eps is independent of both
    square_func: float  # the same of H_F

    @property
    def share(self) -> float:
        """|H_F eps| / (|H_F eps| + |H_G eps|) on the whole batch, as in Decomposition."""
        return ratio(self.norm_func, self.norm_func + self.norm_logit)

    @property
    def share_without_noise(self) -> float:
        """The same of |E H_F eps| and |E H_G eps|; a square that came out negative counts as zero."""
        func, logit = (math.sqrt(max(0.0, square)) for square in (self.square_func, self.square_logit))
        return ratio(func, func + logit)


def split_in_halves(first: CurvatureProducts, second: CurvatureProducts, eps: Sequence[Tensor]) -> HalvesSplit:
    """H_G eps and H_F eps on the batches of `first` and of `second` together, weighed by their numbers of valid targets.

    For the squares to be without bias eps must not have been computed from either batch. Costs one split on each half.
    """
    eps = list(eps)
    (logit_1, func_1), (logit_2, func_2) = first.split(eps), second.split(eps)
    square_logit, square_func = dot(logit_1, logit_2), dot(func_1, func_2)
    a = first.num_targets / (first.num_targets + second.num_targets)
    aa, bb, ab = a * a, (1 - a) * (1 - a), a * (1 - a)
    norm_logit = math.sqrt(max(0.0, aa * dot(logit_1, logit_1) + bb * dot(logit_2, logit_2) + 2 * ab * square_logit))
    norm_func = math.sqrt(max(0.0, aa * dot(func_1, func_1) + bb * dot(func_2, func_2) + 2 * ab * square_func))
    crossed = aa * dot(logit_1, func_1) + ab * (dot(logit_1, func_2) + dot(logit_2, func_1)) + bb * dot(logit_2, func_2)
    return HalvesSplit(norm_logit, norm_func, ratio(crossed, norm_logit * norm_func), square_logit, square_func)

"""Curvature of a loss at the present weights: H = H_G + H_F, products with a vector, and what a SAM step makes of them.

z = F(theta) logits, u = dL/dz, J = dz/dtheta. H_G = J^T (d2L/dz2) J is the logit part, H_F = sum_k u_k d2z_k/dtheta2 the
functional part.
"""

from functional_sam.curvature.decomposition import Decomposition, decompose, decompose_many
from functional_sam.curvature.products import CurvatureProducts

__all__ = ["CurvatureProducts", "Decomposition", "decompose", "decompose_many"]

"""Curvature of a loss at the present weights: H = H_G + H_F, products with a vector, spectra, and what a SAM step makes of them.

z = F(theta) logits, u = dL/dz, J = dz/dtheta. H_G = J^T (d2L/dz2) J is the logit part, H_F = sum_k u_k d2z_k/dtheta2 the
functional part.
"""

from functional_sam.curvature.decomposition import Decomposition, Part, decompose, decompose_many
from functional_sam.curvature.geometry import AdamGeometry
from functional_sam.curvature.groups import parameter_groups
from functional_sam.curvature.halves import HalvesSplit, split_in_halves
from functional_sam.curvature.measures import FunctionalSharpness, Measures, functional_sharpness
from functional_sam.curvature.products import CurvatureProducts
from functional_sam.curvature.quadratic import QuadraticFit, QuadraticPoint, quadratic_fit
from functional_sam.curvature.spectrum import Density, Eigenvalue, Eigenvalues, density, eigenvalues, smooth
from functional_sam.curvature.temperature import Scale, fit_scale, scaled
from functional_sam.curvature.trace import TraceEstimate, hutch_plus_plus, hutchinson, quadratic

__all__ = [
    "AdamGeometry",
    "CurvatureProducts",
    "Decomposition",
    "Density",
    "Eigenvalue",
    "Eigenvalues",
    "FunctionalSharpness",
    "HalvesSplit",
    "Measures",
    "Part",
    "QuadraticFit",
    "QuadraticPoint",
    "Scale",
    "TraceEstimate",
    "decompose",
    "decompose_many",
    "density",
    "eigenvalues",
    "fit_scale",
    "functional_sharpness",
    "hutch_plus_plus",
    "hutchinson",
    "parameter_groups",
    "quadratic",
    "quadratic_fit",
    "scaled",
    "smooth",
    "split_in_halves",
]

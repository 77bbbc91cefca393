"""The method: where to look (ascent), which derivative to take there (path), and backward() that does it."""

from functional_sam.sharpness.backward import SharpnessAware
from functional_sam.sharpness.methods import METHODS, Method

__all__ = ["METHODS", "Method", "SharpnessAware"]

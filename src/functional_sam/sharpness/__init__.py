"""The method: where to look (ascent), which derivative to take there (path), and backward() that does it."""

from functional_sam.sharpness.backward import SharpnessAware
from functional_sam.sharpness.methods import METHODS, Cost, Method, cost, resolve
from functional_sam.sharpness.options import MethodName, Options

__all__ = ["METHODS", "Cost", "Method", "MethodName", "Options", "SharpnessAware", "cost", "resolve"]

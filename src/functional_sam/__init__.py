"""Functional-SAM and its relatives in PyTorch."""

from functional_sam.errors import UserError
from functional_sam.sharpness import METHODS, SharpnessAware

__all__ = ["METHODS", "SharpnessAware", "UserError"]

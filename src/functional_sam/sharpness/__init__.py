"""The method: where to look (ascent), which derivative to take there (path), and backward() that does it.

To read it: reference.py has the method on one page. methods.py is the table of names, options.py their options; path.py has the
derivatives, functional_sam/ascents.py the directions. backward.py is a step: perturbation.py takes the weights to theta + eps and
back, passes.py goes forward and backward over micro-batches, counting.py divides by their targets. penalty.py takes H_F eps and
H_G eps themselves, mix.py does what GNP, WSAM, GSAM ... do with both gradients. The rest refuses (checks, first_step, steps,
trial), makes a later pass the same function as the first (buffers, randomness), or measures (dose, divergence).
"""

from functional_sam.sharpness.backward import SharpnessAware
from functional_sam.sharpness.methods import METHODS, Cost, Method, cost, resolve
from functional_sam.sharpness.options import MethodName, Options

__all__ = ["METHODS", "Cost", "Method", "MethodName", "Options", "SharpnessAware", "cost", "resolve"]

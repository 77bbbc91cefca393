"""What a run will need, before any GPU is asked for: parameters, FLOPs, memory, checkpoints, GPU-hours."""

from functional_sam.planning.cost import RunCost, run_cost
from functional_sam.planning.fits import pause, unfit
from functional_sam.planning.hardware import GPUS, Hardware, gpu
from functional_sam.planning.memory import Layout, Memory, memory
from functional_sam.planning.table import Need, need, rows, table

__all__ = ["GPUS", "Hardware", "Layout", "Memory", "Need", "RunCost"]
__all__ += ["gpu", "memory", "need", "pause", "rows", "run_cost", "table", "unfit"]

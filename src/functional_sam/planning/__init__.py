"""What a run will need, before any GPU is asked for: parameters, FLOPs, memory, checkpoints, GPU-hours."""

from functional_sam.planning.cost import Cost, cost
from functional_sam.planning.hardware import GPUS, Hardware, gpu
from functional_sam.planning.memory import Layout, Memory, memory
from functional_sam.planning.table import Need, need, rows, table

__all__ = ["GPUS", "Cost", "Hardware", "Layout", "Memory", "Need", "cost", "gpu", "memory", "need", "rows", "table"]

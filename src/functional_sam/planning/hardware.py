"""A GPU as the planner sees it."""

from dataclasses import dataclass

from functional_sam.config import nearest
from functional_sam.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """memory: bytes the driver reports; peak: dense bf16 FLOP/s of its data sheet; utilization: of that peak, stated, not measured.

    usable: fraction of the memory that tensors may take. The rest is for the CUDA context, NCCL's buffers, the libraries' work
    space and fragmentation; we ran on no GPU, so the fraction is a choice.
    """

    name: str
    memory: float
    peak: float
    utilization: float = 0.4
    usable: float = 0.9

    def __post_init__(self) -> None:
        if not (0 < self.utilization <= 1 and 0 < self.usable <= 1):
            raise UserError(f"utilization={self.utilization} and usable={self.usable} are fractions, above 0 and at most 1")
        if self.memory <= 0 or self.peak <= 0:
            raise UserError(f"{self.name}: memory={self.memory} bytes and peak={self.peak} FLOP/s are above 0")

    @property
    def budget(self) -> float:
        """Bytes for tensors."""
        return self.memory * self.usable


# Data sheets of the vendor; memory in GiB as nominal, peak of dense (not "with sparsity") bf16 products accumulated in float32.
GPUS = {
    name: Hardware(name, memory * 2**30, peak * 1e12)
    for name, memory, peak in (
        ("a100-40", 40, 312),
        ("a100-80", 80, 312),
        ("h100-80", 80, 989),
        ("h200-141", 141, 989),
        ("l40s-48", 48, 362),
        ("a6000-48", 48, 155),
        ("rtx4090-24", 24, 165),
    )
}


def gpu(name: str, utilization: float = 0.4) -> Hardware:
    """One of GPUS at a utilization. Raises UserError for another name, with the nearest known one."""
    if name not in GPUS:
        raise nearest("gpu", name, GPUS)
    known = GPUS[name]
    return Hardware(known.name, known.memory, known.peak, utilization)

"""A GPU as the planner sees it."""

from dataclasses import dataclass, replace

from functional_sam.config import nearest
from functional_sam.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """memory: bytes the driver reports; peak: dense bf16 FLOP/s of its data sheet; utilization: of that peak, stated, not measured.

    usable: fraction of the memory that tensors may take. The rest is for the CUDA context, NCCL's buffers, the libraries' work
    space and fragmentation; we ran on no GPU, so the fraction is a choice.
    single: FLOP/s of float32 products, which PyTorch computes without tensor cores (TF32 is off); none: as fast as the others.
    """

    name: str
    memory: float
    peak: float
    utilization: float = 0.4
    usable: float = 0.9
    single: float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.utilization <= 1 and 0 < self.usable <= 1):
            raise UserError(f"utilization={self.utilization} and usable={self.usable} are fractions, above 0 and at most 1")
        if self.memory <= 0 or self.peak <= 0 or (self.single is not None and self.single <= 0):
            rates = f"peak={self.peak} and single={self.single} FLOP/s"
            raise UserError(f"{self.name}: memory={self.memory} bytes, {rates} are above 0")

    @property
    def budget(self) -> float:
        """Bytes for tensors."""
        return self.memory * self.usable

    def hours(self, flops: float, wide: float) -> float:
        """GPU-hours of so many FLOPs, `wide` of them in float32 products."""
        rate = self.peak * self.utilization
        return ((flops - wide) / rate + wide / (self.single * SINGLE if self.single else rate)) / 3600


# Of `single` that its products reach, stated too: they are large, without the work between products that `utilization` has.
SINGLE = 0.8

# Data sheets of the vendor; memory in GiB as nominal, peak of dense (not "with sparsity") bf16 products accumulated in float32,
# and of float32 products.
GPUS = {
    name: Hardware(name, memory * 2**30, peak * 1e12, single=single * 1e12)
    for name, memory, peak, single in (
        ("a100-40", 40, 312, 19.5),
        ("a100-80", 80, 312, 19.5),
        ("h100-80", 80, 989, 67.0),
        ("h200-141", 141, 989, 67.0),
        ("l40s-48", 48, 362, 91.6),
        ("a6000-48", 48, 155, 38.7),
        ("rtx4090-24", 24, 165, 82.6),
    )
}


def gpu(name: str, utilization: float = 0.4) -> Hardware:
    """One of GPUS at a utilization. Raises UserError for another name, with the nearest known one."""
    if name not in GPUS:
        raise nearest("gpu", name, GPUS)
    return replace(GPUS[name], utilization=utilization)

"""One process or many, started by torchrun or srun: which part of a step is whose, and what only the first process does.

The global batch is the config's, so the number of processes changes a result by rounding alone; but for the running statistics of
batch normalization, with which evaluations work: they are of the rows of the first process.
"""

import datetime
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from functional_sam.config import Config
from functional_sam.errors import UserError
from functional_sam.records import Run
from functional_sam.tasks import Batches
from functional_sam.tasks.batches import cut, joined, rows, split
from functional_sam.weights import buffers_kept

Result = TypeVar("Result")
Forward = Callable[..., Any]
# How long processes wait for one of them: a process that died is noticed at once, this is for one that hangs. Writing the
# checkpoint of the largest published model, 15 GB, fits many times over.
PATIENCE = datetime.timedelta(minutes=10)


def join(config: Config) -> "Ranks":
    """This process's place among those that torchrun or srun started, known by WORLD_SIZE, RANK, LOCAL_RANK and MASTER_ADDR.

    Without WORLD_SIZE, or with runtime.parallel=none, the process is alone. Raises UserError for settings that cannot be right
    and for configs whose result would depend on the number of processes.
    """
    runtime, size = config.runtime, os.environ.get("WORLD_SIZE") or "1"
    parallel = runtime.parallel
    if parallel != "none" and not size.isdecimal():
        raise UserError(f"WORLD_SIZE={size} in the environment is no number of processes: unset it, or start by torchrun")
    world = int(size) if size.isdecimal() else 1
    if parallel == "auto":
        parallel = "ddp" if world > 1 or dist.is_initialized() else "none"
    device = torch.device(runtime.device)
    if parallel == "none":
        return Ranks(0, 1, parallel, device)
    if not dist.is_initialized():
        needed = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in os.environ]
        if missing:
            raise UserError(
                f"runtime.parallel={runtime.parallel}: {', '.join(missing)} not set in the environment; start it by "
                "torchrun --nproc-per-node 2 -m functional_sam train ..., or take runtime.parallel=none"
            )
        require_divisible(config, world, parallel)  # before any process waits for another
    if device.type == "cuda":
        device = _own_device()
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    require_divisible(config, dist.get_world_size(), parallel)
    return Ranks(dist.get_rank(), dist.get_world_size(), parallel, device)


def leave() -> None:
    """Part from the other processes, all work done. Not for error paths: it waits for processes that may be gone."""
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may still be letting go of the last tensors, for which they need the interpreter: one that is being torn down
    # by then aborts the process (torch 2.13), and a complete run would end with an error.
    time.sleep(0.5)


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `world`. The first one, rank 0, leads: it alone writes, and decides where all must agree."""

    rank: int
    world: int
    parallel: str  # none, ddp or fsdp
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def record(self) -> dict[str, Any]:
        """For the provenance: rounding differs with the number of processes, and with the GPU and how it takes float32 products."""
        found: dict[str, Any] = {"processes": self.world, "parallel": self.parallel}
        if self.device.type == "cuda":
            name, precision = torch.cuda.get_device_name(self.device), torch.get_float32_matmul_precision()
            found["gpu"] = {"name": name, "cuda": torch.version.cuda, "float32": precision}
        return found

    def run(self, config: Config, root: Path | None) -> Run:
        """The run; it can be written by the first process only."""
        return Run(config, root) if self.leads else _Watched(config, root)

    def lead(self, work: Callable[[], Result]) -> Result:
        """What work() of the first process returns or raises, in every process."""
        if self.parallel == "none":
            return work()
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result

    def any(self, requested: str | None) -> str | None:
        """The name of a signal that any process got, in every process: they stop after the same step or not at all."""
        if self.parallel == "none":
            return requested
        number = torch.tensor(signal.Signals[requested].value if requested else 0)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else None

    def part(self, batches: Batches) -> Batches:
        """The rows of a step that are this process's: of B rows the B/world from rank * B/world on, in forwards no larger."""
        if self.world == 1:
            return batches
        sizes = [rows(batch) for batch in batches]
        each = sum(sizes) // self.world
        first, last = self.rank * each, (self.rank + 1) * each
        own, start = [], 0
        for batch, size in zip(batches, sizes, strict=True):  # the rest is not touched: of 4,096 photographs it has gigabytes
            if start < last and first < start + size:
                own.append(cut(batch, max(first - start, 0), min(last - start, size)))
            start += size
        return split(own[0] if len(own) == 1 else joined(own), sizes[0])

    def wrap(self, model: torch.nn.Module, forward: Forward, batches: Batches) -> torch.nn.Module:
        """The model on its device, replicated or sharded: one FSDP2 unit a block, and the root with the embeddings.

        forward, batches: those of a training step, for one row of which DDP is run, once.
        """
        if self.parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard  # half a second to import, for those who shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            blocks: Any = getattr(model, "blocks", ())
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)  # moves to the device unit by unit: no GPU ever holds the whole model
            return model
        model = model.to(self.device)
        if self.parallel == "none":
            return model
        replica = DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        # After its first backward DDP lays out its buckets anew, and with more than two processes the order of a sum depends on
        # the layout. Were that the first step's, a resumed run would not repeat the uninterrupted one bit for bit.
        inputs, _ = cut(batches[0], 0, 1)
        readout = {"readout": lambda h, weight: h.sum() + weight.sum()} if getattr(model, "has_readout", False) else {}
        with buffers_kept(model):  # of which batch normalization would count that row
            forward(replica, inputs, **readout).sum().backward()
        model.zero_grad()
        return replica

    def share_buffers(self, model: torch.nn.Module) -> None:
        """Give every process the first one's buffers, which are saved: else each would evaluate by its own running statistics."""
        if self.world == 1:
            return
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved:
                value = buffer.contiguous()
                dist.broadcast(value, src=0)
                buffer.copy_(value)


class _Watched(Run):
    """A run as the processes see it that do not lead: they write nothing."""

    def open(self, *_: Any, **__: Any) -> None:
        pass

    def restart_at(self, step: int) -> None:
        pass

    def log(self, kind: str, step: int, **values: Any) -> None:
        pass

    def write(self, name: str, content: dict[str, Any]) -> None:
        pass


def require_divisible(config: Config, world: int, parallel: str) -> None:
    """Raise UserError for a config that so many processes, by ddp or fsdp, cannot train, or would train to another result."""
    training, scope = config.training, config.method.options.get("scope")
    if training.batch % world:
        raise UserError(
            f"training.batch={training.batch} is not divisible by {world} processes: every process takes the same number of rows"
        )
    forwards = training.batch // config.micro_batch
    normalizes = config.model.kind == "convnet" and config.model.norm == "batch"  # by the statistics of a forward
    if (scope == "micro-batch" or normalizes) and forwards % world:
        what = "scope=micro-batch" if scope == "micro-batch" else "model.norm=batch"
        raise UserError(
            f"{what}: the {forwards} micro-batches of a step are not divisible by {world} processes; "
            f"a training.micro_batch of {training.batch // world} gives each process one (another run: it changes the result)"
        )
    if scope == "rank" and world > 1:
        raise UserError(
            f"scope=rank: the result would depend on the number of processes; scope=micro-batch with training.micro_batch="
            f"{training.batch // world} is the same for {world} processes, and fixed by the config"
        )
    if parallel == "fsdp" and config.measure.robustness:
        raise UserError(
            "measure.robustness needs whole parameters: train with runtime.parallel=ddp, or set measure.robustness=false"
        )
    if parallel == "fsdp" and config.measure.curvature:
        raise UserError("measure.curvature needs whole parameters: train with runtime.parallel=ddp, or set measure.curvature=false")
    if parallel == "fsdp" and config.optimizer.name == "adafactor":
        raise UserError("optimizer.name=adafactor factors whole matrices: train with runtime.parallel=ddp, or by adamw or sgd")


def _own_device() -> torch.device:
    """The GPU of this process: its own by LOCAL_RANK, or the only one that it sees (submitit hides the others)."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 0:
        raise UserError("runtime.device=cuda: no GPU is visible to this process; set runtime.device=cpu to train without")
    if count == 1:
        return torch.device("cuda", 0)
    if local >= count:
        raise UserError(f"local process {local} has no GPU: {count} are visible; start at most {count} processes a node")
    return torch.device("cuda", local)

"""Peak bytes of a training step by its storages: real on a CPU, or simulated (fake tensors, fake processes) for models of any size.

The private parts of torch that this project uses are all in this file (torch 2.13): TorchDispatchMode, FakeTensorMode, FakeStore.
torch's own MemTracker and FSDPMemTracker take one forward of each module a step, and SAM takes two.
"""

import contextlib
import weakref
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functional_sam import head
from functional_sam.models import Decoder, ViT
from functional_sam.planning.memory import rows
from functional_sam.sharpness import SharpnessAware
from functional_sam.sharpness.passes import Kept, Passes
from functional_sam.sharpness.perturbation import Perturbation, Step
from functional_sam.tasks.vision import IMAGES


class Storages(TorchDispatchMode):
    """Bytes of all storages that operations return, from when they are seen to when they are freed or resized (as FSDP2 does)."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def see(self, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = 0
                    weakref.finalize(storage, self._free, key)
                self._set(key, storage.nbytes())

    def _set(self, key, size):
        self.now += size - self.sizes[key]
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _free(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.see(result)
        return result

    def __enter__(self):
        original, tracker = torch.UntypedStorage.resize_, self

        def resize_(storage, size):
            result = original(storage, size)
            if storage._cdata in tracker.sizes:
                tracker._set(storage._cdata, size)
            return result

        self.patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)


def real(config):
    """Peak bytes of the second step on this CPU: by then the moments exist, and all that a method keeps."""
    return _peak(config, 1, None, steps=2)


def simulated(config, gpus, sharded):
    """The same without memory or processes: rank 0 of `gpus`. The numbers that the code reads from tensors are set to one.

    Of one step, to which the moments are given: for the methods that are simulated it has the bytes of the second one. The softmax
    sweeps over whole chunks: in parts it takes the same memory, and thousands of operations.
    """
    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (Passes, "sum_over_ranks", lambda self, *values: tuple(1.0 for _ in values)),
            (Passes, "_require_untouched", staticmethod(lambda *_: None)),
            (Passes, "rewind", lambda self, i, repeated: Kept(())),
            (Perturbation, "require_finite", lambda *_: None),
            (head, "SWEEP_BYTES", head.CHUNK_BYTES),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(mock.patch("functional_sam.ascents.norm", _one))
        stack.enter_context(mock.patch("functional_sam.sharpness.backward.norm", _one))
        stack.enter_context(mock.patch.object(SharpnessAware, "_backward", _backward))
        if gpus > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
            stack.callback(dist.destroy_process_group)
        mesh = init_device_mesh("cpu", (gpus,)) if sharded else None
        stack.enter_context(FakeTensorMode())
        return _peak(config, gpus, mesh, steps=1)


def _one(tensors, fast):
    """Not a Mock, which would keep what it was called with."""
    return 1.0


def _backward(self, batches):
    """SharpnessAware._backward without the losses, which are numbers."""
    self._passes.begin(batches)
    self._gradient(Step(batches))
    return torch.zeros(())


def _peak(config, gpus, mesh, steps):
    """Of the last of so many steps; of one alone with moments that a step with gradients of one has left."""
    model = model_of(config)
    if mesh is not None:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def forward(model, inputs, readout=None):
        with torch.autocast("cpu", torch.bfloat16) if config.training.precision == "bf16" else contextlib.nullcontext():
            return model(inputs, readout=readout)

    sharpness = SharpnessAware(model, optimizer, config.method.name, config.method.rho, forward=forward, **config.method.options)
    size, forwards = rows(config, gpus)
    batches = [batch_of(config, size) for _ in range(forwards)]
    if steps == 1:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
    tracker = Storages()
    tracker.see([*model.parameters(), *batches, *(value for state in optimizer.state.values() for value in state.values())])
    with tracker:
        for _ in range(steps):
            tracker.peak = tracker.now
            sharpness.backward(batches)
            optimizer.step()
            optimizer.zero_grad()
    return tracker.peak - sum(x.untyped_storage().nbytes() for batch in batches for x in batch)


def model_of(config):
    s, dtype = config.model, torch.float64 if config.training.precision == "float64" else torch.float32
    sizes = (s.width, s.depth, s.heads)
    options = {"head_dtype": s.head_dtype, "checkpoint_blocks": s.checkpoint_blocks, "dropout": s.dropout, "dtype": dtype}
    if config.kind == "language":
        return Decoder(config.data.vocab, *sizes, s.length, s.mlp, **options)
    channels, side, classes = IMAGES[config.data.images]
    return ViT(side, s.patch, classes, *sizes, s.mlp, channels, **options)


def batch_of(config, size):
    if config.kind == "language":
        tokens = torch.zeros(size, config.model.length + 1, dtype=torch.long)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    channels, side, _ = IMAGES[config.data.images]
    return torch.zeros(size, channels, side, side), torch.zeros(size, dtype=torch.long)

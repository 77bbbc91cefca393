"""Weights that are moved and put back, and where they live: inside wrappers, in shards, in replicas."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from functional_sam.errors import UserError
from functional_sam.vectors import local


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The caller's module inside DistributedDataParallel and torch.compile."""
    inner: Any = model
    while isinstance(inner, DistributedDataParallel) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner._orig_mod
    found: torch.nn.Module = inner
    return found


def replicas(model: torch.nn.Module) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules in the model: itself, or inside torch.compile or the caller's own module."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def is_sharded(model: torch.nn.Module) -> bool:
    """True when FSDP2 (or another DTensor scheme) holds the parameters in shards."""
    return any(hasattr(p, "device_mesh") for p in model.parameters())


def sharded_units(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that fully_shard (FSDP2) has been called on."""
    return [module for module in model.modules() if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)]


def parts_of_unit(unit: torch.nn.Module) -> list[Any]:
    """What FSDP2 keeps of the parameters of a unit: how it reduces their gradients."""
    state: Any = getattr(unit, "_get_fsdp_state", lambda: None)()
    return getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]


def process_group(model: torch.nn.Module) -> Any:
    """The group over which the model's gradients are averaged, or None for a model that lives in one process."""
    for replica in replicas(model):
        return replica.process_group
    for p in model.parameters():
        if hasattr(p, "device_mesh"):  # FSDP2 averages over its whole mesh, of one dimension or two (HSDP)
            return p.device_mesh.get_group() if p.device_mesh.ndim == 1 else dist.group.WORLD
    return None


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of the tensors on this process, of sharded ones its own shard."""
    return sum(local(t).nbytes for t in tensors)


def reshard(model: torch.nn.Module) -> None:
    """Drop the whole parameters that FSDP2 has gathered: they are of weights that change now."""
    for module in model.modules():  # is_sharded() cannot tell: a model that is one unit has no shards while it is gathered
        drop: Any = getattr(module, "reshard", None)
        if drop is not None:
            drop()


@contextlib.contextmanager
def moved(
    model: torch.nn.Module,
    parameters: Iterable[Tensor],
    move: Callable[[], None],
    memory: MutableMapping[Tensor, Tensor] | None = None,
) -> Iterator[dict[Tensor, Tensor]]:
    """The weights where `move` puts them inside the block, as they were, bit for bit, after it; yields {parameter: theta}.

    Restores by copy: theta + eps - eps is not theta in floating point. memory: copies of an earlier call, to be used again.
    Raises UserError inside of torch.nn.utils.parametrize.cached(), which would hand out the weights of before the move.
    """
    if getattr(parametrize, "_cache_enabled", 0) and any(map(parametrize.is_parametrized, model.modules())):
        raise UserError("inside of parametrize.cached(): the model would see weights from before they are moved; leave the block")
    with torch.no_grad():
        theta = {p: _copy(p, memory) for p in parameters}
        reshard(model)
        try:
            move()
            torch.clear_autocast_cache()  # casts of the weights as they were, if the caller has autocast around it all
            with torch.enable_grad():
                yield theta
        finally:
            reshard(model)
            for p, value in theta.items():
                p.copy_(value)
            torch.clear_autocast_cache()


def _copy(p: Tensor, memory: MutableMapping[Tensor, Tensor] | None) -> Tensor:
    if memory is None:
        return p.detach().clone()
    copy = memory.get(p)
    if copy is None or copy.shape != p.shape or copy.dtype != p.dtype or copy.device != p.device:
        copy = memory[p] = p.detach().clone()
        return copy
    return copy.copy_(p.detach())


@contextlib.contextmanager
def buffers_kept(model: torch.nn.Module, keep: bool = True) -> Iterator[None]:
    """Buffers (BatchNorm's running statistics ...) leave the block as they entered it."""
    restore = buffers_saved(model.modules()) if keep else None
    try:
        yield
    finally:
        if restore is not None:
            restore()


def buffers_saved(modules: Iterable[torch.nn.Module], always: bool = False) -> Callable[[], None]:
    """A function that puts the modules' own buffers back as they are now, in the tensors that hold them now, which may be replaced.

    Of none where no module, by its own flag, is in training, unless `always`.
    """
    modules = list(modules)
    held = [m for m in modules if m._buffers] if always or any(module.training for module in modules) else []
    places = [(module._buffers, dict(module._buffers), module._non_persistent_buffers_set) for module in held]
    copies = {buffer: buffer.detach().clone() for _, held, _ in places for buffer in held.values() if buffer is not None}

    @torch.no_grad()
    def restore() -> None:
        for buffers, held, caches in places:
            present = dict(buffers)  # a scripted module's is almost a dictionary
            for name, buffer in held.items():
                now = present.get(name)
                if now is not buffer and not (name in caches and has_grown(now, buffer)):
                    buffers[name] = buffer
        for buffer, copy in copies.items():
            if not (always and buffer.layout == torch.strided and torch.equal(buffer, copy)):  # a graph may have saved it
                _write(buffer, copy)

    return restore


MANY = 1000  # items, of which a list is data and holds no modules


def modules_of(function: Any) -> list[torch.nn.Module]:
    """The modules that calling `function` may run, with their parts: itself, or what it knows.

    That is by its closure, a global name, an argument or an attribute.
    """
    found: dict[torch.nn.Module, None] = {}
    pending, seen = [function], {}
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item  # held, or another one might get its id
        if isinstance(item, torch.nn.Module):
            found |= dict.fromkeys(item.modules())
        elif isinstance(item, list | tuple | dict):
            pending += (item.values() if isinstance(item, dict) else item) if len(item) < MANY else ()
        elif isinstance(item, MethodType):
            pending += [item.__func__, item.__self__]
        elif isinstance(item, functools.partial):
            pending += [item.func, item.args, item.keywords]
        elif isinstance(item, FunctionType):
            for cell in item.__closure__ or ():
                with contextlib.suppress(ValueError):  # a name without a value yet
                    pending.append(cell.cell_contents)
            named = [item.__globals__.get(name) for name in item.__code__.co_names]
            # Of functions elsewhere (a library's) it is not asked what they know.
            pending += [g for g in named if not isinstance(g, FunctionType) or g.__globals__ is item.__globals__]
            pending += [item.__defaults__ or (), item.__kwdefaults__ or {}, getattr(item, "__wrapped__", None)]
        elif not isinstance(item, type | ModuleType | Tensor):
            pending += [value for value in getattr(item, "__dict__", {}).values() if isinstance(value, torch.nn.Module)]
    return list(found)


def has_grown(now: Tensor | None, before: Tensor | None) -> bool:
    """Whether forward has replaced a buffer by one of another shape.

    One that is not saved with the model (persistent=False) is then a cache, of positions, whose size the module knows, and stays.
    """
    return now is not None and before is not None and now.shape != before.shape


def _write(buffer: Tensor, copy: Tensor) -> None:
    """The copy into the buffer; of an expanded one, several of whose elements are one place, into each place once."""
    for dimension in reversed(range(buffer.ndim if buffer.layout == torch.strided else 0)):
        if buffer.stride(dimension) == 0 and buffer.shape[dimension] > 1:
            buffer, copy = buffer.select(dimension, 0), copy.select(dimension, 0)
    buffer.copy_(copy)

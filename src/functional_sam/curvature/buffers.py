"""What a forward has changed that is to stay, buffers and batches, and what tensors of any layout consist of."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from functional_sam.weights import has_grown


def parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that a tensor of any layout consists of: itself, or values and places of a sparse or jagged one."""
    local: Any = tensor
    tensor = local.to_local() if hasattr(tensor, "device_mesh") else tensor
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return [tensor._values(), tensor._indices()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.values(), tensor.crow_indices(), tensor.col_indices()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.values(), tensor.ccol_indices(), tensor.row_indices()]
    if tensor.layout == torch.jagged:
        jagged: Any = tensor
        return [jagged.values(), jagged.offsets()]
    return [tensor] if tensor.layout == torch.strided and not tensor.is_nested else []


def version(tensor: Tensor) -> int:
    """How often it has been written to; those made under torch.inference_mode() do not count."""
    return 0 if tensor.is_inference() else tensor._version


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dictionaries."""
    if isinstance(batch, Tensor):
        yield batch
    for item in batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ():
        yield from tensors_of(item)


def written(batch: Any) -> list[tuple[int, int]]:
    """Which tensor and how often written to, of every tensor in nested lists, tuples and dictionaries."""
    return [(id(tensor), version(tensor)) for tensor in tensors_of(batch)]


class Buffers:
    """The buffers of modules as they are now."""

    def __init__(self, *models: nn.Module) -> None:
        self.training = any(module.training for model in models for module in model.modules())
        self.places: list[tuple[str, dict[str, Any], str, set[str], Tensor, int]] = []
        self.copies: dict[Tensor, Tensor] = {}
        for prefix, module in (named for model in models for named in model.named_modules()):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    full = f"{prefix}.{name}" if prefix else name
                    caches = module._non_persistent_buffers_set
                    self.places.append((full, module._buffers, name, caches, buffer, version(buffer)))
                    self.copies[buffer] = buffer.detach().clone()

    @torch.no_grad()
    def put_back(self) -> list[str]:
        """Give the buffers that hold other values since their old ones; returns their names.

        One that is not saved with the model, and has another shape now, is a cache that has grown (sines and cosines of positions),
        and stays. A counter of calls, of whole numbers, is put back and not named.
        """
        changed = []
        for full, held, name, caches, buffer, before in self.places:
            now = dict(held).get(name)  # a scripted module's is almost a dictionary
            if now is None or (now is buffer and version(now) == before and not self.training):
                continue  # writing past the version, by .data, is a habit of training
            copy = self.copies[buffer]
            if now is buffer:
                if not _same(now, copy):
                    changed += [full] if copy.is_floating_point() or copy.is_complex() else []
                    _write(held, name, buffer, copy)
            elif not (name in caches and has_grown(now, copy)) and (now.shape != copy.shape or not _same(now, copy)):
                changed += [full] if copy.is_floating_point() or copy.is_complex() else []
                held[name] = buffer
                if not _same(buffer, copy):
                    _write(held, name, buffer, copy)
        return changed


def _write(held: dict[str, Any], name: str, buffer: Tensor, copy: Tensor) -> None:
    if buffer.layout == torch.strided and not buffer.is_nested:
        buffer.copy_(copy)
    else:
        held[name] = copy


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but that any nan is one; what is on the meta device has no values."""
    return a.is_meta or (
        a.device == b.device
        and all(
            x.shape == y.shape
            and (torch.equal(x, y) or (x.is_floating_point() and torch.allclose(x, y, rtol=0.0, atol=0.0, equal_nan=True)))
            for x, y in zip(parts(a), parts(b), strict=True)
        )
    )

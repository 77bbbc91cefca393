"""A symmetric matrix over the parameters, known by its products: `H(v)` or `H @ v`."""

from collections.abc import Callable, Mapping, Sequence
from typing import overload

from torch import Tensor, nn

from functional_sam.errors import UserError

Vector = Sequence[Tensor] | Mapping[str, Tensor]


class Names:
    """The parameters in their order and by their names, for vectors that are lists and for vectors that are dictionaries."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        known = {p: name for name, p in model.named_parameters()}
        self.names = [known.get(p, f"parameter {i}") for i, p in enumerate(self.parameters)]

    def listed(self, v: Vector) -> list[Tensor]:
        """v as a list, checked. Raises UserError for other names and for other shapes."""
        if isinstance(v, Mapping):
            missing, strange = [n for n in self.names if n not in v], [n for n in v if n not in self.names]
            if missing or strange:
                wrong = f"lacks {missing[0]!r}" if missing else f"has {strange[0]!r}, which is none of the parameters"
                raise UserError(f"v {wrong}: give one tensor for each of {', '.join(self.names[:4])} ...")
            v = [v[name] for name in self.names]
        given, wanted = [tuple(t.shape) for t in v], [tuple(p.shape) for p in self.parameters]
        if given != wanted:
            raise UserError(f"v has shapes {given}, the parameters {wanted}: give one tensor for each parameter")
        return [tensor.detach() for tensor in v]

    @overload
    def as_given(self, result: list[Tensor], v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    @overload
    def as_given(self, result: list[Tensor], v: Sequence[Tensor]) -> list[Tensor]: ...

    def as_given(self, result: list[Tensor], v: Vector) -> dict[str, Tensor] | list[Tensor]:
        """The result as v was given: a dictionary or a list."""
        return dict(zip(self.names, result, strict=True)) if isinstance(v, Mapping) else result


class Operator:
    """v -> A v. A vector is a list of tensors shaped like `parameters`, or a dictionary by their names; so is the result."""

    def __init__(self, product: Callable[[list[Tensor]], list[Tensor]], names: Names) -> None:
        self._product, self._names = product, names

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self._names.parameters

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), P the number of parameters."""
        size = sum(p.numel() for p in self.parameters)
        return size, size

    @overload
    def __call__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    @overload
    def __call__(self, v: Sequence[Tensor]) -> list[Tensor]: ...

    def __call__(self, v: Vector) -> dict[str, Tensor] | list[Tensor]:
        return self._names.as_given(self._product(self._names.listed(v)), v)

    @overload
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    @overload
    def __matmul__(self, v: Sequence[Tensor]) -> list[Tensor]: ...

    def __matmul__(self, v: Vector) -> dict[str, Tensor] | list[Tensor]:
        return self(v)

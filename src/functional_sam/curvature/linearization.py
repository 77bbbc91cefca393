"""The graph of one batch from which every curvature product is taken, as often as wanted.

theta the parameters, y = y(theta) the outputs: the logits z, or (h, W), last hidden state and head, where the model gives them.
L(y) the loss summed over the batch (outer.py), c = dL/dy, J = dy/dtheta, v a direction.

One forward and one backward leave the graph of the gradient g = J(theta)^T c(y(theta)). It is made of the nodes of J^T, and of one
Node for y -> c, whose derivative is that of the loss alone and is done by hand. Backward through it with v gives, in units of one
forward F (a gradient is 3 F),

    down to c only                                                    J v                              2 F
    down to theta, Node answers dy = J v with both parts of dc        H v                              6 F
    down to theta, Node answers with the functional part              H_F v, and J v on the way        6 F

and one backward through the forward makes H_G v = J^T (d2L/dz2) J v of the first: 4 F.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from functional_sam.curvature.buffers import parts
from functional_sam.curvature.functions import tangents_only
from functional_sam.curvature.outer import CrossEntropyOnLogits, LossFn, OnHead, OnLogits, Outer, Tangents, by_classes, pull_back
from functional_sam.derivatives import nodes, padding_watched, watch_kernel
from functional_sam.errors import UserError
from functional_sam.losses import require_logits

Forward = Callable[..., Any]  # (model, inputs), and readout= of a model that has one


class Linearization:
    """Products for one batch, its sums not yet divided by the number of targets.

    keep_bytes: what it may hold of u. num_bytes: what it holds in all but the parameters. functions: what forward and loss_fn are
    called inside of.
    Raises ChangedInPlace, at any time, for a graph one of whose tensors has been written to since; DifferentiatesItself where
    functions do not allow it; UserError for outputs that depend on no parameter, and for ones that are not dense.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        readout: bool,
        loss_fn: LossFn,
        parameters: Sequence[nn.Parameter],
        inputs: Any,
        targets: Any,
        keep_bytes: float,
        functions: AbstractContextManager[Any],
    ) -> None:
        self.parameters = list(parameters)
        held = _Held(model)
        with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
            outer: Outer
            if readout and by_classes(loss_fn, targets):
                with functions, padding_watched(model):
                    h, weight = forward(model, inputs, readout=_handed_over)
                require_graph(h.requires_grad or weight.requires_grad)
                by_weight = weight.requires_grad and (not weight.is_leaf or any(weight is p for p in parameters))
                outputs = [h] * h.requires_grad + [weight] * by_weight
                outer = OnHead(h, weight, targets, h.requires_grad, by_weight, keep_bytes)
            else:
                with functions, padding_watched(model):
                    z = forward(model, inputs)
                require_dense(z)
                require_logits(z, targets, loss_fn)
                require_graph(z.requires_grad)
                outputs = [z] * z.requires_grad
                closed = by_classes(loss_fn, targets)
                outer = (
                    CrossEntropyOnLogits(z, targets)
                    if closed
                    else OnLogits(z, targets, loss_fn, functions, set(model.parameters()))
                )
            _require_second_derivatives(outputs)
            self.loss, self.count = outer.loss, outer.count
            self.state = _State(outer)
            # No graph of y -> c but this one, or its backward would also run through the loss.
            self.c: tuple[Tensor, ...] = _Node.apply(self.state, *outputs) if outputs else ()  # type: ignore[no-untyped-call]
            self.g = pull_back(outputs, self.parameters, self.c, create_graph=True)
            if any(g_i.layout != torch.strided for g_i in self.g):
                raise UserError("sparse gradients have no second derivative: build the embedding with sparse=False")
        # The place of the outputs in the graph is enough: logits need not be held for it.
        self.outputs = [get_gradient_edge(output) for output in outputs]
        self._graph_bytes = held.num_bytes

    @property
    def num_bytes(self) -> int:
        return self._graph_bytes + self.state.outer.num_bytes

    def drop_cotangent(self) -> None:
        """Give up u, which can be made again from the graph."""
        if isinstance(self.state.outer, OnHead):
            self.state.outer.u_NV = None

    def gradient(self) -> list[Tensor]:
        """J^T c."""
        return [g_i.detach() for g_i in self.g]

    def hessian(self, v: Sequence[Tensor], keep: bool) -> list[Tensor]:
        """H v. keep: the graph will be asked again."""
        return self._through_gradient(v, True, keep)

    def gauss_newton(self, v: Sequence[Tensor], keep: bool) -> list[Tensor]:
        """H_G v."""
        with tangents_only():
            Jv = pull_back(self.g, self.c, v, retain_graph=True)
        return self._logit_half(Jv, keep)

    def functional(self, v: Sequence[Tensor], keep: bool) -> list[Tensor]:
        """H_F v."""
        return self._through_gradient(v, False, keep)

    def split(self, v: Sequence[Tensor], keep: bool) -> list[Tensor]:
        """H_G v and H_F v, one after the other in one list: 8 F."""
        functional = self._through_gradient(v, False, True)
        return [*self._logit_half(self.state.dy, keep), *functional]

    def _through_gradient(self, v: Sequence[Tensor], logit: bool, keep: bool) -> list[Tensor]:
        self.state.logit, self.state.dy = logit, [None] * len(self.outputs)
        return pull_back(self.g, self.parameters, v, retain_graph=keep)

    def _logit_half(self, dy: Tangents, keep: bool) -> list[Tensor]:
        dc = self.state.outer.second(dy, logit=True, functional=False)
        self.state.dy = []
        return pull_back(self.outputs, self.parameters, dc, retain_graph=keep)


def require_dense(z: Any) -> None:
    """Raise UserError for sparse and for jagged logits."""
    if isinstance(z, Tensor) and (z.layout != torch.strided or z.is_nested):
        raise UserError(f"forward returned logits of layout {z.layout}: let it return a dense tensor, z.to_dense() or z.values()")


def require_graph(there_is: bool) -> None:
    """Raise UserError unless something of what forward returned can be differentiated."""
    if not there_is:
        raise UserError(
            "forward returned logits that depend on no parameter: it runs under no_grad, or detaches them, and gradient and "
            "curvature would be zero. loss() alone needs no graph"
        )


def _handed_over(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    require_graph(torch.is_grad_enabled())  # without gradients the weight, a parameter, would still say that it has one
    return h, weight


def _require_second_derivatives(outputs: Sequence[Tensor]) -> None:
    """Raise UserError, now or in the backward, for a graph of which autograd gives zeros where it does not raise."""
    for node in nodes(outputs):
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise UserError(
                "curvature of a model with blocks under checkpoint(..., use_reentrant=True), which have no second derivative: "
                "use_reentrant=False, no checkpointing, or method='difference'"
            )
        watch_kernel(node)


class _State:
    """What Node is to answer with, and the dy it was asked with. It holds no graph, or Node and graph would never be freed."""

    def __init__(self, outer: Outer) -> None:
        self.outer, self.logit = outer, False
        self.dy: Tangents = []


class _Node(torch.autograd.Function):
    """y -> c."""

    @staticmethod
    def forward(ctx: Any, state: _State, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.state = state
        return tuple(state.outer.cotangents())

    @staticmethod
    def backward(ctx: Any, *dy: Tensor | None) -> tuple[Any, ...]:
        state: _State = ctx.state
        state.dy = dy
        return None, *state.outer.second(dy, state.logit, functional=True)


class ChangedInPlace(UserError):
    """A tensor that a graph has saved was written to afterwards."""


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    if torch._is_zerotensor(tensor):  # a tangent of torch.func.jvp, without memory
        return ()
    return (tensor,) if tensor.layout == torch.strided and not tensor.is_nested else parts(tensor)


class _Held:
    """Counts what a graph saves, each storage once, parameters and buffers not, and sees to it that nothing of it is changed."""

    def __init__(self, model: nn.Module) -> None:
        self.num_bytes = 0
        tensors = [*model.parameters(), *model.buffers()]
        self.seen = {part.untyped_storage().data_ptr() for tensor in tensors for part in _parts(tensor)}

    def pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.num_bytes += storage.nbytes()
        # Detached, for an output that its own node holds would keep itself alive; autograd gives it its history back. With hooks
        # autograd does not look at versions itself.
        return tensor.detach(), tensor._version

    @staticmethod
    def unpack(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        if tensor._version != version:
            raise ChangedInPlace(
                f"a tensor of shape {list(tensor.shape)} that the derivatives need was changed in place: by forward after its use "
                "(y = y + x in the place of y += x), or, what forward or loss_fn reads beside the batch, between two products "
                "(release() first). method='difference' allows the former"
            )
        return tensor

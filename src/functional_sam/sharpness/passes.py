"""The passes of one step: forward and backward over all its micro-batches, at whatever weights the model holds now.

A pass leaves its gradient in .grad, divided by the number of valid targets of the whole step (all micro-batches, all ranks), so
that k micro-batches equal one batch. What a later pass at other weights needs of a micro-batch is kept in a Kept.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functional_sam.derivatives import slow_attention
from functional_sam.errors import UserError
from functional_sam.head import compute_dtype, pull_back, reads_out
from functional_sam.losses import require_logits, require_rows
from functional_sam.sharpness import first_step
from functional_sam.sharpness.buffers import Buffers
from functional_sam.sharpness.counting import Batch, Counting, Kept, LossFn
from functional_sam.sharpness.randomness import Randomness, random_state, set_random_state
from functional_sam.weights import is_sharded, local_bytes, replicas, reshard, sharded_units, unwrapped

__all__ = ["Batch", "Kept", "LossFn", "Passes"]


def _forward(model: torch.nn.Module, inputs: Any, **readout: Any) -> Any:
    return model(inputs, **readout)


class Passes(Counting):
    """Runs passes for one model, loss and forward function; SharpnessAware explains the arguments."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: LossFn,
        forward: Callable[..., Any] | None,
        keep: str,
        keep_dtype: torch.dtype | None,
    ):
        super().__init__(model, loss_fn)
        self.keep_dtype = keep_dtype
        self.forward: Callable[..., Any] = forward or _forward
        possible = reads_out(unwrapped(model), forward, loss_fn)
        if keep in ("hidden", "u") and not possible:
            raise UserError(
                f'keep="{keep}" needs a model with has_readout, a forward that takes readout=, and the default loss_fn; '
                'use keep="auto" or keep="cotangent"'
            )
        self.may_fuse = self.fused = possible and keep != "cotangent"  # fused: in the step at work
        self.keep_u = None if keep == "auto" else keep == "u"  # None: decided at the first step that keeps anything
        self.parameter_bytes = local_bytes(model.parameters())  # now: inside of a forward FSDP2 has some of them gathered
        self.sharded = is_sharded(model)
        self.replicas = replicas(model)
        if any(replica.static_graph for replica in self.replicas):
            raise UserError("DDP(static_graph=True) takes one synchronized pass a step: build it with static_graph=False")
        self.watched: list[Tensor] | None = None  # in the first step: the weights, which no pass may change
        self.others: first_step.Others = []  # met in that step
        self.units = sharded_units(model)
        self.buffers = Buffers(model, self.forward, loss_fn)
        self._job: Callable[[Tensor, Tensor], Tensor] | None = None
        self._eager_readout: Callable[[Tensor, Tensor], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is bound to this very object: a copy would run the original's readout."""
        return self.__dict__ | {"_job": None, "_eager_readout": None, "others": []}

    def begin(self, batches: Sequence[Batch]) -> None:
        """Start a step: note the buffers, settle the divisor, and choose whether the head is evaluated in chunks."""
        self.buffers.mark()
        self.start(batches)
        # Soft labels need whole logits.
        self.fused = self.may_fuse and not any(targets.is_floating_point() for _, targets in batches)
        self.num_targets = sum(targets.numel() for _, targets in batches) if self.fused else 0  # of this process

    # ------------------------------------------------------------------ the passes

    def gradient(
        self,
        batches: Sequence[Batch],
        *,
        repeated: Sequence[Kept] | None = None,
        remember: bool = False,
        logits: bool = False,
        sync: bool = True,
    ) -> list[Kept]:
        """Add J^T u at the weights as they are to .grad; return what was kept of each micro-batch.

        repeated: an earlier pass whose random numbers are drawn again. remember, logits: keep u, keep the logits (with a readout
        (h, weight) stands for either). sync: average over ranks in the last micro-batch's backward.
        """
        kept: list[Kept] = []
        before = [p._version for p in self.watched] if self.watched is not None else []
        for i, (inputs, targets) in enumerate(batches):
            memory = self.rewind(i, repeated)
            given = first_step.versions(inputs, targets) if self.watched is not None else None
            with self._synchronized(sync and i == len(batches) - 1):
                if self.fused:
                    loss = self._call(inputs, partial(self._loss_readout, targets, memory, kept, remember, logits))
                    self._look_at(loss, inputs)
                    memory.returned = loss.detach()
                    torch.autograd.backward(loss)
                else:
                    z = self.forward(self.model, inputs)
                    u = self._cotangent(z, targets, memory, repeated[i] if repeated else None)
                    self._look_at(z, inputs)
                    torch.autograd.backward(z, u)
                    if remember:
                        memory.u = self._as_kept(u)
                    if logits:
                        memory.logits = z.detach()
                    del z, u
            if given is not None:
                first_step.require_same_batch(given, inputs, targets)
            kept.append(memory)
        if self.watched is not None:
            first_step.require_same_weights(before, self.watched)
            first_step.require_gradients(self.model.parameters())
        return kept

    def cotangents(
        self, batches: Sequence[Batch], *, repeated: Sequence[Kept] | None = None, copy_weight: bool = False, logits: bool = False
    ) -> list[Kept]:
        """Keep the cotangents (or the logits) at the weights as they are: a forward without a gradient.

        With a readout only (h, weight) is kept and the head is not evaluated at all. copy_weight: the weights will have changed
        when it is used, so keep a copy of the head's.
        """
        kept: list[Kept] = []
        for i, (inputs, targets) in enumerate(batches):
            memory = self.rewind(i, repeated)
            with _without_gradients():
                if self.fused:
                    self._call(inputs, partial(self._keeping_readout, memory, kept, copy_weight))
                else:
                    z = self.forward(self.model, inputs)
                    if logits:
                        memory.logits = z
                    else:
                        memory.u = self._as_kept(self._cotangent(z, targets, memory, repeated[i] if repeated else None))
            kept.append(memory)
        reshard(self.model)  # a root module stays gathered after forward; the next pass must gather the weights it will then have
        return kept

    def pull(
        self,
        batches: Sequence[Batch],
        kept: Sequence[Kept],
        theta: Mapping[Tensor, Tensor],
        *,
        weight_kept: float = 1.0,
        weight_here: float = 0.0,
        sync: bool = True,
    ) -> None:
        """Add J^T (weight_kept * u_kept + weight_here * u), J and u at the weights as they are, to .grad, in one backward.

        u_kept: the cotangent that an earlier pass kept. theta: parameter -> its values in that pass.
        """
        for i, ((inputs, targets), memory) in enumerate(zip(batches, kept, strict=True)):
            self.rewind(i, kept)
            with self._synchronized(sync and i == len(batches) - 1):
                if self.fused:
                    loss = self._call(inputs, partial(self._pull_readout, targets, memory, theta, weight_kept, weight_here))
                    if not weight_here:
                        memory.returned = loss.detach() / weight_kept
                    torch.autograd.backward(loss)
                else:
                    assert memory.u is not None
                    z = self.forward(self.model, inputs)
                    u = memory.u.to(z.dtype)
                    if weight_here or weight_kept != 1.0:
                        u = u * weight_kept + self._cotangent(z, targets, Kept(()), memory) * weight_here
                    torch.autograd.backward(z, u)

    def _look_at(self, z: Tensor, inputs: Any) -> None:
        first_step.require_graph(z)
        if self.watched is not None and not self.sharded:  # of FSDP2 the graph has the gathered parameters
            self.others += first_step.others(self.model, z, inputs)

    # ------------------------------------------------------------------ loss and cotangent

    def _cotangent(self, logits: Tensor, targets: Tensor, memory: Kept, earlier: Kept | None = None) -> Tensor:
        """Return dL/dlogits of a micro-batch, L its part of the step's mean loss; its loss and count go into `memory`.

        earlier: what an earlier pass kept of the same micro-batch.
        """
        if self.watched is not None:
            require_logits(logits, targets, self.loss_fn)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            try:
                result = self.loss_fn(leaf, targets)
            except RuntimeError as error:
                if "a leaf Variable that requires grad is being used in an in-place operation" in str(error):
                    raise UserError("loss_fn changes its logits in place: let it work on a copy, logits.clone()") from error
                raise
            if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor) and result[0].ndim == 0):
                raise UserError(
                    f"loss_fn returned a {type(result).__name__}: expected (sum over valid targets, number of valid targets); "
                    "a mean alone cannot be combined over micro-batches"
                )
            total, count = result
            first_step.require_of_logits(self.model, leaf, total, count)
            if self.watched is not None:
                first_step.require_sum(self.loss_fn, leaf, targets, total, count)
            memory.count = torch.as_tensor(count, device=logits.device).reshape(())
            scaled = total * (1.0 / self.divisor_after(memory.count, earlier))
            (u,) = torch.autograd.grad(scaled, leaf)
        memory.loss = scaled.detach()
        return u

    def _as_kept(self, u: Tensor) -> Tensor:
        # Contiguous, for of a loss that is a plain sum it may be one number, expanded, and it is scaled in place later.
        return (u if self.keep_dtype is None else u.to(self.keep_dtype)).contiguous()

    def _call(self, inputs: Any, job: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Run forward with `job(h, weight)` in the place of the head; return what forward returns, which is what job did."""
        # One callable for the life of this object, or torch.compile would guard on a new one at every call. Whoever compiled
        # anything has imported torch._dynamo, which is slow to import for those who did not.
        readout: Callable[[Tensor, Tensor], Tensor] = self._run_job
        if "torch._dynamo" in sys.modules:
            if self._eager_readout is None:
                self._eager_readout = torch.compiler.disable(self._run_job)  # type: ignore[no-untyped-call]
            readout = self._eager_readout
        self._job = job
        try:
            result: Tensor = self.forward(self.model, inputs, readout=readout)
        finally:
            self._job = None
        return result

    def _run_job(self, h: Tensor, weight: Tensor) -> Tensor:
        assert self._job is not None
        return self._job(h, weight)

    def _loss_readout(
        self, targets: Tensor, memory: Kept, earlier: list[Kept], remember: bool, logits: bool, h: Tensor, weight: Tensor
    ) -> Tensor:
        """Readout of `gradient`: the loss, whose backward gives J^T u. earlier: what was kept of the micro-batches before."""
        if self.watched is not None:
            require_rows(h.shape[:-1], h.shape[:-1] + weight.shape[:1], targets)
        if remember and self._keeps_u(h, weight):
            # The one place where u is ever whole: it saves a third of the head's work in the next pass.
            memory.u = torch.empty(targets.numel(), len(weight), dtype=self.keep_dtype or compute_dtype(h), device=h.device)
        if logits or (remember and memory.u is None):
            self._keep(memory, earlier, False, h, weight)
        return self._pulled(memory, h, weight, h, weight, targets, u=memory.u)

    def _keeps_u(self, h: Tensor, weight: Tensor) -> bool:
        """keep="auto" keeps u where that takes no more memory than one copy of the parameters, once and for all steps."""
        if self.keep_u is None:
            itemsize = (self.keep_dtype or compute_dtype(h)).itemsize
            self.keep_u = self.num_targets * len(weight) * itemsize <= self.parameter_bytes
        return self.keep_u

    def _keeping_readout(self, memory: Kept, earlier: list[Kept], copy: bool, h: Tensor, weight: Tensor) -> Tensor:
        """Readout of `cotangents`: no head at all."""
        self._keep(memory, earlier, copy, h, weight)
        return h

    def _keep(self, memory: Kept, earlier: list[Kept], copy: bool, h: Tensor, weight: Tensor) -> None:
        """Keep (h, weight), the head's weight by reference where it will be found again, or one copy for all micro-batches."""
        memory.h, memory.weight = h.detach(), weight.detach()
        # A parameter is found again in `theta`. A view of one would move with it, FSDP2's whole parameter is freed.
        if isinstance(weight, torch.nn.Parameter) and not (copy or self.sharded):
            memory.weight = weight
        elif earlier and self._is_same(earlier[0].weight, weight):
            memory.weight = earlier[0].weight  # one copy serves all micro-batches
        else:
            memory.weight = weight.detach().clone()

    @staticmethod
    def _is_same(kept: Tensor | None, weight: Tensor) -> bool:
        """Whether `weight` is the head that an earlier micro-batch kept, and no function of the inputs or of chance."""
        return kept is not None and (isinstance(weight, torch.nn.Parameter) or torch.equal(kept, weight))

    def _pull_readout(
        self,
        targets: Tensor,
        memory: Kept,
        theta: Mapping[Tensor, Tensor],
        weight_kept: float,
        weight_here: float,
        h: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Readout of `pull`: a scalar whose backward gives J^T (weight_kept * u_kept + weight_here * u)."""
        if memory.u is not None:
            result = self._pulled(memory, h, weight, h, weight, targets, weight_kept, memory.u, True)
        else:
            assert memory.h is not None
            assert memory.weight is not None
            there = theta.get(memory.weight, memory.weight)
            result = self._pulled(memory, h, weight, memory.h, there, targets, weight_kept)
        if weight_here:
            result = result + self._pulled(Kept(()), h, weight, h, weight, targets, weight_here)
        return result

    def _pulled(
        self,
        memory: Kept,
        h: Tensor,
        weight: Tensor,
        h_u: Tensor,
        weight_u: Tensor,
        targets: Tensor,
        factor: float = 1.0,
        u: Tensor | None = None,
        known: bool = False,
    ) -> Tensor:
        """factor * head.pull_back over the divisor of the step, whose loss goes into `memory`, or with u `known` comes from it."""
        assert self.divisor is not None
        scaled = pull_back(h, weight, h_u, weight_u, targets, factor / self.divisor, u, known)
        if u is None or not known:
            memory.loss = scaled.detach() / factor
        elif memory.loss is not None:
            scaled = scaled + memory.loss * factor
        return scaled

    # ------------------------------------------------------------------ randomness and ranks

    def rewind(self, i: int, repeated: Sequence[Kept] | None) -> Kept:
        """Start micro-batch i: set the random state to what it was in pass `repeated`, if any, and note it in a new record."""
        if repeated is not None:
            self.set_random_state(repeated[i].rng)
        return Kept(self.random_state())

    def random_state(self) -> Randomness:
        """Return the state of every global generator that a forward may draw from."""
        return random_state(self._device)

    def set_random_state(self, rng: Randomness) -> None:
        """The inverse of random_state."""
        set_random_state(rng, self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _synchronized(self, sync: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP averages gradients in the backward whose FORWARD ran with synchronization on, so this wraps both."""
        stack = contextlib.ExitStack()
        for replica in [] if sync else self.replicas:
            stack.enter_context(replica.no_sync())
        return stack


@contextlib.contextmanager
def _without_gradients() -> Iterator[None]:
    """no_grad, where a forward is still the function that it is with gradients."""
    try:
        with slow_attention(), torch.no_grad():
            yield
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise UserError(
                "forward takes a derivative itself, and this pass runs it under no_grad: let it do so under torch.enable_grad()"
            ) from error
        raise

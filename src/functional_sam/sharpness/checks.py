"""Whether a method, its radius and its options fit the model and the optimizer: refused here, before any step."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from functional_sam.errors import UserError
from functional_sam.moments import has_rho_of_its_own, owners, parts_of, require_state
from functional_sam.sharpness.methods import Method
from functional_sam.vectors import local
from functional_sam.weights import is_sharded, parts_of_unit, process_group, replicas, sharded_units, unwrapped


def check(method: Method, options: dict[str, Any], model: torch.nn.Module, optimizer: Any, loss_fn: Callable[..., Any]) -> None:
    """Raise UserError for what cannot work, and fill in options["lr_max"], the highest learning rate, from the optimizer."""
    require_known_wrappers(model)
    require_plain_embeddings(model)
    require_parameters(model)
    require_no_parameters(loss_fn, model)
    require_the_models_own(model, optimizer)
    require_shards_averaged(model, optimizer)
    if method.path != "plain":
        require_no_shared_memory(model)
        _require_minimizing(optimizer)
    if any(p.is_complex() for p in model.parameters()):
        _require_complex(method, options)
    _require_radii(options, optimizer)
    require_moments(method, options, model, optimizer)
    _require_one_process(method, options, model)
    _warn_of_lone_processes(model)


def _require_minimizing(optimizer: Any) -> None:
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise UserError(
            "optimizer(maximize=True) is not supported: eps would improve the objective. Minimize, and put the sign into loss_fn"
        )


def _require_radii(options: dict[str, Any], optimizer: Any) -> None:
    """Raise UserError for a group's "rho" that is no radius, or learning rates that rho cannot follow; fill in lr_max."""
    for part in parts_of(optimizer):
        for group in [] if has_rho_of_its_own(part) else part.param_groups:
            radius(group.get("rho", 0.0), "in a parameter group")
    if options["lr_max"] is None:
        # OneCycleLR starts far below its "max_lr", of which initial_lr is a part.
        rates = [group.get("max_lr", group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        options["lr_max"] = max(map(float, rates))
    if options["rho_schedule"] == "lr" and options["lr_max"] <= options["lr_min"]:
        raise UserError(
            f'rho_schedule="lr": lr_max={options["lr_max"]:g} is not above lr_min={options["lr_min"]:g}; give lr_max=, the highest '
            "learning rate of the run (by default the optimizer's when SharpnessAware is made)"
        )


def _require_one_process(method: Method, options: dict[str, Any], model: torch.nn.Module) -> None:
    """Raise UserError where scope needs whole parameters on each rank, or exact derivatives one process, and there are others."""
    sharded = is_sharded(model)
    if options["scope"] != "step" and sharded:
        raise UserError(f'scope={options["scope"]!r} needs whole parameters on each rank (DDP); with sharded ones use scope="step"')
    if method.path == "penalty" and options["derivative"] == "exact":
        if sharded or replicas(model):
            raise UserError('exact second derivatives need the model in one process: use derivative="difference"')
        require_no_hooks(model)


def _warn_of_lone_processes(model: torch.nn.Module) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and process_group(model) is None:
        warnings.warn(
            f"{dist.get_world_size()} processes, and this model averages its gradients over none of them: give SharpnessAware the "
            "model that DistributedDataParallel or fully_shard has wrapped",
            stacklevel=4,
        )


def require_moments(method: Method, options: dict[str, Any], model: torch.nn.Module, optimizer: Any, stepped: bool = False) -> None:
    """Raise UserError where the ascent reads moments that the optimizer does not keep for the parameters to perturb."""
    require_state(
        method.ascent, optimizer, options.get("preconditioned", False), params=chosen(model, options["subset"]), stepped=stepped
    )


def require_known_wrappers(model: torch.nn.Module) -> None:
    """Raise UserError for a wrapper that shards or steps behind our back: FSDP1, DeepSpeed."""
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "FullyShardedDataParallel" in kinds:
            raise UserError(
                "FullyShardedDataParallel (FSDP1) gives each rank a flat shard, whose norm is not the gradient's: use FSDP2, "
                "torch.distributed.fsdp.fully_shard (in Accelerate fsdp_version=2, in Lightning ModelParallelStrategy)"
            )
        if kinds & {"DeepSpeedEngine", "PipelineEngine"}:
            raise UserError("DeepSpeed owns backward and shards behind it: use DistributedDataParallel or fully_shard (FSDP2)")
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id") or hasattr(p, "_is_flat_param"):
            raise UserError(f"parameter {name} belongs to DeepSpeed or FSDP1: use DistributedDataParallel or fully_shard (FSDP2)")


def require_plain_embeddings(model: torch.nn.Module) -> None:
    """Raise UserError for an embedding with sparse gradients, or one that writes to its weights in forward."""
    for module in model.modules():
        if not isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            continue
        if module.sparse:
            raise UserError(f"{type(module).__name__}(sparse=True): sparse gradients are not supported, use sparse=False")
        if module.max_norm is not None and module.weight.requires_grad:
            raise UserError(
                f"{type(module).__name__}(max_norm={module.max_norm:g}) writes to its weights in forward, so passes would differ: "
                "bound the norms after optimizer.step()"
            )


def require_shards_averaged(model: torch.nn.Module, optimizer: Any) -> None:
    """Raise UserError where FSDP2 does not average the gradients over all ranks."""
    units = sharded_units(model)
    if not units:
        require_all_in_shards(model, optimizer)
        return
    if any(p.requires_grad and not hasattr(p, "device_mesh") for p in owners(optimizer)):
        raise UserError(
            "fully_shard(ignored_params=...) leaves trainable parameters whose gradients are not averaged over ranks: shard them "
            "too, or requires_grad_(False)"
        )
    world = dist.get_world_size(process_group(model))
    for module in units:
        for part in parts_of_unit(module):
            factor = getattr(part, "gradient_divide_factor", None)
            if factor not in (None, world):
                raise UserError(
                    f"set_gradient_divide_factor({factor:g}) on {world} ranks: losses here are means over the targets of all "
                    "ranks, and gradients are averaged. Leave the factor out (None); loss_fn returns the sum and number of this "
                    "rank's targets"
                )


def require_all_in_shards(model: torch.nn.Module, optimizer: Any) -> None:
    """Raise UserError for trained parameters of which some are DTensors (tensor parallelism) and some are not."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    trained = [p for p in owners(optimizer) if p.requires_grad and p in names]
    plain = [p for p in trained if not hasattr(p, "device_mesh")]
    if plain and len(plain) < len(trained):
        raise UserError(
            f"{names[plain[0]]} is a plain tensor and other trained parameters are DTensors (tensor parallelism): one norm and one "
            "step cannot be taken of both. Put it into the plan of parallelize_module too (SequenceParallel() for a norm), or "
            "requires_grad_(False)"
        )


def require_synchronized(replicas: Iterable[DistributedDataParallel], units: Iterable[torch.nn.Module]) -> None:
    """Raise UserError where gradients would not be averaged, and inside of DDP's join(), which accounts for one pass a step.

    Asked in every step, at no cost.
    """
    parts = [part for unit in units for part in parts_of_unit(unit)]
    if any(not replica.require_backward_grad_sync for replica in replicas) or any(
        not (getattr(part, "reduce_grads", True) and getattr(part, "all_reduce_grads", True)) for part in parts
    ):
        raise UserError(
            "inside of no_sync(), or after set_requires_gradient_sync(False): gradients would stay each rank's own, and replicas "
            "drift apart. All micro-batches of a step go into ONE backward([(inputs, targets), ...]), outside of it"
        )
    for replica in replicas:
        if getattr(getattr(replica, "_join_config", None), "enable", False):
            raise UserError(
                "inside of DistributedDataParallel.join(), which accounts for one pass a step, where there are several: give all "
                "ranks as many steps (drop_last=True, or a micro-batch whose targets are all -100)"
            )


def require_no_shared_memory(model: torch.nn.Module) -> None:
    """Raise UserError for two trained Parameters in the same memory, which would be moved twice. Tied ones are one Parameter."""
    places = []
    for name, p in model.named_parameters():
        dense = local(p.detach())
        real = dense.layout == torch.strided and not hasattr(dense, "fake_mode")  # of a simulated one there is no memory
        if p.requires_grad and real and dense.numel() and dense.data_ptr():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(dense.shape, dense.stride(), strict=True))
            if extent == dense.numel():  # without gaps, in which another one may lie
                places.append((str(dense.device), dense.data_ptr(), dense.data_ptr() + dense.nbytes, name))
    for (device, _, end, one), (other_device, start, _, other) in itertools.pairwise(sorted(places)):
        if device == other_device and start < end:
            raise UserError(
                f"{one} and {other} are two Parameters in the same memory, which would be perturbed twice: tie them as one "
                "Parameter (head.weight = embedding.weight)"
            )


def require_no_hooks(model: torch.nn.Module) -> None:
    """Raise UserError for a hook on a parameter, after which .grad is no gradient of the loss, and its derivative no Hessian."""
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    name = next((name for name, p in model.named_parameters() if any(getattr(p, kind, None) for kind in hooks)), None)
    if name is not None:
        raise UserError(
            f"{name} has a hook on its gradient, and second derivatives need the gradient as it is: remove it, or use "
            'derivative="difference", which takes any hook at phi=45 and at other angles one that is linear in the gradient'
        )


def require_parameters(model: torch.nn.Module) -> None:
    """Raise UserError for a model with nothing to train, or without memory."""
    kind = type(unwrapped(model)).__name__
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"no parameter of {kind} requires a gradient: there is nothing to train")
    for name, p in model.named_parameters():
        if p.device.type == "meta":
            raise UserError(f"parameter {name} of {kind} is on the meta device: materialize the model (to_empty) first")
        if p.is_inference():
            raise UserError(
                f"parameter {name} of {kind} was made under torch.inference_mode(), and cannot be trained: make it outside"
            )


def require_no_parameters(loss_fn: Callable[..., Any], model: torch.nn.Module) -> None:
    """Raise UserError for a loss_fn that is trained itself; one hidden in a closure is found in the first step.

    It may be a method of the model's own; that it reads none of its parameters past the logits is seen in the first step too.
    """
    holder, inside = getattr(loss_fn, "__self__", loss_fn), set(model.parameters())
    if isinstance(holder, torch.nn.Module):
        name = next((name for name, p in holder.named_parameters() if p.requires_grad and p not in inside), None)
        if name is not None:
            raise UserError(
                f"loss_fn {type(holder).__name__} has a trainable parameter {name!r}, which no path gives a gradient: move it into "
                "the model, so that its logits depend on it (inputs may carry the targets along)"
            )


def require_the_models_own(model: torch.nn.Module, optimizer: Any) -> None:
    """Raise UserError for an optimizer of parameters outside the model; warn of those inside that it does not train."""
    kind, inside = type(unwrapped(model)).__name__, set(model.parameters())
    held = owners(optimizer)
    outside = [p for p in held if p not in inside]
    if outside and len(outside) == len(held):
        raise UserError(f"the optimizer is of another model: none of its parameters is in {kind} (built before a copy or a wrap?)")
    if outside:
        raise UserError(
            f"{len(outside)} of the optimizer's parameters are not in {kind} (the first has shape {list(outside[0].shape)}): they "
            "would be neither perturbed nor cleared, and their gradients add up. Put everything that is trained into one module"
        )
    left = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
    if left:
        some = ", ".join(left[:3]) + (", ..." if left[3:] else "")
        warnings.warn(
            f"{len(left)} trainable parameters of {kind} are not the optimizer's ({some}): they stay as they are; "
            "requires_grad_(False) says that this is meant",
            stacklevel=4,
        )


def require_some_left(model: torch.nn.Module, optimizer: Any) -> None:
    """Raise UserError where the model has none of the optimizer's parameters any more."""
    inside = set(model.parameters())
    if not any(p in inside for p in owners(optimizer)):
        raise UserError(
            "none of the optimizer's parameters is in the model any more (load_state_dict(assign=True)?): they would be stepped, "
            "and the model stays as it is. Build the optimizer, and SharpnessAware, after the model has its parameters"
        )


def _require_complex(method: Method, options: dict[str, Any]) -> None:
    """sam, functional and logit along g or the first moment need norms alone, which are those of the pairs (re, im)."""
    if method.ascent not in (None, "gradient", "momentum") or options.get("preconditioned") or method.path == "penalty":
        raise UserError(f"ascent {method.ascent!r}, path {method.path!r}: not for complex parameters; hold (re, im) as real ones")
    if method.mix in ("gsam", "looksam", "tram"):
        raise UserError(f"mix {method.mix!r} is not for complex parameters: hold (re, im) pairs as real ones")


def radius(rho: object, where: str = "") -> float:
    """Return rho as a float. Raises UserError unless it is a finite number >= 0; where: said of it in the message."""
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not math.isfinite(rho) or rho < 0:
        place = f" {where}" if where else ""
        raise UserError(f"rho={rho!r}{place}: the radius is a finite number >= 0 (0 is the plain gradient)")
    return float(rho)


def chosen(model: torch.nn.Module, subset: str | Callable[[str, Tensor], bool] | None) -> set[Tensor] | None:
    """Return the parameters to perturb, None for all. subset: "norm", those of normalization layers (SAM-ON), or a predicate.

    A predicate is called with (name, parameter).
    A normalization layer is one whose class name says so (LayerNorm, RMSNorm, BatchNorm2d, Norm ...).
    Raises UserError when nothing is selected. Source: Mueller et al. 2023.
    """
    if subset is None:
        return None
    found: set[Tensor]
    if callable(subset):
        found = {p for name, p in model.named_parameters() if subset(name, p)}
    else:
        layers = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
        found = {p for module in layers for p in module.parameters(recurse=False)}
    if not found:
        raise UserError(f"subset={subset!r} selects no parameter of {type(model).__name__}")
    return found

"""What a run measures of its curvature: shares on the way, and spectra, traces and quadratic forms of the final weights."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from functional_sam.config import Config
from functional_sam.curvature import (
    CurvatureProducts,
    Decomposition,
    decompose_many,
    density,
    fit_scale,
    functional_sharpness,
    quadratic_fit,
    scaled,
)
from functional_sam.curvature.geometry import AdamGeometry
from functional_sam.log_spaced import measure_steps
from functional_sam.tasks import Batches, Task
from functional_sam.tasks.batches import placed
from functional_sam.training.targets import Place, fresh_batches, logits_of, shares_by_targets
from functional_sam.weights import is_sharded

PART_FIELDS = (
    "norm_gradient",
    "norm_logit",
    "norm_func",
    "share",
    "cosine",
    "cosine_logit_gradient",
    "cosine_func_gradient",
    "curvature_logit",
    "curvature_func",
)
MATRICES = ("hessian", "gauss_newton", "functional")
SEED = 0  # of the random vectors: the same for every run, so that methods are compared along the same ones


def measured(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, task: Task, place: Place, step: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is measured at one of the points on the way, as (kind, content) of lines of metrics.jsonl.

    "decompose" on the held-out rows; with measure.targets instead of it "targets", one a number of them and temperature.
    """
    measure = task.config.measure
    if not measure.targets:
        if found := shares(model, optimizer, task, place(task.measured()), step):
            yield "decompose", found
        return
    # Counted back from the last point, so that the end of training has all of them.
    every = step in sorted(measure_steps(measure.points, task.config.training.steps))[::-1][::2]
    for found in shares_by_targets(model, optimizer, task, place, step, measure.targets + (measure.more_targets if every else [])):
        yield "targets", found


def curvature_batches(task: Task) -> Batches:
    """What the final curvature is measured on."""
    number = task.config.measure.curvature_targets
    return task.measured() if number is None else fresh_batches(task, [number])[0]


def shares(model: torch.nn.Module, optimizer: torch.optim.Optimizer, task: Task, batches: Batches, step: int) -> dict[str, Any]:
    """Norms, share and cosines of delta_logit and delta_func on the held-out rows, for each ascent; without autocast.

    The adam ascent from measure.adam_from on; empty where no ascent is left. Of a sharded model they are differences of gradients,
    accurate to about 1 % in float32, and the result says so ("derivative").
    """
    sharded, measure = is_sharded(model), task.config.measure
    ascents = [ascent for ascent in measure.ascents if ascent != "adam" or step >= measure.adam_from]
    if not ascents:
        return {}
    model.eval()
    try:
        method = "difference" if sharded else "exact"
        parts = decompose_many(model, batches, ascents, optimizer, task.loss_fn, task.forward, method=method)
    finally:
        model.train()
    note = {"derivative": "difference"} if sharded else {}
    return {"loss": parts[0].loss, **note, **{a: _numbers(part) for a, part in zip(ascents, parts, strict=True)}}


def _numbers(part: Decomposition) -> dict[str, float]:
    return {name: getattr(part, name) for name in PART_FIELDS}


def final_curvature(model: torch.nn.Module, optimizer: torch.optim.Optimizer, task: Task, batches: Batches) -> dict[str, Any]:
    """Measure the curvature of the final weights on `curvature_batches`: the content of curvature.json. Without autocast.

    "logits": mean over targets of their norm about the mean logit (a shift of all logits changes nothing), and of the entropy of
    the softmax in nats.
    "ascents": per ascent the numbers of `shares`, by kind of parameter too, and the loss change along eps against
    rho g.eps + rho^2/2 eps^T H eps.
    "geometries": "plain" is A itself, "adam" (of AdamW) P^1/2 A P^1/2; of A = H, H_G, H_F each eps^T A eps and |A eps| along the
    gradient, the trace with its standard error over probes, both ends of the spectrum with residuals, and, of "plain" with
    measure.density_probes, nodes and weights [probes, order] of its density.
    "temperature", with measure.temperature: the scale of the logits that fits the validation split best, the loss there before and
    after, and "logits" and "geometries" with that scale.
    """
    config, measure = task.config, task.config.measure
    model.eval()
    try:
        products = CurvatureProducts(model, batches, task.loss_fn, task.forward)
        parts = decompose_many(model, batches, measure.ascents, optimizer, task.loss_fn, task.forward)
        found = {
            "step": config.training.steps,
            "rows": sum(len(targets) for _, targets in batches),
            "loss": parts[0].loss,
            "logits": logits_of(model, task, batches),
            "ascents": {
                ascent: {
                    **_numbers(part),
                    "by_kind": {kind: dataclasses.asdict(group) for kind, group in part.by_kind.items()},
                    "quadratic_fit": [
                        {**dataclasses.asdict(point), "predicted": point.predicted}
                        for point in quadratic_fit(products, ascent=ascent, optimizer=optimizer).points
                    ],
                }
                for ascent, part in zip(measure.ascents, parts, strict=True)
            },
            "geometries": _geometries(products, optimizer, config),
        }
        if measure.temperature:
            found["temperature"] = _at_fitted_scale(model, optimizer, task, batches)
        return found
    finally:
        model.train()


def _at_fitted_scale(model: torch.nn.Module, optimizer: torch.optim.Optimizer, task: Task, batches: Batches) -> dict[str, Any]:
    parameter = next(model.parameters())
    held_out = [
        placed((inputs, targets), parameter.device, parameter.dtype) for inputs, targets, *_ in task.evaluated("validation")
    ]
    found = fit_scale(model, held_out, task.forward)
    forward = scaled(task.forward, found.scale)
    products = CurvatureProducts(model, batches, task.loss_fn, forward)
    return {
        **dataclasses.asdict(found),
        "logits": logits_of(model, task, batches, 1 / found.scale),
        "geometries": _geometries(products, optimizer, task.config),
    }


def _geometries(products: CurvatureProducts, optimizer: torch.optim.Optimizer, config: Config) -> dict[str, Any]:
    geometries: dict[str, CurvatureProducts | AdamGeometry] = {}
    if "plain" in config.measure.geometries:
        geometries["plain"] = products
    if "adam" in config.measure.geometries and config.optimizer.name == "adamw":
        geometries["adam"] = products.in_adam_geometry(optimizer)
    return {name: _geometry(own, config, name == "plain") for name, own in geometries.items()}


def _geometry(products: CurvatureProducts | AdamGeometry, config: Config, densities: bool) -> dict[str, Any]:
    measure = config.measure
    found = functional_sharpness(
        products, probes=measure.probes, max_products=measure.lanczos, generator=torch.Generator().manual_seed(SEED)
    )
    result = dataclasses.asdict(found)
    if measure.density_probes and densities:
        for name in MATRICES:
            drawn = density(
                getattr(products, name),
                products.parameters,
                probes=measure.density_probes,
                order=measure.density_order,
                generator=torch.Generator().manual_seed(SEED),
            )
            result[name]["density"] = {"nodes": drawn.nodes.tolist(), "weights": drawn.weights.tolist(), "size": drawn.size}
    return result

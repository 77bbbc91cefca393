"""One run, top to bottom."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from functional_sam.config import Config
from functional_sam.data.cache import Progress
from functional_sam.records import Run
from functional_sam.records.provenance import provenance, resumed
from functional_sam.sharpness import SharpnessAware
from functional_sam.tasks import Batches, Task, prepare
from functional_sam.training.distributed import join
from functional_sam.training.measure import final_curvature, shares
from functional_sam.training.schedule import learning_rate
from functional_sam.training.signals import Interrupted, Stop
from functional_sam.training.state import restore, save
from functional_sam.weights import unwrapped

TIMES = ("seconds",)  # fields of metrics.jsonl that differ between two runs of one config


def train(config: Config, root: Path | None = None, progress: Progress | None = None) -> Run:
    """Train by a config, or finish what an interrupted run began; the record is in the returned Run's directory.

    A complete run is returned as it is. The same config gives the same metrics bit for bit, interrupted or not (on one kind of
    machine with the same number of threads). Raises UserError for bad input, RunLocked when another process is at work on this
    run, FloatingPointError with step and loss when the loss is no longer finite: such a run counts as complete, and diverged.
    Raises Interrupted after a SIGINT, SIGTERM or SIGUSR2, once the step is finished and saved.
    Called in each of the processes of torchrun or srun it trains on all of them, and the first one writes the record.
    """
    ranks = join(config)
    run, stop = ranks.run(config, root), Stop()
    if ranks.lead(lambda: run.done):
        return run
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    ranks.lead(run.open)
    try:
        task = prepare(config, progress)
        device, forward = ranks.device, _forward(config)
        dtype = torch.float64 if config.training.precision == "float64" else torch.float32
        model = ranks.wrap(task.model().to(dtype), forward, _moved(task.batch(0), device, dtype))
        inner = unwrapped(model)  # of which evaluation and curvature are
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        sharpness = SharpnessAware(
            model,
            optimizer,
            config.method.name,
            config.method.rho,
            forward=forward,
            **config.method.options,
        )

        start, seconds = restore(run.directory / "checkpoint", ranks, sharpness)
        count = start  # steps done
        record = {**provenance(), "hash": config.hash, "data": task.provenance, **ranks.record}
        run.write("provenance.json", resumed(run.read("provenance.json"), record, start) if start else record)
        run.restart_at(start)

        measured_at = measure_steps(config.measure.points, config.training.steps)
        evaluated: dict[str, float] = {}
        began = time.perf_counter()
        stop.install()
        for step in range(start, config.training.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optimizer, step, config.training.steps)
            loss = sharpness.backward(_moved(ranks.part(task.batch(step)), device, dtype))
            if config.optimizer.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()

            count = step + 1
            last = count == config.training.steps
            elapsed = seconds + time.perf_counter() - began
            if count % config.runtime.log_every == 0 or last or count == 1:
                run.log("train", count, loss=float(loss), lr=group["lr"], seconds=round(elapsed, 3))
            if last or (config.training.eval_every and count % config.training.eval_every == 0):
                evaluated = _evaluate(task, inner, "validation")
                run.log("validation", count, **evaluated)
                sharpness.reshard()
            if count in measured_at:
                run.log("decompose", count, **shares(inner, optimizer, _moved(task.measured(), device, dtype), config))
                sharpness.reshard()
            stopped_by = ranks.any(stop.requested)
            if count % config.runtime.checkpoint_every == 0 or last or stopped_by:
                run.sync()
                save(run.directory / "checkpoint", count, ranks, sharpness, elapsed)
            if stopped_by:
                raise Interrupted(
                    f"stopped by {stopped_by} after step {count} of {config.training.steps}, checkpoint saved; "
                    f"go on with: functional-sam train {run.directory}"
                )

        if not evaluated:  # resumed after the last step
            evaluated = {k: v for k, v in run.metrics("validation")[-1].items() if k not in ("kind", "step")}
        if config.training.test:
            evaluated = {**evaluated, **{f"test_{key}": value for key, value in _evaluate(task, inner, "test").items()}}
        elapsed = seconds + time.perf_counter() - began
        if config.measure.curvature:
            measured = final_curvature(inner, optimizer, _moved(task.measured(), device, dtype), config)
            run.write("curvature.json", measured)
        summary = {"step": config.training.steps, "seconds": round(elapsed, 3), **evaluated}
        ranks.lead(lambda: run.write("done.json", summary))
        return run
    except FloatingPointError as error:  # divergence is a result, and kept as one
        message = str(error) if str(error).startswith("step") else f"after step {count}: {error}"
        run.write("done.json", {"diverged": True, "error": message, "loss": None})
        raise FloatingPointError(message) from error
    finally:
        stop.restore()
        run.close()


def measure_steps(points: int, steps: int) -> set[int]:
    """At most `points` steps, log-spaced from 1 to `steps`, both included."""
    if points == 0:
        return set()
    if points == 1:
        return {steps}
    return {round(math.exp(math.log(steps) * i / (points - 1))) for i in range(points)}


def _forward(config: Config) -> Callable[..., Any]:
    """Forward of the training passes: bf16 autocast or the parameters' own precision."""
    enabled = config.training.precision == "bf16"
    device = torch.device(config.runtime.device).type

    def forward(model: torch.nn.Module, inputs: torch.Tensor, readout: Callable[..., Any] | None = None) -> Any:
        with torch.autocast(device, torch.bfloat16) if enabled else contextlib.nullcontext():
            return model(inputs, readout=readout)

    return forward


def _moved(batches: Batches, device: torch.device, dtype: torch.dtype) -> Batches:
    """The micro-batches on the device, real inputs in the parameters' dtype."""
    return [(x.to(device, dtype) if x.is_floating_point() else x.to(device), t.to(device)) for x, t in batches]


def _evaluate(task: Task, model: torch.nn.Module, split: str) -> dict[str, float]:
    model.eval()
    try:
        result = task.evaluate(model, split)
    finally:
        model.train()
    if not math.isfinite(result["loss"]):
        raise FloatingPointError(f"after training, the {split} loss is {result['loss']}")
    return result

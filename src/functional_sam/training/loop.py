"""One run, top to bottom."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from functional_sam.config import Config
from functional_sam.data.cache import Progress
from functional_sam.data.order import seed_of
from functional_sam.log_spaced import measure_steps
from functional_sam.records import Run
from functional_sam.records.provenance import provenance, resumed
from functional_sam.sharpness import MethodName, SharpnessAware, resolve
from functional_sam.tasks import Metric, Task, prepare
from functional_sam.tasks.batches import cut, placed
from functional_sam.training import checkpoint
from functional_sam.training.distributed import join
from functional_sam.training.measure import curvature_batches, final_curvature, measured
from functional_sam.training.optimizers import optimizer_of
from functional_sam.training.precision import warn_of_slow_bf16
from functional_sam.training.robustness import robustness
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
    Raises Interrupted after a SIGINT, SIGTERM or SIGUSR2, once the step is finished and saved; after the last step at once.
    Called in each of the processes of torchrun or srun it trains on all of them, and the first one writes the record.
    """
    ranks, training = join(config), config.training
    run, stop = ranks.run(config, root), Stop()
    if ranks.lead(lambda: run.done):
        return run
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    ranks.lead(run.open)
    count = 0  # steps done
    try:
        if ranks.leads:
            warn_of_slow_bf16(config)
        task = prepare(config, progress)
        device, forward = ranks.device, _forward(task)
        dtype = torch.float64 if training.precision == "float64" else torch.float32
        place = functools.partial(placed, device=device, dtype=dtype)
        initial = _jittered(task.model(), config).to(dtype)
        model = ranks.wrap(initial, forward, place(cut(task.batch(0)[:1], 0, 1)))
        inner = unwrapped(model)  # of which evaluation and curvature are
        optimizer = optimizer_of(config.optimizer, task, model)
        sharpness = SharpnessAware(
            model,
            optimizer,
            cast(MethodName, config.method.name),
            config.method.rho,
            loss_fn=task.loss_fn,
            forward=forward,
            **_seeded(config),
        )

        start, seconds = restore(run.directory / "checkpoint", ranks, sharpness, config.hash)
        count = start
        record = {**provenance(), "hash": config.hash, "data": task.provenance, **ranks.record}
        run.write("provenance.json", resumed(run.read("provenance.json"), record, start) if start else record)
        run.restart_at(start)

        measured_at = measure_steps(config.measure.points, training.steps)
        doses_at = measure_steps(config.measure.doses if sharpness.method.path != "plain" else 0, training.steps)
        best = ranks.lead(lambda: _best_before(run, task.metric))
        evaluated: dict[str, float] = {}
        began = time.perf_counter()
        stop.install()
        for step in range(start, training.steps):
            lr = learning_rate(config.optimizer, step, training.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # What a step draws (dropout) is its own, whatever was drawn before it: by a method, a measurement, an earlier process.
            torch.manual_seed(seed_of("step", training.data_seed, step, ranks.rank))
            batches = place(ranks.part(task.batch(step)))
            loss = sharpness.backward(batches, measure_dose=step + 1 in doses_at)
            if config.optimizer.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()

            count = step + 1
            last = count == training.steps
            elapsed = seconds + time.perf_counter() - began
            if count % config.runtime.log_every == 0 or last or count == 1:
                run.log("train", count, loss=float(loss), lr=lr, seconds=round(elapsed, 3))
            if count in doses_at:
                run.log("dose", count, dose=sharpness.dose)
            if last or (training.eval_every and count % training.eval_every == 0):
                ranks.share_buffers(inner)
                evaluated = _evaluate(task, inner, "validation")
                run.log("validation", count, **evaluated)
                if training.test_best and (best is None or task.metric.better(evaluated[task.metric.name], best[task.metric.name])):
                    best = evaluated
                    run.log("test", count, **_evaluate(task, inner, "test"))
                sharpness.reshard()
            if count in measured_at:
                ranks.share_buffers(inner)
                for kind, found in measured(inner, optimizer, task, place, count):
                    run.log(kind, count, **found)
                    sharpness.reshard()
            stopped_by = ranks.any(stop.requested)
            if count % config.runtime.checkpoint_every == 0 or last or stopped_by:
                run.sync()
                save(run.directory / "checkpoint", count, ranks, sharpness, elapsed, config.hash)
            if stopped_by:
                raise Interrupted(
                    f"stopped by {stopped_by} after step {count} of {training.steps}, checkpoint saved; "
                    f"go on with: functional-sam train {run.directory}"
                )

        # What is left may take longer than a cluster waits after its signal, and begins anew where the run goes on.
        stop.at_once = f"all {training.steps} steps are done and saved; go on with: functional-sam train {run.directory}"
        evaluated = evaluated or _values(run.metrics("validation")[-1])  # none where it was resumed after the last step
        summary: dict[str, Any] = {"step": training.steps, "seconds": 0.0, **evaluated}
        if training.test:
            summary |= _named("test", _evaluate(task, inner, "test"))
        if training.test_best:
            summary |= ranks.lead(lambda: _best_and_its_test(run, task.metric))
        elapsed = seconds + time.perf_counter() - began
        if config.measure.curvature:
            run.write("curvature.json", final_curvature(inner, optimizer, task, place(curvature_batches(task))))
        if config.measure.robustness:
            run.write("robustness.json", robustness(inner, task, device, dtype))
        summary["seconds"] = round(elapsed, 3)
        ranks.lead(lambda: _complete(run, summary))
        return run
    except FloatingPointError as error:  # divergence is a result, and kept as one
        message = str(error) if str(error).startswith("step") else f"after step {count}: {error}"
        run.write("done.json", {"diverged": True, "error": message, "loss": None})
        raise FloatingPointError(message) from error
    finally:
        stop.restore()
        run.close()


def _complete(run: Run, summary: dict[str, Any]) -> None:
    """Write done.json, last; then the final weights need no checkpoint before them."""
    run.write("done.json", summary)
    checkpoint.keep(run.directory / "checkpoint", 1)


def _seeded(config: Config) -> dict[str, Any]:
    """The method's options; what it draws is, as all else that a step draws, of data_seed, unless the config says otherwise."""
    _, complete = resolve(config.method.name, config.method.options)
    return {**({"seed": config.training.data_seed} if "seed" in complete else {}), **config.method.options}


def _forward(task: Task) -> Callable[..., Any]:
    """The task's forward in the training passes: under bf16 autocast, or in the parameters' own precision."""
    enabled = task.config.training.precision == "bf16"
    device = torch.device(task.config.runtime.device).type

    def forward(model: torch.nn.Module, inputs: Any, readout: Callable[..., Any] | None = None) -> Any:
        with torch.autocast(device, torch.bfloat16) if enabled else contextlib.nullcontext():
            return task.forward(model, inputs, readout)

    return forward


def _jittered(model: torch.nn.Module, config: Config) -> torch.nn.Module:
    """The model, each weight times 1 + training.jitter * a normal number of init_seed."""
    if config.training.jitter:
        generator = torch.Generator().manual_seed(seed_of("jitter", config.training.init_seed))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + config.training.jitter * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def _evaluate(task: Task, model: torch.nn.Module, split: str) -> dict[str, float]:
    model.eval()
    try:
        result = task.evaluate(model, split)
    finally:
        model.train()
    if not math.isfinite(result["loss"]):
        raise FloatingPointError(f"the {split} loss is {result['loss']}")
    return result


def _best(lines: list[dict[str, Any]], metric: Metric) -> dict[str, Any] | None:
    """The line with the best value, of several the first."""
    choose = min if metric.lower_is_better else max
    return choose(lines, key=lambda line: line[metric.name], default=None)


def _best_before(run: Run, metric: Metric) -> dict[str, Any] | None:
    """The best validation of before an interruption. Raises UserError where its test line is lost: else the end would miss it."""
    best = _best(run.metrics("validation"), metric)
    if best is not None and run.config.training.test_best:
        run.only("test", best["step"])
    return best


def _best_and_its_test(run: Run, metric: Metric) -> dict[str, Any]:
    """By the record: best_step, the validation values of that evaluation as best_..., the test values there as test_best_..."""
    best = _best(run.metrics("validation"), metric)
    assert best is not None
    test = run.only("test", best["step"])
    return {"best_step": best["step"], **_named("best", _values(best)), **_named("test_best", _values(test))}


def _values(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("kind", "step")}


def _named(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{key}": value for key, value in values.items()}

"""What each run of a list needs, as rows and as a table for people."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from functional_sam.config import Config
from functional_sam.planning.cost import DECODED, RunCost, decoding_hours, run_cost
from functional_sam.planning.hardware import SINGLE, Hardware
from functional_sam.planning.memory import Layout, Memory, accounted, memory
from functional_sam.tasks import TASKS


@dataclass(frozen=True)
class Need:
    """Of one run on one kind of GPU. layout: the smallest that fits, None where none does; hours: GPU-hours of the whole run.

    memory, stored and recomputed: at that layout's number of GPUs (else at the largest tried), as laid out, with all activations
    stored, and with blocks recomputed.
    """

    config: Config
    cost: RunCost
    layout: Layout | None
    memory: Memory
    stored: Memory
    recomputed: Memory
    hours: float


def need(config: Config, hardware: Hardware, most: int = 512) -> Need:
    """The fewest GPUs (a power of two that divides the batch) on which the run fits; there replicas before shards, stored first.

    A config that recomputes is only planned so. Raises UserError as memory() does.
    """
    counts = [n for n in (2**i for i in range(most.bit_length())) if n <= most and config.training.batch % n == 0]
    ways = [True] if config.model.checkpoint_blocks else [False, True]
    tried = [
        Layout(gpus, sharded, checkpointing)
        for gpus in counts
        for sharded in ((False,) if gpus == 1 else (False, True))
        for checkpointing in ways
    ]
    found = next((layout for layout in tried if memory(config, layout).total <= hardware.budget), None)
    at = found or tried[-1]
    spent = run_cost(config, at.checkpointing, at.gpus, at.sharded)
    both = [memory(config, dataclasses.replace(at, checkpointing=checkpointing)) for checkpointing in (False, True)]
    hours = max(hardware.hours(spent.flops, spent.wide), decoding_hours(config))
    return Need(config, spent, found, memory(config, at), both[0], both[1], hours)


def rows(configs: Sequence[Config], hardware: Hardware, most: int = 512) -> list[tuple[Need, int]]:
    """(need, how many runs): runs that differ in seeds and rho alone need the same and are counted together.

    Runs whose memory is not accounted for are left out.
    """
    found: dict[tuple[object, ...], tuple[Need, int]] = {}
    for config in filter(accounted, configs):
        training = dataclasses.replace(config.training, init_seed=0, data_seed=0)
        method = (config.method.name, config.method.options, config.optimizer.name)
        key = tuple(map(repr, (config.task, config.model, config.data, *method, training)))
        known = found.get(key)
        found[key] = (known[0], known[1] + 1) if known else (need(config, hardware, most), 1)
    return list(found.values())


def table(configs: Sequence[Config], hardware: Hardware, most: int = 512) -> Table:
    """One line for each kind of run, then sums by task.

    Bytes are decimal GB; fits on: GPUs, how they share the model, whether blocks are recomputed.
    """
    title = (
        f"computed, not measured on a GPU: {hardware.name}, {hardware.memory / 2**30:g} GiB of which {hardware.usable:.0%} for "
        f"tensors, {hardware.peak / 1e12:g} TFLOP/s at {hardware.utilization:.0%}"
    )
    if hardware.single and any(run_cost(config).wide for config in configs):
        title += (
            f", float32 products {hardware.single / 1e12:g} TFLOP/s at {SINGLE:.0%} (under bf16 the head's, by model.head_dtype)"
        )
    caption = "GB on each GPU at the peak of a step, on as many GPUs as in `fits on`; stored, recomputed: all of it, either way"
    unknown = sorted({config.method.name for config in configs if not accounted(config)})
    if unknown:
        caption += f". Not accounted for (second-order graph): {', '.join(unknown)}"
    if any(map(decoding_hours, configs)):
        caption += f". GPU-hours: at least those in which {DECODED:g} images a second are decoded by each of runtime.workers"
    result = Table(title=title, caption=caption)
    for name in ("run", "parameters", "non-emb.", "trained on", "FLOPs", "fits on"):
        result.add_column(name, justify="left" if name in ("run", "fits on") else "right")
    for name in ("weights", "grads", "moments", "copies", "kept", "activ.", "work", "stored", "recomputed", "ckpt GB", "GPU-hours"):
        result.add_column(name, justify="right")
    hours: dict[str, float] = {}  # by task, which in the study of language is a size
    for found, count in rows(configs, hardware, most):
        spent, peak, optimizer = found.cost, found.memory, found.config.optimizer.name
        by = "" if optimizer == "adamw" else f", {optimizer}"
        hours[found.config.task] = hours.get(found.config.task, 0.0) + found.hours * count
        parts = (
            peak.weights,
            peak.gradients,
            peak.moments,
            peak.copies,
            peak.kept,
            peak.activations,
            peak.work,
            found.stored.total,
        )
        result.add_row(
            f"{found.config.task} {found.config.method.name}{by}" + (f" x {count}" if count > 1 else ""),
            f"{spent.parameters / 1e6:,.1f} M",
            f"{spent.non_embedding / 1e6:,.1f} M",
            f"{spent.tokens / 1e9:,.2f} B {TASKS[found.config.kind].unit}",
            f"{spent.flops:.2e}",
            _words(found.layout, most),
            *(_gb(part) for part in (*parts, found.recomputed.total)),
            _gb(spent.checkpoint),
            f"{found.hours * count:,.1f}",
        )
    result.add_section()
    for task, own in hours.items() if len(hours) > 1 else ():
        result.add_row(f"all of {task}", *[""] * 15, f"{own:,.1f}")
    result.add_row("all", *[""] * 15, f"{sum(hours.values()):,.1f}")
    return result


def _words(layout: Layout | None, most: int) -> str:
    if layout is None:
        return f"nothing up to {most}"
    shared = "" if layout.gpus == 1 else ", fsdp" if layout.sharded else ", ddp"
    return f"{layout.gpus}{shared}" + (", recomputed" if layout.checkpointing else "")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2f}"

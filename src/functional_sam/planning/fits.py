"""Whether a run fits what a cluster gives it: the memory of the GPUs as its config lays it out there, and the time to save."""

import dataclasses

from functional_sam.config import Config
from functional_sam.models.shape import Shape
from functional_sam.planning.cost import run_cost, shape
from functional_sam.planning.hardware import Hardware
from functional_sam.planning.memory import Layout, accounted, memory

DISK = 0.5e9  # bytes a second at which a checkpoint is written and read again for its checksum: stated, not measured


def layout_of(config: Config, gpus: int) -> Layout:
    """How the run is laid out on so many GPUs, a process each: as training does it."""
    sharded = gpus > 1 and config.runtime.parallel == "fsdp"
    return Layout(gpus, sharded, config.model.checkpoint_blocks)


def unfit(config: Config, hardware: Hardware, gpus: int) -> str:
    """Say how much memory a run takes on so many GPUs where that is too much, and the way out; nothing where it fits."""
    if not accounted(config) or config.training.batch % gpus:
        return ""
    layout = layout_of(config, gpus)
    taken = memory(config, layout).total
    if taken <= hardware.budget:
        return ""
    ways: list[tuple[str, Layout]] = []
    if isinstance(shape(config), Shape):  # others neither shard nor recompute
        sharded = dataclasses.replace(layout, sharded=gpus > 1)
        ways = [("runtime.parallel=fsdp", sharded)] if gpus > 1 else []
        ways.append(("model.checkpoint_blocks=true", dataclasses.replace(layout, checkpointing=True)))
        ways.append((" ".join(way for way, _ in ways), dataclasses.replace(sharded, checkpointing=True)))
    fitting = next((way for way, other in ways if other != layout and memory(config, other).total <= hardware.budget), "")
    how = "fsdp" if layout.sharded else "ddp" if gpus > 1 else "as it is"
    return (
        f"{config.task} {config.method.name} takes {taken / 1e9:.1f} GB on each of {gpus} {hardware.name} ({how}), of "
        f"{hardware.budget / 1e9:.1f}: {f'with {fitting} it fits' if fitting else 'a smaller training.micro_batch, or more GPUs'}"
    )


def pause(config: Config, hardware: Hardware, gpus: int) -> float:
    """Seconds from a signal to the exit at worst: a step, an evaluation on the validation split (in float32) and a save.

    An evaluation on all of a split, whose size the config does not tell, counts nothing.
    """
    spent = run_cost(config, gpus=gpus)
    step = hardware.hours(spent.flops, spent.wide) / config.training.steps
    evaluation = spent.forward * (config.training.eval_rows or 0)
    return 3600 * (step + hardware.hours(evaluation, evaluation)) / gpus + spent.checkpoint / DISK

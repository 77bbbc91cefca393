"""figure-6: what fine-tuning gains, against the share of the data, and against the functional share of the pretrained model."""

from functional_sam.config import Config, compose
from functional_sam.exhibits import comparison
from functional_sam.exhibits.plan import Plan
from functional_sam.exhibits.spec import Spec
from functional_sam.records import Source
from functional_sam.study.design import load_study

__all__ = ["plan"]


def plan(spec: Spec, source: Source, overrides: tuple[str, ...] = ()) -> Plan:
    """The runs that measure the share, then the cells of the study."""
    found = comparison.plan(spec, source, overrides)
    study = load_study(spec.study, spec.scale, overrides)
    tasks = dict.fromkeys(cell.task for cell in study.part(*spec.parts))
    measured = [config for task in tasks for config in share_runs(spec, task, overrides)]
    drawable = found.drawable and all(source.done(config) for config in measured)
    return Plan(spec, [*measured, *found.configs], (found.content, measured), source, drawable, [*measured, *(found.drawn or [])])


def share_runs(spec: Spec, task: str, overrides: tuple[str, ...]) -> list[Config]:
    """One step of AdamW at learning rate 0 a seed, after which the pretrained model with its fresh head is decomposed."""
    return [compose(task, "adamw", spec.scale, spec.layers(task, seed), overrides) for seed in spec.seeds]

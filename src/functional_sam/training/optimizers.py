"""The optimizer of a config."""

import torch

from functional_sam.config import OptimizerConfig
from functional_sam.tasks import Task


def optimizer_of(config: OptimizerConfig, task: Task, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW (fused), SGD with momentum, or Adafactor with its own decay rates, on the task's parameter groups.

    Adafactor is torch's, whose steps are relative to the size of what they change and at most 1/sqrt(t) of it, or, where they are
    not to be, that of `transformers` with steps of lr (an update's root mean square is clipped at 1 in both).
    """
    groups, lr, decay = task.groups(model), config.lr, config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, weight_decay=decay)
    if config.name == "adafactor" and not config.relative:
        from transformers.optimization import Adafactor  # seconds to import, and torch's has no such choice

        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return Adafactor(groups, lr=lr, weight_decay=decay, **fixed)  # type: ignore[no-untyped-call]
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr, weight_decay=decay)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, weight_decay=decay, fused=True)

"""The optimizer of a config."""

import torch

from functional_sam.config import OptimizerConfig
from functional_sam.tasks import Task


def optimizer_of(config: OptimizerConfig, task: Task, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW (fused), SGD with momentum, or torch's Adafactor with its own decay rates, on the task's parameter groups."""
    groups, lr, decay = task.groups(model), config.lr, config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, weight_decay=decay)
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=lr, weight_decay=decay)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps, weight_decay=decay, fused=True)

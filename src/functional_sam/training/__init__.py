"""The training run."""

from functional_sam.training.loop import train

__all__ = ["train"]

"""table-6: fine-tuning at equal steps and at equal compute, and transfer to domains that were not trained on."""

from functional_sam.exhibits.comparison import plan

__all__ = ["plan"]

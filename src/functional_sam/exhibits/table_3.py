"""table-3: the five methods at every size, each trained on 20 tokens per non-embedding parameter."""

from functional_sam.exhibits.table_2 import draw, headline, plan

__all__ = ["draw", "headline", "plan"]

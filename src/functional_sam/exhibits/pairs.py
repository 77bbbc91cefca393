"""Pairing by seed, for all exhibits that compare two methods of one setting: no seed drops out of it without a word."""

import pandas as pd

from functional_sam.errors import UserError
from functional_sam.study.compare import Estimate, paired_difference


def by_seed(ours: pd.DataFrame, theirs: pd.DataFrame, value: str, what: str) -> Estimate:
    """Estimate the mean of a column of `ours` minus that of `theirs`, each a row a seed.

    Raises UserError, which calls the comparison `what`, where a seed of one side is not one of the other, or is there twice.
    """
    left, right = (side.set_index("seed")[value].sort_index() for side in (ours, theirs))
    if left.index.has_duplicates or not left.index.equals(right.index):
        seeds = " and ".join(", ".join(map(str, side.index)) or "none" for side in (left, right))
        raise UserError(
            f"{what}: not paired, its two sides have the seeds {seeds}; give both the same, each once, in the exhibit's or the "
            "study's YAML"
        )
    return paired_difference(list(left), list(right))

"""Pairing by seed in exhibits: no seed drops out of it, none is paired with another one."""

import pandas as pd
import pytest

from functional_sam.errors import UserError
from functional_sam.exhibits.fresh_seeds import on_fresh_seeds
from functional_sam.exhibits.pairs import by_seed
from functional_sam.study.compare import paired_difference


def rows(**losses):
    return pd.DataFrame({"seed": [int(name[1:]) for name in losses], "loss": list(losses.values())})


def test_seeds_are_paired_whatever_their_order():
    found = by_seed(rows(s2=3.0, s0=1.0, s1=5.0), rows(s0=0.5, s1=1.0, s2=1.5), "loss", "a minus b")
    assert found == paired_difference([1.0, 5.0, 3.0], [0.5, 1.0, 1.5])


@pytest.mark.parametrize(
    ("theirs", "seeds"),
    [
        (rows(s0=1.0, s1=2.0), "0, 1, 2 and 0, 1"),
        (rows(s0=1.0, s1=2.0, s3=3.0), "0, 1, 2 and 0, 1, 3"),  # as many, and others
        (rows(), "0, 1, 2 and none"),
        (pd.concat([rows(s0=1.0, s1=2.0, s2=3.0)] * 2), "0, 1, 2 and 0, 0, 1, 1, 2, 2"),
    ],
)
def test_a_seed_without_its_twin_is_refused(theirs, seeds):
    with pytest.raises(UserError, match=f"a minus b: not paired, its two sides have the seeds {seeds}; give both the same"):
        by_seed(rows(s0=1.0, s1=2.0, s2=3.0), theirs, "loss", "a minus b")


def test_figure_3_compares_no_fewer_fresh_seeds_than_were_run():
    runs = [("adamw", None, 0.0), ("sam", 0.05, 0.2), ("functional-sam", 0.05, 0.1)]
    data = pd.DataFrame(
        [
            {"cell": "fresh-64", "batch": 64, "entry": name, "rho": rho, "seed": seed, "test": 4 + more + 0.01 * seed**2 * more}
            for name, rho, more in runs
            for seed in range(5)
        ]
    )
    assert set(on_fresh_seeds(data, 0.005).n) == {5}
    with pytest.raises(UserError, match=r"fresh-64: sam minus adamw at rho 0.05: .* 0, 1, 2, 4 and 0, 1, 2, 3, 4"):
        on_fresh_seeds(data[data.entry.ne("sam") | data.seed.ne(3)], 0.005)

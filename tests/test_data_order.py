"""The order of examples is a function of (step, seed): each once per epoch, no state to resume."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sam.data.order import indices, permutation


@given(count=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_every_example_once_per_epoch_whatever_the_batch(count: int, batch: int, seed: int) -> None:
    steps = -(-3 * count // batch)
    stream = np.concatenate([indices(step, batch, count, seed) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_batches_of_another_size_cut_the_same_stream() -> None:
    ones = np.concatenate([indices(step, 1, 10, seed=3) for step in range(24)])
    eights = np.concatenate([indices(step, 8, 10, seed=3) for step in range(3)])
    np.testing.assert_array_equal(ones, eights)


def test_same_seed_same_order_and_epochs_and_seeds_differ() -> None:
    np.testing.assert_array_equal(indices(7, 16, 50, seed=1), indices(7, 16, 50, seed=1))
    assert not np.array_equal(permutation(50, 1, 0), permutation(50, 1, 1))
    assert not np.array_equal(permutation(50, 1, 0), permutation(50, 2, 0))


def test_the_stream_is_the_one_recorded_runs_used() -> None:
    np.testing.assert_array_equal(indices(0, 8, 8, seed=0), [3, 7, 4, 0, 2, 6, 5, 1])


def test_a_shared_permutation_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        permutation(5, 0)[0] = 1

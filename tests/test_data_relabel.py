"""The same images with more classes."""

import numpy as np
import pytest
import torch

from functional_sam.config import compose
from functional_sam.data.images import prepare_images
from functional_sam.data.relabel import MOVE, WAYS, changed, ways_of
from functional_sam.errors import UserError


def test_images_are_the_same_and_labels_tell_more_ways_apart(cache):
    sets = {classes: prepare_images("mnist-5k", cache).relabel(classes) for classes in (10, 40, 160, 640)}
    batches = {classes: data.train_batch(3, 64, seed=0) for classes, data in sets.items()}
    plain = prepare_images("mnist-5k", cache).train_batch(3, 64, seed=0)
    assert torch.equal(batches[10][1], plain[1])
    assert not torch.equal(batches[10][0], plain[0])
    for classes, (images, labels) in batches.items():
        assert torch.equal(images, batches[10][0])
        assert torch.equal(labels // (classes // 10), plain[1])
        assert len(sets[classes].classes) == classes > int(labels.max())
    assert torch.equal(batches[160][1] % 4, batches[40][1] % 4)  # a finer label refines a coarser one
    again = prepare_images("mnist-5k", cache).relabel(640).train_batch(3, 64, seed=0)
    assert torch.equal(again[1], batches[640][1])
    held_out = next(iter(sets[640].eval_batches("validation", 32)))
    assert int(held_out[1].max()) >= 10


def test_every_way_gives_another_image_and_loses_nothing_but_the_border():
    """An image of distinct values, bright in the middle; black is -1."""
    image = torch.full((1, 1, 28, 28), -1.0)
    image[..., 9:19, 9:19] = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    made = changed(image.expand(WAYS, 1, 28, 28), torch.arange(WAYS), torch.tensor([-1.0]))
    assert len({tuple(one.flatten().tolist()) for one in made}) == WAYS
    upright = made[:32].flatten(1).sort(1).values
    torch.testing.assert_close(upright, image.flatten(1).sort(1).values.expand(32, -1))
    torch.testing.assert_close(made[32:], image.max() + image.min() - made[:32])
    assert torch.equal(made[0, :, MOVE:-MOVE, MOVE:-MOVE], image[0, :, 2 * MOVE :, 2 * MOVE :])  # towards the upper left


def test_what_moves_in_is_black():
    moved = changed(torch.ones(1, 1, 28, 28), torch.tensor([12]), torch.tensor([-2.0]))[0, 0]
    assert (moved[:MOVE] == -2).all()
    assert (moved[:, :MOVE] == -2).all()
    assert (moved[MOVE:, MOVE:] == 1).all()


def test_ways_are_an_examples_own_and_evenly_drawn():
    assert np.array_equal(ways_of("train", 10)[:10], ways_of("train", 9000)[:10])
    assert not np.array_equal(ways_of("train", 10), ways_of("test", 10))
    counts = np.bincount(ways_of("train", 64_000)[:64_000], minlength=WAYS)
    assert (abs(counts - 1000) < 5 * 1000**0.5).all()


def test_a_number_of_classes_that_cannot_be(cache):
    with pytest.raises(UserError, match=r"data.relabel=20: of 10 classes can be made 10, 40, 160, 640"):
        prepare_images("mnist-5k", cache).relabel(20)


@pytest.mark.parametrize("other", ["data.augment=crop-flip", "data.noise=0.1", "data.images=imagenet-1k"])
def test_what_would_make_its_labels_wrong_is_refused(other):
    """A mirrored image has another label than one that is not."""
    with pytest.raises(UserError, match=rf"data.relabel=640: .*{other.partition('=')[0]}"):
        compose("vision", overrides=["data.relabel=640", other])

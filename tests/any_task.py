"""What the tests of several tasks do with one: a run is killed and resumed, a step has one dropout mask."""

import pytest

from functional_sam.sharpness import SharpnessAware
from functional_sam.training import loop
from functional_sam.training.optimizers import optimizer_of


class Killed(Exception):
    """Stands for the end of the process."""


def killed_and_resumed(own, root, step):
    """The run of a config that ends just after its checkpoint at `step`, and goes on from there in a second call."""
    save = loop.save

    def dying(*arguments):
        save(*arguments)
        if arguments[1] == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", dying)
        with pytest.raises(Killed):
            loop.train(own, root)
    return loop.train(own, root)


def timeless(content):
    """A line of metrics or a summary, without what a clock measured."""
    return {key: value for key, value in content.items() if key not in loop.TIMES}


def with_one_mask(task, method):
    """SharpnessAware on a task's own model in float64 with dropout: its two passes agree, two steps do not."""
    model = task.model().double()
    optimizer = optimizer_of(task.config.optimizer, task, model)
    sharpness = SharpnessAware(model, optimizer, method, loss_fn=task.loss_fn, forward=task.forward)
    sharpness.check(task.batch(0))  # which passes only where both have one mask
    losses = []
    for _ in range(2):
        losses.append(float(sharpness.backward(task.batch(0))))
        optimizer.zero_grad()
    assert losses[0] != losses[1]
    return sharpness

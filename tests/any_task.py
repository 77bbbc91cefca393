"""What the tests of several tasks do with one: a run is killed and resumed, a step has one dropout mask."""

import copy

import pytest

from functional_sam.sharpness import SharpnessAware
from functional_sam.tasks import TASKS
from functional_sam.tasks.settings import READS
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


class Watched:
    """A section of a config that remembers which of its settings were asked for."""

    def __init__(self, section, name, seen):
        self.__dict__.update(_section=section, _name=name, _seen=seen)

    def __getattr__(self, key):
        self._seen.add(f"{self._name}.{key}")
        return getattr(self._section, key)


def settings_read(own, monkeypatch):
    """Of sections model and data, what a task reads in all that is asked of it; settings that `check` only refuses do not count."""
    seen = set()
    own = copy.copy(own)
    own.model, own.data = Watched(own.model, "model", seen), Watched(own.data, "data", seen)
    kind = TASKS[own.kind]
    monkeypatch.setattr(kind, "check", classmethod(lambda cls, config: None))
    task = kind(own)
    for fact in (kind.data_directory, kind.data_name, kind.model_name, kind.units, kind.shape):
        fact(own)
    model = task.model()
    task.forward(model, task.batch(0)[0][0])
    task.elsewhere()
    task.evaluate(model, "validation")
    task.evaluate(model, "test")
    return seen - {"model.kind"}


def in_table(kind):
    """What functional_sam.tasks.settings says that tasks with such a model read."""
    return {f"{section}.{key}" for section, keys in zip(("model", "data"), READS[kind], strict=True) for key in keys.split()}

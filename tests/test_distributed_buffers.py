"""Batch normalization on two gloo processes: what is evaluated is what is saved, and a forward's statistics are the config's."""

import pytest
from processes import gloo
from test_distributed_training import Job, config, process

from functional_sam.errors import UserError
from functional_sam.records import Run
from functional_sam.tasks import prepare
from functional_sam.training import checkpoint
from functional_sam.training.distributed import require_divisible

pytestmark = pytest.mark.slow
BATCH = {
    "model.kind": "convnet",
    "model.stages": "[1]",
    "model.patch": 2,
    "model.norm": "batch",
    "model.activation": "relu",
    "data.images": "mnist-5k",
    "training.eval_every": 5,
    "training.test": True,
    "training.test_rows": 8,
    "measure.doses": 0,
}


@pytest.fixture(scope="module")
def done(server, cache, tmp_path_factory):
    root = tmp_path_factory.mktemp("buffers")
    jobs = {
        parallel: Job(config(cache, root / parallel, "sam", parallel, "vision-convnet", **BATCH)) for parallel in ("ddp", "fsdp")
    }
    gloo(2, process, list(jobs.values()))
    return {parallel: Run(job.config) for parallel, job in jobs.items()}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_is_evaluated_is_what_is_saved(done, parallel):
    """Each process has met other rows: its own running statistics would make its part of an evaluation another model's."""
    run = done[parallel]
    task = prepare(run.config)
    model = task.model().double()
    saved = checkpoint.load_newest(run.directory / "checkpoint")
    model.load_state_dict(saved["model"])
    model.eval()
    for split in ("validation", "test"):
        found, (line,) = task.evaluate(model, split), run.metrics(split) or [run.summary()]
        prefix = "" if split == "validation" else "test_"
        assert line[f"{prefix}loss"] == pytest.approx(found["loss"], rel=1e-10)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_wrapping_a_model_leaves_its_buffers(done, parallel):
    saved = checkpoint.load_newest(done[parallel].directory / "checkpoint")["model"]
    assert int(saved["norm_stem.num_batches_tracked"]) == done[parallel].config.training.steps


def test_forwards_of_another_size_are_refused(cache, tmp_path):
    """Two micro-batches of a step go to two processes; to four, each would normalize by half of one."""
    given = config(cache, tmp_path, "sam", "ddp", "vision-convnet", **BATCH)
    require_divisible(given, 2, "ddp")
    with pytest.raises(UserError, match=r"model.norm=batch: the 2 micro-batches .* a training.micro_batch of 2 gives"):
        require_divisible(given, 4, "ddp")
    given.model.norm = "group"
    require_divisible(given, 4, "ddp")

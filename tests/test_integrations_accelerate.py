"""Accelerate: accumulation, two processes, checkpoints; the same steps as SharpnessAware alone on the same micro-batches."""

import copy
import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import TinyModel, adamw, make_batch, make_model
from processes import gloo
from test_sharpness_oracle import close, theta_of

from functional_sam import SharpnessAware, UserError
from functional_sam.integrations.accelerate import Accumulated

METHODS = [
    {"method": "precond-functional-sam", "rho": 0.2},
    {"method": "looksam", "rho": 0.2, "every": 2},
    {"method": "tram", "rho": 5.0},
]
PARAMETRIZED = pytest.mark.parametrize("words", METHODS, ids=lambda words: words["method"])


@pytest.fixture(autouse=True)
def _no_state_of_other_tests():
    yield
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()


def rows():
    """Ten rows with uneven numbers of valid targets."""
    inputs, targets = make_batch(10)
    targets[0, 1:] = targets[4, :3] = -100
    return inputs, targets


def prepared(words, accumulation, dropout=0.3):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = make_model(TinyModel, dtype=torch.float32, dropout=dropout)
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), batch_size=2 // accelerator.num_processes)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    return accelerator, model, optimizer, schedule, loader, Accumulated(accelerator, SharpnessAware(model, optimizer, **words))


def epoch(accelerator, model, optimizer, schedule, loader, sharpness):
    losses = []
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = sharpness.backward(inputs, targets)
            assert (loss is not None) == accelerator.sync_gradients
            if loss is not None:
                losses.append(float(loss))
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return losses


def by_hand(words, accumulation, epochs, dropout=0.3, processes=1):
    """Five micro-batches of two rows an epoch; the last step has what is left."""
    model = make_model(TinyModel, dtype=torch.float32, dropout=dropout)
    optimizer = adamw(model)
    schedule, losses = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7), []
    sharpness = SharpnessAware(model, optimizer, **words)
    torch.manual_seed(5)
    parts = list(zip(*(x.split(2) for x in rows()), strict=True))
    for _ in range(epochs):
        torch.empty((), dtype=torch.int64).random_()  # as a loader draws
        for i in range(0, 5, accumulation):
            losses.append(float(sharpness.backward(parts[i : i + accumulation])))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            for _ in range(processes):  # Accelerate steps a schedule once for each
                schedule.step()
            optimizer.zero_grad()
    return model, losses


@pytest.mark.parametrize("accumulation", [1, 2])
@PARAMETRIZED
def test_it_is_the_loop_by_hand(words, accumulation):
    parts = prepared(words, accumulation)
    torch.manual_seed(5)
    losses = epoch(*parts) + epoch(*parts)
    expected, known = by_hand(words, accumulation, 2)
    assert losses == pytest.approx(known, rel=1e-6)
    close(theta_of(parts[1]), theta_of(expected), 1e-6)
    plain, _ = by_hand({"method": "plain"}, accumulation, 2)
    with pytest.raises(AssertionError):  # a radius makes a difference
        close(theta_of(parts[1]), theta_of(plain), 1e-4)


@PARAMETRIZED
def test_resume(words, tmp_path):
    """save_state and load_state: bit for bit; with the state of a new object looksam and tram go elsewhere."""
    parts = prepared(words, 2)
    new = copy.deepcopy(parts[-1].state_dict())
    epoch(*parts)
    parts[0].save_state(tmp_path)
    epoch(*parts)
    ends = []
    for forgets in (False, True):
        again = prepared(words, 2)
        epoch(*again)
        again[0].load_state(tmp_path)
        assert again[-1].sharpness.steps == 3
        if forgets:
            again[-1].load_state_dict(new)
        epoch(*again)
        ends.append(theta_of(again[1]))
    close(ends[0], theta_of(parts[1]), 0)
    same = all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert same == (words["method"] == "precond-functional-sam")


def test_loss_scaling_is_refused():
    parts = prepared(METHODS[0], 1)
    parts[0].scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(UserError, match='use "bf16"'):
        Accumulated(parts[0], parts[-1].sharpness)


def two_processes(rank):
    """Micro-batches of one row each on two processes are the two rows of one on one."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for words in METHODS:
        parts = prepared(words, 2, dropout=0.0)
        assert parts[0].num_processes == 2
        assert type(parts[1]).__name__ == "DistributedDataParallel"
        losses = epoch(*parts) + epoch(*parts)
        expected, known = by_hand(words, 2, 2, dropout=0.0, processes=2)
        assert losses == pytest.approx(known, rel=1e-5)
        close({n.removeprefix("module."): p for n, p in theta_of(parts[1]).items()}, theta_of(expected), 1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(server):
    gloo(2, two_processes)


@pytest.mark.parametrize("place", ["inputs", "targets"])
def test_a_buffer_that_is_written_to_again_is_refused(place):
    """All of the step would be its last micro-batch; copies of it are the loop by hand, and after the refusal nothing waits."""
    parts = list(zip(*(x.split(2) for x in rows()), strict=True))
    for copies in (False, True):
        accelerator, model, *_, sharpness = prepared(METHODS[0], 2, dropout=0.0)
        buffers = {"inputs": parts[0][0].clone(), "targets": parts[0][1].clone()}

        def given(i):
            now = dict(zip(("inputs", "targets"), parts[i], strict=True))
            now[place] = buffers[place].copy_(now[place])  # noqa: B023
            return [x.clone() if copies else x for x in now.values()]  # noqa: B023

        with accelerator.accumulate(model):
            assert sharpness.backward(*given(0)) is None
        with accelerator.accumulate(model):
            if not copies:
                with pytest.raises(UserError, match=rf"{place} of micro-batch 1 of 2 was changed .*, buffer\.clone\(\)"):
                    sharpness.backward(*given(1))
                assert len(sharpness.waiting) == 0
            else:
                sharpness.backward(*given(1))
    expected = make_model(TinyModel, dtype=torch.float32, dropout=0.0)
    SharpnessAware(expected, adamw(expected), **METHODS[0]).backward(parts[:2])
    close({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in expected.named_parameters()}, 1e-6)

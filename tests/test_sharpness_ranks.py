"""Set-ups of two processes that gave another gradient without a word, or none: right now, or refused with the way out."""

import warnings

import pytest
import torch
from processes import gloo
from test_sharpness_silent import sgd
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from functional_sam import SharpnessAware, UserError

pytestmark = pytest.mark.slow
WORLD = 2


def summed(z, t):
    return F.cross_entropy(z, t, reduction="sum"), len(t)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 5, dtype=torch.float64, generator=generator), torch.randint(4, (24,), generator=generator)


def gradient(model):
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def uneven_numbers_of_micro_batches(rank):
    """Two micro-batches on one rank and one on the other equal one batch, also where loss_fn counts as it goes."""
    x, y = rows()
    mine = [(x[:8], y[:8]), (x[8:12], y[8:12])] if rank == 0 else [(x[12:], y[12:])]
    for method in ("plain", "sam", "functional-sam", "logit-sam", "momentum-functional-sam"):
        one, model = mlp(), DistributedDataParallel(mlp())
        words = {"momentum": 0.9} if "momentum" in method else {}
        for net, batches in ((one, [(x, y)]), (model, mine)):
            optimizer = sgd(net, **words)
            sharpness = SharpnessAware(net, optimizer, method, rho=0.3, loss_fn=summed)
            for _ in range(2):
                loss = sharpness.backward(batches)
                grads = gradient(net)
                optimizer.step()
                optimizer.zero_grad()
            if net is one:
                wanted, wanted_loss = grads, loss
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-12, atol=0.0)
        for name in wanted:
            torch.testing.assert_close(grads[name], wanted[name], rtol=1e-10, atol=1e-13, msg=f"{method} {name}")


def logits_in_shards(rank):
    """loss_parallel: the loss is a DTensor, and is whole in what is summed over the ranks."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

    x, y = rows()
    for method in ("plain", "sam", "functional-sam", "logit-sam"):
        one, model = mlp(), mlp()
        parts = {
            "2": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
            "0": ColwiseParallel(output_layouts=Shard(-1)),
        }
        parts["0"] = ColwiseParallel(output_layouts=torch.distributed.tensor.Replicate())
        parallelize_module(model, init_device_mesh("cpu", (WORLD,)), parts)
        SharpnessAware(one, sgd(one), method, rho=0.3, loss_fn=summed).backward([(x, y)])
        with loss_parallel():
            SharpnessAware(model, sgd(model), method, rho=0.3, loss_fn=summed).backward([(x, y)])
        for (name, p), q in zip(model.named_parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-11, atol=1e-13, msg=f"{method} {name}")


def shards_that_are_not_averaged(rank):
    """A sum over ranks, and parameters that FSDP2 leaves out."""
    x, y = rows()
    for factor in (None, float(WORLD), 1.0):
        model = mlp()
        fully_shard(model[0])
        fully_shard(model)
        if factor is not None:
            model[0].set_gradient_divide_factor(factor)
        if factor == 1.0:
            with pytest.raises(UserError, match=r"set_gradient_divide_factor\(1\) on 2 ranks.*Leave the factor out"):
                SharpnessAware(model, sgd(model), "sam")
        else:
            SharpnessAware(model, sgd(model), "sam").backward([(x[rank::2], y[rank::2])])
    for trained in (False, True):
        model = mlp()
        model[0].requires_grad_(trained)
        fully_shard(model, ignored_params=set(model[0].parameters()))
        if trained:
            with pytest.raises(UserError, match=r"ignored_params=.*not averaged over ranks"):
                SharpnessAware(model, sgd(model), "sam")
        else:
            SharpnessAware(model, sgd(model), "sam").backward([(x[rank::2], y[rank::2])])


def joined(rank):
    """DDP's join() would end in an abort."""
    x, y = rows()
    model = DistributedDataParallel(mlp())
    sharpness = SharpnessAware(model, sgd(model), "sam")
    with pytest.raises(UserError, match=r"inside of DistributedDataParallel.join\(\)"), model.join(throw_on_early_termination=True):
        sharpness.backward([(x[rank::2], y[rank::2])])


def worker(rank):
    warnings.simplefilter("ignore")
    shards_that_are_not_averaged(rank)
    joined(rank)
    uneven_numbers_of_micro_batches(rank)
    logits_in_shards(rank)


def test_two_ranks(server):
    gloo(WORLD, worker)

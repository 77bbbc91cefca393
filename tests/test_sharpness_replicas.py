"""What replicas and shards are refused for, in a group of this one process, where the refusal is the same."""

import pytest
import torch
import torch.distributed as dist
from test_sharpness_silent import sgd
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from functional_sam import SharpnessAware, UserError


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def batch():
    return torch.randn(6, 5), torch.randint(4, (6,))


def test_gradients_that_are_not_averaged_are_refused(group):
    model = DistributedDataParallel(mlp())
    sharpness = SharpnessAware(model, sgd(model), "sam")
    with model.no_sync(), pytest.raises(UserError, match=r"inside of no_sync\(\).*ONE backward"):
        sharpness.backward([batch()])
    sharpness.backward([batch(), batch()])
    model = mlp()
    fully_shard(model[0])
    fully_shard(model)
    sharpness = SharpnessAware(model, sgd(model), "sam")
    sharpness.backward([batch(), batch()])
    model.zero_grad()
    model.set_requires_gradient_sync(False)
    with pytest.raises(UserError, match=r"set_requires_gradient_sync\(False\)"):
        sharpness.backward([batch()])
    model.set_requires_gradient_sync(True)
    sharpness.backward([batch()])


def test_tensor_parallel_models_with_whole_parameters_are_refused(group):
    model = mlp()
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with pytest.raises(UserError, match=r"1.weight is a plain tensor .* DTensors .*SequenceParallel\(\) for a norm"):
        SharpnessAware(model, sgd(model), "sam")
    model[1].requires_grad_(False)
    SharpnessAware(model, sgd(model), "sam").backward([batch()])

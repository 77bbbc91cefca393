"""Calls that torch would answer with an error of its own: they say what was given and the way out."""

import pytest
import torch
from conftest import TinyModel, TinyReadout, adamw, make_batch, make_model
from torch.nn import functional as F

from functional_sam import SharpnessAware, UserError


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["adamw", "functional-sam", "penalty-sam"])
def test_without_gradients(method, mode):
    model = make_model()
    sharpness = SharpnessAware(model, adamw(model), method)
    for call in (sharpness.backward, sharpness.check):
        with mode(), pytest.raises(UserError, match=r"under torch.no_grad\(\) or torch.inference_mode\(\)"):
            call([make_batch()])
    sharpness.backward([make_batch()])


@pytest.mark.parametrize("kind", [TinyModel, TinyReadout])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_class_indices_of_another_type(kind, dtype):
    model = make_model(kind)
    inputs, targets = make_batch()
    with pytest.raises(UserError, match=rf"targets are {dtype}: class indices are int64, targets.long\(\)"):
        SharpnessAware(model, adamw(model), "sam").backward([(inputs, targets.to(dtype))])


@pytest.mark.parametrize("method", ["adamw", "sam", "functional-sam"])
def test_a_loss_that_writes_to_its_logits(method):
    def loss_fn(logits, targets):
        return F.cross_entropy(logits.div_(0.5).flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()

    model = make_model()
    with pytest.raises(UserError, match=r"loss_fn changes its logits in place: let it work on a copy"):
        SharpnessAware(model, adamw(model), method, loss_fn=loss_fn).backward([make_batch()])

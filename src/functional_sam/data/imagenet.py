"""ImageNet-1k in the layout of the hub (data/train-00000-of-00294.parquet, ...): a shard for each file.

    images-imagenet-1k-<hash>/
      train-00000-of-00294/     train.* and validation.*: every 100th image of a train file is held out for validation
      validation-00000-of-.../  test.*: the published validation set is our test split (the published test set has no labels)
      first-16/ or all/         shards.json

An image is resized to 256 on its shorter side and its middle 224 x 224 kept, uint8, so 150,528 bytes (193 GB for all).
Encoded: training images stay as they are in the file, for inception crops, which are made of another part of them each time.
"""

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from functional_sam.data.cache import Progress, cached, digest, silent
from functional_sam.data.decoding import Ahead, Crops, Encoded
from functional_sam.data.hub import File, layout, rows
from functional_sam.data.images import SPLITS, ImageData
from functional_sam.data.order import indices
from functional_sam.data.shards import Joined, Report, Shard, Watch, listed, prepare_shards, write_list
from functional_sam.errors import UserError

FORMAT = 1  # raise it when the same files give other shards
HUB = "ILSVRC/imagenet-1k"
SIDE, SHORTER, CHANNELS, CLASSES = 224, 256, 3, 1000
HELD_OUT = 100  # one train image in so many
AT_ONCE = 100


def imagenet_directory(cache: Path, location: str = HUB, files: int | None = None, encoded: bool = False) -> Path:
    """Where prepare_imagenet keeps the set; the shards are beside it."""
    where = str(Path(location).resolve()) if Path(location).is_dir() else location
    name = f"images-imagenet-1k-{digest([FORMAT, where, *(['encoded'] if encoded else [])])[:12]}"
    return Path(cache) / name / (f"first-{files}" if files else "all")


def prepare_imagenet(
    cache: Path,
    location: str = HUB,
    files: int | None = None,
    progress: Progress | None = None,
    processes: int = 0,
    watch: Watch | None = None,
    encoded: bool = False,
    workers: int = 0,
) -> "ImageNet":
    """Decode what is missing of the first so many train files (none: all) and of the published validation set; once per cache.

    encoded: keep the training images encoded, to be decoded in inception crops by so many worker processes (0: in this one).
    Raises UserError when files are missing or cannot be read, the cache is damaged, the disk is full.
    """
    say = progress or silent
    directory = imagenet_directory(cache, location, files, encoded)

    def build(temporary: Path) -> dict[str, Any]:
        published = {"train": layout(location, "data", "train", ".parquet", files, HUB)}
        published["validation"] = layout(location, "data", "validation", ".parquet", published=HUB)
        shards = [
            Shard(directory.parent / _shard_name(file, split), file.size, functools.partial(_decode, file, split, encoded))
            for split, found in published.items()
            for file in found
        ]
        found = [file for some in published.values() for file in some]
        say(f"{location}: {len(found)} files, {sum(file.size for file in found) / 1e9:.2f} GB")
        manifests = prepare_shards(shards, processes, say, watch)
        write_list(temporary, shards, manifests)
        images = {split: sum(manifest["images"].get(split, 0) for manifest in manifests) for split in SPLITS}
        for split, count in images.items():
            if not count:
                raise UserError(f"no {split} image in {location}: more files are needed")
        # Per colour, of the train images, from sums of integers: the same on every machine.
        total = images["train"] * SIDE**2
        mean = np.array([manifest["sum"] for manifest in manifests]).sum(0) / total
        square = np.array([manifest["sum_of_squares"] for manifest in manifests]).sum(0) / total
        return {
            "format": FORMAT,
            "name": "imagenet-1k",
            "source": {"way": "hub layout", "location": location, "files": len(found)},
            "images": images,
            "pixel_mean": (mean / 255).tolist(),
            "pixel_std": (np.sqrt(square - mean**2) / 255).tolist(),
        }

    manifest = cached(directory, build, say)
    return EncodedImageNet(directory, manifest, workers) if encoded else ImageNet(directory, manifest)


class ImageNet(ImageData):
    """ImageData of 3 x 224 x 224, read from shards. sha256: one digest of all shards."""

    channels, side = CHANNELS, SIDE

    @staticmethod
    def names(manifest: dict[str, Any]) -> tuple[str, ...]:
        return tuple(map(str, range(CLASSES)))

    def _open(self, split: str) -> tuple[Any, Any]:
        directories = [shard for shard in listed(self.directory) if (shard / f"{split}.labels").exists()]
        return self._images(split, directories), np.concatenate([np.fromfile(d / f"{split}.labels", np.int16) for d in directories])

    def _images(self, split: str, directories: list[Path]) -> Any:
        return Joined([directory / f"{split}.images" for directory in directories], "uint8", (SIDE, SIDE, CHANNELS))

    def _tensors(self, split: str, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        images, labels = (torch.from_numpy(array[chosen]) for array in self._parts[split])
        return self._standardized(images), labels.long()

    def _standardized(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(self.manifest[key]) for key in ("pixel_mean", "pixel_std"))
        return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


class EncodedImageNet(ImageNet):
    """ImageNet whose training images are inception crops, decoded when a step asks for them."""

    def __init__(self, directory: Path, manifest: dict[str, Any], workers: int) -> None:
        super().__init__(directory, manifest)
        self._ahead = Ahead(workers)

    def train_batch(
        self,
        step: int,
        batch: int,
        seed: int,
        unique_images: int | None = None,
        noise: float = 0.0,
        own: slice | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As that of ImageData, cropped at random, of each image another part in each epoch, by (seed, step, row) alone.

        own: the rows that this process trains on, of several; the other rows are zeros, for to decode them would be for nothing.
        """
        count, own = self.train_images(unique_images), own or slice(0, batch)
        crops = self._ahead.images(Crops(self._parts["train"][0], SIDE, batch, count, seed), step, own)
        images = torch.zeros(batch, CHANNELS, SIDE, SIDE)
        images[own] = self._standardized(crops)
        return images, self._train_labels(indices(step, batch, count, seed), count, noise, seed)

    def _images(self, split: str, directories: list[Path]) -> Any:
        return Encoded(directories, split) if split == "train" else super()._images(split, directories)


def pixels(encoded: bytes) -> np.ndarray:
    """Resized to SHORTER on the shorter side (bicubic), the middle SIDE x SIDE; uint8 [SIDE, SIDE, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    scale = SHORTER / min(width, height)
    width, height = max(SHORTER, round(width * scale)), max(SHORTER, round(height * scale))
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), dtype=np.uint8)


def _shard_name(file: File, split: str) -> str:
    """The file's name, with its published split before it where that says none: the hub's own names are 0000.parquet in both."""
    name = file.name.removesuffix(".parquet")
    return name if name.startswith(split) else f"{split}-{name}"


def _decode(file: File, published: str, encoded: bool, directory: Path, report: Report) -> dict[str, Any]:
    """Write images (encoded: those to train on as they are in the file) and labels of one file; what its manifest says.

    published: the split that it is of where it is published.
    """
    from datasets import Features, Image, Value

    features = Features({"image": Image(decode=False), "label": Value("int64")})
    kept: dict[str, list[int]] = {"test": []} if published == "validation" else {"train": [], "validation": []}
    sums, squares = np.zeros(CHANNELS, np.int64), np.zeros(CHANNELS, np.int64)
    raw = {"train"} if encoded else set()
    outs = {split: (directory / f"{split}.{'encoded' if split in raw else 'images'}").open("wb") for split in kept}
    ends = []
    size = done = 0
    try:
        for number, row in enumerate(rows(file, "parquet", features=features, columns=["image", "label"])):
            label = int(row["label"])
            if not 0 <= label < CLASSES:
                raise UserError(f"{file.url}, row {number}: the label is {label}, not one of 0 to {CLASSES - 1}")
            try:
                image = pixels(row["image"]["bytes"])
            except (OSError, TypeError, ValueError) as error:
                raise UserError(f"{file.url}, row {number}: the image cannot be decoded ({error}). Fetch the file again") from error
            split = "test" if "test" in kept else "validation" if number % HELD_OUT == 0 else "train"
            outs[split].write(row["image"]["bytes"] if split in raw else image.tobytes())
            kept[split].append(label)
            if split == "train":
                ends.append(outs[split].tell())
                wide = image.reshape(-1, CHANNELS).astype(np.int64)
                sums, squares = sums + wide.sum(0), squares + (wide**2).sum(0)
            size, done = size + len(row["image"]["bytes"]), done + 1
            if done == AT_ONCE:
                report(size, done)
                size = done = 0
    finally:
        for out in outs.values():
            out.close()
    report(size, done)
    if raw & set(kept):
        (directory / "train.ends").write_bytes(np.array(ends, np.int64).tobytes())
    for split, labels in kept.items():
        (directory / f"{split}.labels").write_bytes(np.array(labels, np.int16).tobytes())
    return {
        "source": {"name": file.name, "bytes": file.size},
        "images": {split: len(labels) for split, labels in kept.items()},
        "sum": sums.tolist(),
        "sum_of_squares": squares.tolist(),
    }

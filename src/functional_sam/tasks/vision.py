"""Image classification with a ViT of the decoder's own block."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sam.config import Config, nearest
from functional_sam.data import imagenet
from functional_sam.data.cache import Progress
from functional_sam.data.images import CLASSES, ImageData, crop_flip, images_directory, prepare_images
from functional_sam.data.order import seed_of
from functional_sam.data.shards import Watch
from functional_sam.errors import UserError
from functional_sam.models import ViT
from functional_sam.models.shape import Shape
from functional_sam.tasks.batches import Batch
from functional_sam.tasks.ranks import totals
from functional_sam.tasks.task import Metric, Task

IMAGES = {name: (ImageData.channels, ImageData.side, len(classes)) for name, classes in CLASSES.items()}
IMAGES["imagenet-1k"] = (imagenet.CHANNELS, imagenet.SIDE, imagenet.CLASSES)  # channels, side, classes


class Vision(Task):
    """Fashion-MNIST, MNIST-5k or ImageNet-1k, as the config names it."""

    metric = Metric("accuracy", "accuracy", lower_is_better=False)
    unit = "images"
    data: ImageData

    @classmethod
    def check(cls, config: Config) -> None:
        data = config.data
        if config.model.kind != "vit":
            raise UserError(f"model.kind={config.model.kind!r}: a task of kind vision has a vit")
        if data.images not in IMAGES:
            raise nearest("image set", data.images, IMAGES)
        if (data.files or data.hub) and data.images != "imagenet-1k":
            raise UserError(f"data.files and data.hub are for data.images=imagenet-1k, not for {data.images}")
        if data.unique_tokens or data.held_out != "documents":
            raise UserError("data.unique_tokens and data.held_out are for text, not for images")

    @classmethod
    def prepare(cls, config: Config, progress: Progress | None = None, processes: int = 0, watch: Watch | None = None) -> ImageData:
        cache, data = Path(config.runtime.cache), config.data
        if data.images == "imagenet-1k":
            return imagenet.prepare_imagenet(cache, _location(config), data.files, progress, processes, watch)
        return prepare_images(data.images, cache, progress)

    @classmethod
    def data_directory(cls, config: Config) -> Path:
        cache, data = Path(config.runtime.cache), config.data
        if data.images == "imagenet-1k":
            return imagenet.imagenet_directory(cache, _location(config), data.files)
        return images_directory(data.images, cache)

    @classmethod
    def data_name(cls, config: Config) -> str:
        return config.data.images

    @classmethod
    def model_name(cls, config: Config) -> str:
        return "ViT"

    @classmethod
    def shape(cls, config: Config) -> Shape:
        m, (channels, side, classes) = config.model, IMAGES[config.data.images]
        patches = (side // m.patch) ** 2
        return Shape(m.width, m.depth, m.mlp or 4 * m.width, m.heads, patches, classes, channels * m.patch**2, 1)

    def model(self) -> torch.nn.Module:
        shape = self.config.model
        return ViT(
            image=self.data.side,
            patch=shape.patch,
            classes=len(self.data.classes),
            width=shape.width,
            depth=shape.depth,
            heads=shape.heads,
            mlp=shape.mlp,
            channels=self.data.channels,
            head_dtype=shape.head_dtype,
            checkpoint_blocks=shape.checkpoint_blocks,
            dropout=shape.dropout,
            generator=torch.Generator().manual_seed(self.config.training.init_seed),
        )

    def rows(self, step: int) -> Batch:
        training = self.config.training
        images, labels = self.data.train_batch(step, training.batch, training.data_seed)
        if self.config.data.augment == "crop-flip":
            generator = torch.Generator().manual_seed(seed_of("augment", training.data_seed, step))
            images = crop_flip(images, self.data.black, generator)
        return images, labels

    def held_out(self, split: str, size: int, rows: int | None) -> Iterable[tuple[Any, ...]]:
        return self.data.eval_batches(split, size, rows)

    def evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        """Mean nats per image and accuracy."""

        def sums(images: Tensor, labels: Tensor) -> tuple[float, ...]:
            logits = self.forward(model, images)
            return float(self.loss_fn(logits, labels)[0]), int((logits.argmax(-1) == labels).sum()), len(labels)

        nats, right, images = totals(model, self.evaluated(split), sums)
        return {"loss": nats / images, "accuracy": right / images, "images": int(images)}


def _location(config: Config) -> str:
    """Of ImageNet-1k."""
    return config.runtime.data or config.data.hub or imagenet.HUB

"""Image classification with a ViT of the decoder's own block, or a residual convolutional network; labels may be noisy."""

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
from functional_sam.losses import cross_entropy
from functional_sam.models import ConvNet, ViT
from functional_sam.models.convnet import STEMS
from functional_sam.models.shape import ConvShape, Shape
from functional_sam.tasks.batches import Batch, Batches, split
from functional_sam.tasks.ranks import own, totals
from functional_sam.tasks.task import Metric, Task

MODELS = {"vit": "ViT", "convnet": "ConvNet"}
VIT_S = (384, 12, 6, 1536)  # width, depth, heads, mlp of the published size
RESNET_50 = (64, [3, 4, 6, 3], True, 4)  # width, stages, bottleneck, pixels of the stem
IMAGES = {name: (ImageData.channels, ImageData.side, len(classes)) for name, classes in CLASSES.items()}
IMAGES["imagenet-1k"] = (imagenet.CHANNELS, imagenet.SIDE, imagenet.CLASSES)  # channels, side, classes


class Vision(Task):
    """Fashion-MNIST, MNIST-5k or ImageNet-1k, as the config names it."""

    metric = Metric("accuracy", "accuracy", lower_is_better=False)
    unit = "images"
    data: ImageData

    @classmethod
    def check(cls, config: Config) -> None:
        data, model = config.data, config.model
        if model.kind not in MODELS:
            raise nearest("model.kind of a vision task:", model.kind, MODELS)
        if model.kind == "convnet":
            if model.patch not in STEMS:
                raise UserError(
                    f"model.patch={model.patch}: the stem of a convnet has {', '.join(map(str, STEMS))} pixels to an output"
                )
            if model.dropout or model.checkpoint_blocks:
                raise UserError("model.dropout and model.checkpoint_blocks are for a vit, a convnet has neither")
        if data.images not in IMAGES:
            raise nearest("image set", data.images, IMAGES)
        cls._check_sizes(config)
        if data.augment == "inception" and data.images != "imagenet-1k":
            raise UserError(
                f"data.augment=inception is for data.images=imagenet-1k, not for {data.images}: crop-flip is for small images"
            )
        if (data.files or data.hub) and data.images != "imagenet-1k":
            raise UserError(f"data.files and data.hub are for data.images=imagenet-1k, not for {data.images}")
        if data.relabel and (data.noise or data.augment or data.images == "imagenet-1k"):
            raise UserError(
                f"data.relabel={data.relabel}: the label says how an image is turned, moved and mirrored, so data.augment and "
                "data.noise are null and 0, and data.images is not imagenet-1k"
            )
        if model.embedding_scale != 1:
            raise UserError(f"model.embedding_scale={model.embedding_scale} is for a decoder, whose head is tied to its embedding")
        if data.unique_tokens or data.held_out != "documents" or data.elsewhere:
            raise UserError("data.unique_tokens, data.held_out and data.elsewhere are for text, not for images")

    @classmethod
    def _check_sizes(cls, config: Config) -> None:
        """Raise UserError for sizes that the model itself would refuse, once its data is there."""
        model, (_, side, _) = config.model, IMAGES[config.data.images]
        if model.kind == "vit" and side % model.patch:
            *others, last = (str(number) for number in range(1, side + 1) if side % number == 0)
            possible = f"{', '.join(others)} or {last}"
            raise UserError(f"model.patch={model.patch} does not divide the {side} pixels of {config.data.images}: {possible}")
        if model.kind == "convnet" and model.norm == "batch" and config.micro_batch == 1:
            shape = cls.shape(config)
            assert isinstance(shape, ConvShape)
            *_, block = shape.blocks()
            if block[-1].side == 1:
                raise UserError(
                    "model.norm=batch has a single number to normalize where the last of model.stages leaves one pixel and a "
                    f"forward has one row: take more than training.micro_batch={config.micro_batch} rows, or model.norm=group"
                )

    @classmethod
    def prepare(cls, config: Config, progress: Progress | None = None, processes: int = 0, watch: Watch | None = None) -> ImageData:
        cache, data = Path(config.runtime.cache), config.data
        if data.images == "imagenet-1k":
            prepared: ImageData = imagenet.prepare_imagenet(
                cache,
                _location(config),
                data.files,
                progress,
                processes,
                watch,
                encoded=data.augment == "inception",
                workers=config.runtime.workers,
            )
        else:
            prepared = prepare_images(data.images, cache, progress)
            prepared = prepared.relabel(data.relabel) if data.relabel else prepared
        prepared.train_images(data.unique_images)
        return prepared

    @classmethod
    def data_directory(cls, config: Config) -> Path:
        cache, data = Path(config.runtime.cache), config.data
        if data.images == "imagenet-1k":
            return imagenet.imagenet_directory(cache, _location(config), data.files, data.augment == "inception")
        return images_directory(data.images, cache)

    @classmethod
    def data_name(cls, config: Config) -> str:
        return config.data.images

    @classmethod
    def model_name(cls, config: Config) -> str:
        m = config.model
        if m.kind == "vit" and (m.width, m.depth, m.heads, m.mlp or 4 * m.width) == VIT_S:
            return f"ViT-S/{m.patch}"
        if m.kind == "convnet" and (m.width, m.stages, m.bottleneck, m.patch) == RESNET_50:
            return "ResNet-50"
        return MODELS[m.kind]

    @classmethod
    def shape(cls, config: Config) -> Shape | ConvShape:
        m, (channels, side, classes) = config.model, IMAGES[config.data.images]
        classes = config.data.relabel or classes
        if m.kind == "convnet":
            return ConvShape(m.width, tuple(m.stages), m.bottleneck, m.patch, channels, side, classes)
        patches = (side // m.patch) ** 2
        return Shape(m.width, m.depth, m.mlp or 4 * m.width, m.heads, patches, classes, channels * m.patch**2, 1)

    def model(self) -> torch.nn.Module:
        m = self.config.model
        both: dict[str, Any] = {
            "image": self.data.side,
            "channels": self.data.channels,
            "classes": len(self.data.classes),
            "width": m.width,
            "activation": m.activation,
            "head_dtype": m.head_dtype,
            "generator": torch.Generator().manual_seed(self.config.training.init_seed),
        }
        if m.kind == "convnet":
            return ConvNet(stem=m.patch, stages=m.stages, bottleneck=m.bottleneck, norm=m.norm, **both)
        both |= {"checkpoint_blocks": m.checkpoint_blocks, "dropout": m.dropout}
        return ViT(patch=m.patch, depth=m.depth, heads=m.heads, mlp=m.mlp, **both)

    def rows(self, step: int) -> Batch:
        return self._rows(step)

    def batch(self, step: int) -> Batches:
        """The step's micro-batches, to train on: of inception crops, those of other processes are zeros."""
        return split(self._rows(step, own(self.config.training.batch)), self.config.micro_batch)

    def _rows(self, step: int, own: slice | None = None) -> Batch:
        training, data = self.config.training, self.config.data
        drawn = (step, training.batch, training.data_seed, data.unique_images, data.noise)
        if isinstance(self.data, imagenet.EncodedImageNet):
            return self.data.train_batch(*drawn, own=own)
        images, labels = self.data.train_batch(*drawn)
        if data.augment == "crop-flip":
            generator = torch.Generator().manual_seed(seed_of("augment", training.data_seed, step))
            images = crop_flip(images, self.data.black, generator)
        return images, labels

    def held_out(self, split: str, size: int, rows: int | None) -> Iterable[tuple[Any, ...]]:
        return self.data.eval_batches(split, size, rows)

    def evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        """Mean nats per image (of the labels as published, not smoothed) and accuracy."""

        def sums(images: Tensor, labels: Tensor) -> tuple[float, ...]:
            logits = self.forward(model, images)
            return float(cross_entropy(logits, labels)[0]), int((logits.argmax(-1) == labels).sum()), len(labels)

        nats, right, images = totals(model, self.evaluated(split), sums)
        return {"loss": nats / images, "accuracy": right / images, "images": int(images)}


def _location(config: Config) -> str:
    """Of ImageNet-1k."""
    return config.runtime.data or config.data.hub or imagenet.HUB

"""Image classification with a ViT of the decoder's own block."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from functional_sam.config import Config
from functional_sam.data import imagenet
from functional_sam.data.images import ImageData, images_directory, prepare_images
from functional_sam.data.shards import Watch
from functional_sam.errors import UserError
from functional_sam.losses import cross_entropy
from functional_sam.models import ViT
from functional_sam.tasks.ranks import shared, summed


def prepare_pixels(
    config: Config, cache: Path, progress: Callable[[str], None] | None = None, processes: int = 0, watch: Watch | None = None
) -> ImageData:
    """The images that the config names; processes and watch are for those that come in shards."""
    data, location = config.data, config.runtime.data or imagenet.HUB
    if data.images == "imagenet-1k":
        return imagenet.prepare_imagenet(cache, location, data.files, progress, processes, watch)
    if data.files:
        raise UserError(f"data.files is for data.images=imagenet-1k, not for {data.images}")
    return prepare_images(data.images, cache, progress)


def pixels_directory(config: Config) -> Path:
    """Where the prepared images of a config are, or will be."""
    cache, name = Path(config.runtime.cache), config.data.images
    if name == "imagenet-1k":
        return imagenet.imagenet_directory(cache, config.runtime.data or imagenet.HUB, config.data.files)
    return images_directory(name, cache)


class Vision:
    """Fashion-MNIST, MNIST-5k or ImageNet-1k, as the config names it."""

    def __init__(self, config: Config, cache: Path, progress: Callable[[str], None] | None = None):
        self.config = config
        self.data = prepare_pixels(config, cache, progress)
        self.provenance: dict[str, object] = {"data": config.data.images, **self.data.manifest}

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
            generator=torch.Generator().manual_seed(self.config.training.init_seed),
        )

    def batch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        training = self.config.training
        images, labels = self.data.train_batch(step, training.batch, training.data_seed)
        size = training.micro_batch
        return [(images[i : i + size], labels[i : i + size]) for i in range(0, training.batch, size)]

    def measured(self) -> list[tuple[Tensor, Tensor]]:
        measure = self.config.measure
        return list(self.data.eval_batches("validation", measure.micro_batch, measure.rows))

    def evaluate(self, model: torch.nn.Module, split: str) -> dict[str, float]:
        """Mean nats per image and accuracy on a split; float32, whatever training's precision."""
        training = self.config.training
        device = next(model.parameters()).device
        nats, right, images_seen = 0.0, 0.0, 0.0
        with torch.no_grad():
            for (images, labels), counts in shared(self.data.eval_batches(split, training.eval_batch, training.eval_rows or None)):
                logits = model(images.to(device))
                if counts:
                    nats += float(cross_entropy(logits, labels.to(device))[0])
                    right += int((logits.argmax(-1).cpu() == labels).sum())
                    images_seen += len(labels)
        nats, right, images_seen = summed(nats, right, images_seen)
        return {"loss": nats / images_seen, "accuracy": right / images_seen, "images": int(images_seen)}

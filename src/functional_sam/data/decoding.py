"""Encoded images, decoded when a step asks for them: the inception crop, and worker processes that decode ahead.

B images of a batch, S side of what is made of one.
"""

import functools
import io
import itertools
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from functional_sam.data.order import indices, seed_of
from functional_sam.errors import UserError

AREA = (0.08, 1.0)  # of the image, of an inception crop
ASPECT = (3 / 4, 4 / 3)  # width by height
TRIES = 10
PART = 64  # images that a worker hands over at once
Box = tuple[int, int, int, int]  # left, top, right, bottom


class Encoded:
    """Encoded images in the files NAME.encoded (one after the other) and NAME.ends (int64) of some directories: encoded[i]."""

    def __init__(self, directories: Sequence[Path], name: str) -> None:
        self.directories, self.name = list(directories), name
        self._ends = [np.fromfile(directory / f"{name}.ends", np.int64) for directory in self.directories]
        self._starts = np.cumsum([0, *map(len, self._ends)])
        self._bytes = [np.memmap(directory / f"{name}.encoded", np.uint8, "r") for directory in self.directories]

    def __reduce__(self) -> Any:  # for workers: the files are opened there, not sent
        return Encoded, (self.directories, self.name)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, position: int) -> bytes:
        which = int(np.searchsorted(self._starts, position, side="right")) - 1
        own = int(position - self._starts[which])
        ends = self._ends[which]
        return self._bytes[which][ends[own - 1] if own else 0 : ends[own]].tobytes()


def inception_box(width: int, height: int, draw: np.random.RandomState) -> Box:
    """A random part of an image: its area uniform in AREA, its aspect log-uniform in ASPECT, its place uniform (Szegedy 2015).

    Where none of TRIES fits: the largest one in the middle whose aspect is allowed.
    """
    for _ in range(TRIES):
        area = draw.uniform(*AREA) * width * height
        aspect = math.exp(draw.uniform(*map(math.log, ASPECT)))  # type: ignore[call-overload]  # how many it unpacks is not seen
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(width - w + 1), draw.randint(height - h + 1)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * ASPECT[1]))), min(height, max(1, round(width / ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def inception_crop(encoded: bytes, side: int, draw: np.random.RandomState) -> np.ndarray:
    """A random part of the image, resized (bilinear), one in two mirrored; uint8 [S, S, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as opened:
        image = opened.convert("RGB")
    box = inception_box(*image.size, draw)
    resized = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
    if draw.randint(2):
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(resized, dtype=np.uint8)


@dataclass(frozen=True)
class Crops(Dataset[Tensor]):
    """crops[step, start, end]: rows `start` to `end` of a step, uint8 [end - start, S, S, 3], a function of these and the seed."""

    encoded: Encoded
    side: int
    batch: int
    count: int  # of the first so many images
    seed: int

    def __getitem__(self, key: tuple[int, int, int]) -> Tensor:
        step, start, end = key
        chosen = indices(step, self.batch, self.count, self.seed)[start:end]
        made = [
            inception_crop(
                self.encoded[int(index)],
                self.side,
                np.random.RandomState(seed_of("inception", self.seed, step, start + row) % 2**32),
            )
            for row, index in enumerate(chosen)
        ]
        return torch.from_numpy(np.stack(made))


class Ahead:
    """Crops of a step; with workers, the next step is decoded meanwhile. What is returned does not depend on their number."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._parts: Iterator[Tensor] = iter(())
        self._next: tuple[Crops, int, slice] | None = None  # what the workers are at
        self._last: tuple[tuple[Crops, int, slice], Tensor] | None = None  # the first step is asked for twice: to wrap the model

    def images(self, crops: Crops, step: int, own: slice) -> Tensor:
        """The rows `own` of a step, uint8 [B, S, S, 3]. Raises UserError when a worker dies."""
        key = (crops, step, own)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        keys = functools.partial(_keys, own=own)
        if not self.workers:
            made = [crops[part] for part in keys(step)]
        else:
            if self._next != key:
                self._parts = self._started(crops, itertools.chain.from_iterable(map(keys, itertools.count(step))), len(keys(step)))
            try:
                made = [next(self._parts) for _ in keys(step)]
            except (RuntimeError, OSError, EOFError) as error:  # the last two where it died while handing over a part
                raise UserError(
                    f"a process that decodes images died ({error}): take fewer, runtime.workers={self.workers} is too many "
                    "where memory is short"
                ) from error
            self._next = (crops, step + 1, own)
        self._last = key, torch.cat(made)
        return self._last[1]

    def _started(self, crops: Crops, keys: Iterator[tuple[int, int, int]], parts: int) -> Iterator[Tensor]:
        loader = DataLoader(
            crops,
            batch_size=None,
            sampler=keys,  # any iterable, says its documentation
            num_workers=self.workers,
            prefetch_factor=-(-parts // self.workers),
            multiprocessing_context="forkserver",  # not fork: torch and arrow have threads by now
            worker_init_fn=_worker,
            generator=torch.Generator(),  # its seeds are not drawn from the run's
        )
        return iter(loader)


def _keys(step: int, own: slice) -> list[tuple[int, int, int]]:
    return [(step, start, min(start + PART, own.stop)) for start in range(own.start, own.stop, PART)]


def _worker(_: int) -> None:
    """A signal to all processes of a job is for the run, which stops its workers itself."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(one, signal.SIG_IGN)

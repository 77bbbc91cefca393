"""Ways to the Fashion-MNIST arrays. Each must give the bytes whose SHA-256 is fixed here; none is swapped for other data."""

import gzip
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from functional_sam.data.cache import Progress
from functional_sam.errors import UserError

DEBIAN = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
HUB = "zalando-datasets/fashion_mnist"
ARRAYS = {  # name -> SHA-256 of the decoded uint8 array: images [n, 28, 28], labels [n]
    "train_images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "test_images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
_FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
_MINUTES = 10  # for the download; a stuck mirror must not hang a job for ever
Arrays = dict[str, np.ndarray]


class Unavailable(Exception):
    """One way is closed on this machine, and why; the next is tried."""


def fashion_arrays(progress: Progress) -> tuple[Arrays, str]:
    """The arrays named in ARRAYS and the way they came: "installed", "apt" or "hub", in this order of preference.

    Raises UserError when every way is closed (what was tried, and the way out), or when a way gives other data.
    """
    ways: dict[str, Callable[[], Arrays]] = {"installed": installed, "apt": lambda: from_apt(progress), "hub": from_hub}
    tried = []
    for way, read in ways.items():
        progress(f"looking for fashion-mnist: {way} ...")
        try:
            arrays = read()
        except Unavailable as reason:
            tried.append(f"  {way}: {reason}")
            continue
        for name, expected in ARRAYS.items():
            if array_sha256(arrays[name]) != expected:
                raise UserError(f"fashion-mnist from {way}: {name} is not the published array (SHA-256 differs)")
        return arrays, way
    raise UserError(
        "fashion-mnist cannot be had on this machine. Tried:\n"
        + "\n".join(tried)
        + f"\nInstall it (`apt-get install {DEBIAN}`) or use the small set: data.images=mnist-5k"
    )


def installed(directory: Path = INSTALLED) -> Arrays:
    """The arrays from the files of the Debian package in `directory`."""
    if not directory.is_dir():
        raise Unavailable(f"{directory} does not exist (Debian package {DEBIAN})")
    try:
        return {name: read_idx(directory / file) for name, file in _FILES.items()}
    except OSError as error:
        raise Unavailable(f"{directory}: {error}") from error


def from_apt(progress: Progress) -> Arrays:
    """The arrays from the Debian package, downloaded and unpacked in a temporary directory; needs no root.

    When apt has no package lists, private ones are fetched beside it.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise Unavailable(f"{program} is not on this machine")
    with tempfile.TemporaryDirectory(prefix="fashion-mnist-") as name:
        work = Path(name)
        work.chmod(0o755)  # apt run by root downloads as the user _apt, who must be able to enter
        for directory in ("lists/partial", "cache/archives/partial", "files"):
            (work / directory).mkdir(parents=True)
        private = ["-o", f"Dir::State::lists={work / 'lists'}", "-o", f"Dir::Cache={work / 'cache'}"]
        progress(f"downloading the Debian package {DEBIAN} (31 MB) ...")
        try:
            _run(["apt-get", "-q", "download", DEBIAN], work)
        except Unavailable:
            progress("fetching package lists (10 MB) ...")
            _run(["apt-get", "-q", *private, "update"], work)
            _run(["apt-get", "-q", *private, "download", DEBIAN], work)
        (package,) = work.glob("*.deb")
        _run(["dpkg-deb", "-x", str(package), str(work / "files")], work)
        return installed(work / "files" / INSTALLED.relative_to("/"))


def from_hub(name: str = HUB) -> Arrays:
    """The arrays from the Hugging Face hub, or from a local directory in the hub's layout."""
    try:
        import datasets  # slow to import, and only this way needs it

        parts = datasets.load_dataset(name)
        arrays: Arrays = {}
        for split in ("train", "test"):
            arrays[f"{split}_images"] = np.stack([np.asarray(image, dtype=np.uint8) for image in parts[split]["image"]])
            arrays[f"{split}_labels"] = np.asarray(parts[split]["label"], dtype=np.uint8)
    except Exception as error:  # the hub's client raises many kinds; each means that this way is closed
        raise Unavailable(f"{name}: {type(error).__name__}: {error}") from error
    return arrays


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes: 0, 0, 8, number of dimensions, each dimension as a big-endian uint32, the data.

    Raises OSError when it is something else or is cut short.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except EOFError as error:
        raise OSError(f"{path} is cut short") from error
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if content[:3] != b"\0\0\x08" or len(content) < start:
        raise OSError(f"{path} is not an IDX file of unsigned bytes")
    shape = [int(size) for size in np.frombuffer(content, dtype=">u4", count=dimensions, offset=4)]
    if len(content) - start != int(np.prod(shape)):
        raise OSError(f"{path} holds {len(content) - start} values, its header says {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def array_sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _run(command: list[str], directory: Path) -> None:
    try:
        subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True, errors="replace", timeout=60 * _MINUTES)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout or "").strip().splitlines()[-1:]
        raise Unavailable(f"`{' '.join(command[:1] + command[-2:])}` failed: {''.join(last)}") from error
    except (subprocess.TimeoutExpired, OSError) as error:
        raise Unavailable(f"`{command[0]}`: {error}") from error

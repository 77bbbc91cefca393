"""A prepared directory is whole or absent, made once, and says so when it is damaged."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from functional_sam.data import cache
from functional_sam.data.cache import MANIFEST, cached, silent, write_array
from functional_sam.errors import UserError


def build(directory: Path) -> dict[str, int]:
    write_array(directory / "values", np.arange(10, dtype=np.uint16))
    return {"answer": 42}


def build_slowly(directory: Path) -> dict[str, int]:
    with (directory.parent / "log").open("a") as log:
        log.write(f"{os.getpid()}\n")
    time.sleep(0.5)
    return build(directory)


def test_built_once_then_read(tmp_path: Path) -> None:
    lines: list[str] = []
    first = cached(tmp_path / "d", build, lines.append)
    again = cached(tmp_path / "d", lambda _: pytest.fail("built twice"), lines.append, verify=True)
    assert first == again
    assert first["answer"] == 42
    assert first["files"]["values"]["bytes"] == 20
    assert len(first["sha256"]) == 64
    assert lines == [f"prepared {tmp_path / 'd'}"]


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=cached, args=(tmp_path / "d", build_slowly, silent)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert cached(tmp_path / "d", build, silent, verify=True)["answer"] == 42


def test_the_lock_is_free_after_a_failure(tmp_path: Path) -> None:
    def fail(_: Path) -> dict[str, int]:
        raise UserError("no text")

    with pytest.raises(UserError, match="no text"):
        cached(tmp_path / "d", fail, silent)
    assert [path.name for path in tmp_path.iterdir()] == [".d.lock"]
    assert cached(tmp_path / "d", build, silent)["answer"] == 42


def truncate(directory: Path) -> None:
    (directory / "values").write_bytes(b"abc")


def remove(directory: Path) -> None:
    (directory / "values").unlink()


def cut_manifest(directory: Path) -> None:
    (directory / MANIFEST).write_text("{")


def edit_manifest(directory: Path) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["files"]["values"]["sha256"] = "0" * 64
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (truncate, "values has 3 bytes instead of 20"),
        (remove, "values is missing"),
        (cut_manifest, "manifest.json cannot be used"),
        (edit_manifest, "its digest is not that of its files"),
    ],
)
def test_damage_is_named_with_the_way_out(tmp_path: Path, damage, what: str) -> None:
    cached(tmp_path / "d", build, silent)
    damage(tmp_path / "d")
    with pytest.raises(UserError, match=what) as error:
        cached(tmp_path / "d", build, silent)
    assert str(tmp_path / "d") in str(error.value)
    assert "Delete" in str(error.value)


def test_changed_content_of_the_same_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would say in its record that it was trained on what was there before. Of much data it is found when asked."""
    cached(tmp_path / "d", build, silent)
    (tmp_path / "d" / "values").write_bytes(bytes(20))
    os.utime(tmp_path / "d" / "values", ns=(0, 0))  # a clock of files ticks every few milliseconds
    for verify in (None, True):
        with pytest.raises(UserError, match="SHA-256"):
            cached(tmp_path / "d", build, silent, verify)
    cached(tmp_path / "d", build, silent, verify=False)
    monkeypatch.setattr(cache, "SMALL", 19)
    cached(tmp_path / "d", build, silent)
    with pytest.raises(UserError, match="SHA-256"):
        cached(tmp_path / "d", build, silent, verify=True)


def test_content_is_read_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path / "d", build, silent)
    monkeypatch.setattr(cache, "sha256", lambda _: pytest.fail("read twice"))
    cached(tmp_path / "d", build, silent)


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="disk full"):
            cached(tmp_path / "d", build, silent)
    assert not (tmp_path / "d").exists()
    assert cached(tmp_path / "d", build, silent, verify=True)["answer"] == 42


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_writing_an_array_to_a_full_disk_says_that_it_is_full() -> None:
    with pytest.raises(OSError, match="No space left") as error:
        write_array(Path("/dev/full"), np.zeros(100_000))
    assert error.value.errno == errno.ENOSPC


def test_a_cache_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the data cache"):
        cached(tmp_path / "file" / "d", build, silent)

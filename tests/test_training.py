"""A run: resumed equals uninterrupted bit for bit, records are complete, divergence is kept, bad directories are refused."""

import json
import shutil

import pytest
import torch

from functional_sam.config import compose
from functional_sam.data.cache import silent
from functional_sam.errors import UserError
from functional_sam.files import write_text
from functional_sam.records import Run, RunLocked
from functional_sam.training import checkpoint, loop
from functional_sam.training.schedule import learning_rate


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Real text, prepared once for this file."""
    from pathlib import Path

    return Path(".cache") if Path(".cache").is_dir() else tmp_path_factory.mktemp("cache")


def tiny(cache, runs, method="sam", task="language", **overrides):
    size = ["model.width=16", "model.depth=1", "model.length=32", "training.steps=12", "training.batch=4", "training.micro_batch=2"]
    size += ["training.eval_rows=8", "training.eval_batch=8", "training.eval_every=5", "measure.points=3", "measure.rows=4"]
    size += ["measure.micro_batch=2", "runtime.checkpoint_every=4", "runtime.log_every=1", "optimizer.warmup_steps=2"]
    size += [f"runtime.cache={cache}", f"runtime.runs={runs}", "runtime.threads=1"]
    return compose(task, method, "quick", overrides=[*size, *(f"{key}={value}" for key, value in overrides.items())])


def content(run):
    """Metrics without what a clock measured."""
    return [{k: v for k, v in line.items() if k not in loop.TIMES} for line in run.metrics()]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("method", ["adamw", "precond-functional-sam"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(cache, tmp_path, monkeypatch, method):
    whole = loop.train(tiny(cache, tmp_path / "whole", method, **{"training.test": True}))

    config = tiny(cache, tmp_path / "parts", method, **{"training.test": True})
    backward = loop.SharpnessAware.backward
    for stop in (3, 7, 11):  # before the first checkpoint, between two, and after the last but one
        calls = []

        def dying(self, batches, stop=stop, calls=calls):
            calls.append(1)
            if self.steps + 1 > stop:
                raise Killed
            return backward(self, batches)

        monkeypatch.setattr(loop.SharpnessAware, "backward", dying)
        with pytest.raises(Killed):
            loop.train(config)
        assert Run(config).state == "partial"
    monkeypatch.setattr(loop.SharpnessAware, "backward", backward)
    parts = loop.train(config)

    assert content(parts) == content(whole)
    assert [line["step"] for line in parts.metrics("train")] == list(range(1, 13))
    a, b = (checkpoint.load_newest(run.directory / "checkpoint") for run in (whole, parts))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    without_time = [{k: v for k, v in run.summary().items() if k != "seconds"} for run in (whole, parts)]
    assert without_time[0] == without_time[1]
    assert "test_loss" in without_time[0]


def test_the_record_says_where_it_came_from(cache, tmp_path):
    run = loop.train(tiny(cache, tmp_path))
    record = json.loads((run.directory / "provenance.json").read_text())
    assert record["hash"] == run.config.hash
    assert len(record["data"]["sha256"]) == 64
    assert record["versions"]["torch"].startswith("2.")
    assert {line["step"] for line in run.metrics("decompose")} == loop.measure_steps(3, 12) == {1, 3, 12}
    shares = run.metrics("decompose")[-1]
    assert 0 < shares["gradient"]["share"] < 1
    assert 0 < shares["adam"]["share"] < 1
    before = (run.directory / "metrics.jsonl").stat().st_mtime_ns
    loop.train(run.config)  # complete: not touched
    assert (run.directory / "metrics.jsonl").stat().st_mtime_ns == before


def test_every_method_sees_the_same_weights_and_the_same_order_of_data(cache, tmp_path):
    tasks = [loop.prepare(tiny(cache, tmp_path, method), silent) for method in ("adamw", "functional-sam")]
    models = [task.model() for task in tasks]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    for step in (0, 5):
        (a, _), (b, _) = tasks[0].batch(step)[0], tasks[1].batch(step)[0]
        assert torch.equal(a, b)
    other = loop.prepare(tiny(cache, tmp_path, **{"training.data_seed": 1}), silent)
    assert not torch.equal(other.batch(0)[0][0], tasks[0].batch(0)[0][0])


def test_divergence_is_a_result(cache, tmp_path):
    config = tiny(cache, tmp_path, "sam", **{"optimizer.lr": 1e30})
    with pytest.raises(FloatingPointError, match="step"):
        loop.train(config)
    assert Run(config).done
    assert Run(config).summary()["diverged"]
    assert Run(config).summary()["loss"] is None


def test_a_directory_of_another_config_is_refused(cache, tmp_path):
    config = tiny(cache, tmp_path)
    other = tiny(cache, tmp_path, **{"training.init_seed": 9})
    run = Run(config)
    run.directory.mkdir()
    shutil.copy(_written(other, tmp_path / "x"), run.directory / "config.yaml")
    with pytest.raises(UserError, match="another config"):
        loop.train(config)


def _written(config, directory):
    from functional_sam.config import to_yaml

    write_text(directory / "config.yaml", to_yaml(config))
    return directory / "config.yaml"


def test_two_processes_never_write_one_run(cache, tmp_path):
    config = tiny(cache, tmp_path)
    first = Run(config)
    first.open()
    with pytest.raises(RunLocked, match="another process"):
        loop.train(config)
    first.close()


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step, "x": torch.full((1000,), float(step))})
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["step-00000002.pt", "step-00000003.pt"]
    newest = tmp_path / "step-00000003.pt"
    whole = newest.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:700] + bytes([whole[700] ^ 1]) + whole[701:], b""):
        newest.write_bytes(damaged)
        with pytest.warns(UserWarning, match="damaged"):
            assert checkpoint.load_newest(tmp_path)["step"] == 2
    newest.write_bytes(whole)
    assert checkpoint.load_newest(tmp_path)["step"] == 3
    newest.with_suffix(".sha256").unlink()  # killed between the two files
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.load_newest(tmp_path)["step"] == 2


def test_a_line_cut_by_a_crash_is_dropped(cache, tmp_path):
    run = loop.train(tiny(cache, tmp_path))
    path = run.directory / "metrics.jsonl"
    lines = path.read_text()
    path.write_text(lines + '{"kind": "train", "st')
    assert len(run.metrics()) == lines.count("\n")
    run.open()
    run.restart_at(4)
    run.close()
    assert max(line["step"] for line in run.metrics()) == 4


def test_full_disk_leaves_no_complete_run(cache, tmp_path, monkeypatch):
    """The last write fails: the run is partial, and finishes once there is room."""
    import errno

    from functional_sam import files

    config, sync = tiny(cache, tmp_path), files.sync

    def full(path):
        if ".done.json" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(UserError, match="disk full while writing"):
        loop.train(config)
    assert not Run(config).done
    assert not list(Run(config).directory.glob(".done*"))
    monkeypatch.setattr(files, "sync", sync)
    assert loop.train(config).done


def test_schedule_is_nanodos():
    optimizer = compose("language-23.9M", "adamw").optimizer
    assert learning_rate(optimizer, 0, 4000) == pytest.approx(1.6e-4)
    assert learning_rate(optimizer, 500, 4000) == pytest.approx((1.6e-4 + 1.6e-3) / 2)
    assert learning_rate(optimizer, 1000, 4000) == pytest.approx(1.6e-3)
    assert learning_rate(optimizer, 2500, 4000) == pytest.approx((1.6e-4 + 1.6e-3) / 2)
    assert learning_rate(optimizer, 4000, 4000) == pytest.approx(1.6e-4)


def test_float64_and_vision_run(cache, tmp_path):
    run = loop.train(
        tiny(cache, tmp_path, "functional-sam", "vision", **{"training.precision": "float64", "data.images": "mnist-5k"})
    )
    assert 0 <= run.summary()["accuracy"] <= 1

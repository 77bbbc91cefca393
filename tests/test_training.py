"""A run: resumed equals uninterrupted bit for bit, records are complete, divergence is kept, bad directories are refused."""

import itertools
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from any_task import killed_and_resumed

from functional_sam.config import compose, load, to_yaml
from functional_sam.data.cache import silent
from functional_sam.data.order import seed_of
from functional_sam.errors import Interrupted, UserError
from functional_sam.files import write_text
from functional_sam.models import block
from functional_sam.records import Run, RunLocked
from functional_sam.records.due import lines_due
from functional_sam.tasks import prepare
from functional_sam.training import checkpoint, loop, pool, precision
from functional_sam.training.attempt import attempt
from functional_sam.training.optimizers import optimizer_of
from functional_sam.training.schedule import learning_rate, warn_of_long_warmup
from functional_sam.training.speed import work_of


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


DRAWS = {"model.dropout": 0.1, "data.augment": "crop-flip", "data.images": "mnist-5k"}  # of a vision run
RESUMED = {
    "adamw": ("adamw", "language", {}),
    "precond-functional-sam": ("precond-functional-sam", "language", {}),
    "dropout and crops": ("functional-sam", "vision", DRAWS),
    "dropout recomputed": (
        "sam",
        "language",
        {"model.dropout": 0.1, "model.checkpoint_blocks": True, "optimizer.decay": "matrices"},
    ),
    "random directions": ("random-sam", "language", {"training.data_seed": 3}),
    "an average of gradients": ("friendly-sam", "language", {"method.options.decay": 0.8}),
    "sgd": ("momentum-sam", "language", {"optimizer.name": "sgd", "measure.ascents": "[gradient]", "optimizer.clip": 0.5}),
    "adafactor": (
        "sam",
        "language",
        {"optimizer.name": "adafactor", "measure.ascents": "[gradient]", "optimizer.decay": "matrices"},
    ),
}


def test_random_directions_are_of_the_data_seed(tmp_path):
    """As all else that a step draws, unless the config says otherwise."""
    seeds = []
    for method, overrides in (("random-sam", {}), ("random-sam", {"method.options.seed": 3}), ("sam", {})):
        seeds.append(loop._seeded(tiny(tmp_path, tmp_path, method, **{"training.data_seed": 7, **overrides})).get("seed"))
    assert seeds == [7, 3, None]


@pytest.mark.parametrize("case", RESUMED)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(cache, tmp_path, monkeypatch, case):
    method, task, overrides = RESUMED[case]
    overrides = {"training.test": True, "training.test_best": True, **overrides}
    whole = loop.train(tiny(cache, tmp_path / "whole", method, task, **overrides))

    config = tiny(cache, tmp_path / "parts", method, task, **overrides)
    backward = loop.SharpnessAware.backward
    for stop in (3, 7, 11):  # before the first checkpoint, between two, and after the last but one

        def dying(self, batches, stop=stop, **options):
            if self.steps + 1 > stop:
                raise Killed
            loss = backward(self, batches, **options)
            torch.rand(7)  # what was drawn elsewhere is of no account
            return loss

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
    assert {"test_loss", "best_loss", "test_best_loss"} <= set(without_time[0])


@pytest.mark.parametrize(
    ("settings", "optimizer_of_torch"),
    [
        (
            {"optimizer.beta1": 0.8, "optimizer.beta2": 0.9, "optimizer.eps": 1e-3},
            lambda ps: torch.optim.AdamW(ps, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3),
        ),
        (
            {"optimizer.name": "sgd", "optimizer.momentum": 0.5, "measure.ascents": "[gradient]"},
            lambda ps: torch.optim.SGD(ps, momentum=0.5, weight_decay=0.3),
        ),
    ],
    ids=["adamw", "sgd"],
)
def test_a_run_takes_the_steps_of_a_loop_by_hand(cache, tmp_path, settings, optimizer_of_torch):
    """In float64, by torch alone: the rate of each step, clipping, moments, decay; and dropout is in training only."""
    settings = {"training.precision": "float64", "model.dropout": 0.2, "optimizer.clip": 0.5, **settings}
    run = loop.train(tiny(cache, tmp_path, "adamw", **{"optimizer.weight_decay": 0.3, **settings}))
    config, task = run.config, prepare(run.config)
    model, losses, norms = task.model().double(), [], []
    optimizer = optimizer_of_torch(model.parameters())
    for step in range(config.training.steps):
        torch.manual_seed(seed_of("step", config.training.data_seed, step, 0))
        sums, counts = zip(*(task.loss_fn(task.forward(model, x), y) for x, y in task.batch(step)), strict=True)
        loss = sum(sums) / sum(counts)
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.param_groups[0]["lr"] = learning_rate(config.optimizer, step, config.training.steps)
        optimizer.step()
        optimizer.zero_grad()
    assert max(norms) > 0.5
    assert [line["loss"] for line in run.metrics("train")] == pytest.approx(losses, rel=1e-9)
    saved = checkpoint.load_newest(run.directory / "checkpoint")["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-8, atol=1e-12)
    assert run.summary()["loss"] == pytest.approx(task.evaluate(model.eval(), "validation")["loss"], rel=1e-9)


def test_time_is_that_of_all_attempts(cache, tmp_path, monkeypatch):
    """By a clock that ticks at every look, a run that was killed after a checkpoint has the seconds of one that was not."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    config = tiny(cache, tmp_path, "adamw", **{"measure.points": 0})
    whole, parts = loop.train(config, tmp_path / "whole"), killed_and_resumed(config, tmp_path / "parts", 4)
    assert [line["seconds"] for line in whole.metrics("train")] == list(range(1, 13))
    assert parts.metrics() == whole.metrics()
    assert parts.summary() == whole.summary()


def test_metrics_are_on_the_disk_before_a_checkpoint_is_past_them(cache, tmp_path, monkeypatch):
    """What a power cut takes of metrics.jsonl is measured again only where the checkpoint is of before it."""
    config = tiny(cache, tmp_path, "adamw", **{"measure.points": 0})
    path, flush, save = Run(config).directory / "metrics.jsonl", os.fsync, loop.save
    flushed, steps = [b""], []

    def fsync(descriptor):
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            flushed.append(path.read_bytes())
        flush(descriptor)

    def saved(directory, step, *rest):
        assert flushed[-1] == path.read_bytes()
        assert json.loads(flushed[-1].splitlines()[-1])["step"] == step
        steps.append(step)
        save(directory, step, *rest)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(loop, "save", saved)
    loop.train(config)
    assert steps == [4, 8, 12]


def test_the_record_says_where_it_came_from(cache, tmp_path):
    run = loop.train(tiny(cache, tmp_path))
    record = json.loads((run.directory / "provenance.json").read_text())
    assert record["hash"] == run.config.hash
    assert len(record["data"]["sha256"]) == 64
    assert record["versions"]["torch"].startswith("2.")
    assert {line["step"] for line in run.metrics("decompose")} == loop.measure_steps(3, 12) == {1, 3, 12}
    shares = run.metrics("decompose")
    assert all(0 < line["gradient"]["share"] < 1 for line in shares)
    assert ["adam" in line for line in shares] == [False, False, True]  # from measure.adam_from = 10 on
    assert 0 < shares[-1]["adam"]["share"] < 1
    by_config = (one for one in run.metrics() if one["kind"] not in ("train", "test"))
    assert lines_due(run.config) == Counter((one["kind"], one["step"]) for one in by_config)
    doses = run.metrics("dose")
    assert {line["step"] for line in doses} == loop.measure_steps(8, 12)
    assert all(0 < line["dose"] < 10 for line in doses)
    kept = sorted(path.name for path in (run.directory / "checkpoint").iterdir())
    assert kept == ["step-00000012.pt", "step-00000012.sha256"]  # the final weights alone
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


def test_methods_see_the_same_masks_in_both_passes(cache, tmp_path, monkeypatch):
    """Dropout of a step is the seeds' alone: AdamW's masks are those of SAM's first pass, and of its second."""
    kept, dropout = [], block.F.dropout

    def recorded(*arguments):
        result = dropout(*arguments)
        kept.append(result != 0)
        return result

    monkeypatch.setattr(block.F, "dropout", recorded)
    masks = {}
    quiet = {"model.dropout": 0.3, "measure.points": 0, "measure.doses": 0, "training.steps": 3}
    for method in ("adamw", "sam"):
        kept.clear()
        loop.train(tiny(cache, tmp_path, method, **quiet))
        masks[method] = torch.stack(kept).unflatten(0, (3, -1))  # by step: two branches of each of two micro-batches, a pass
    assert masks["adamw"].shape[:2] == (3, 4)
    assert masks["sam"].shape[:2] == (3, 8)
    assert torch.equal(masks["sam"][:, :4], masks["adamw"])
    assert torch.equal(masks["sam"][:, 4:], masks["adamw"])
    assert len({mask.numpy().tobytes() for mask in masks["adamw"].flatten(0, 1)}) == 12  # and none is another's


def test_a_dose_changes_nothing_of_its_step(cache, tmp_path):
    """With dropout, where one draw too many would."""
    runs = [loop.train(tiny(cache, tmp_path, **{"model.dropout": 0.3, "measure.doses": doses})) for doses in (0, 8)]
    assert runs[0].metrics("train")[-1]["loss"] == runs[1].metrics("train")[-1]["loss"]
    assert not loop.train(tiny(cache, tmp_path, "adamw")).metrics("dose")


def test_crops_are_those_of_data_seed_and_step(cache, tmp_path):
    plain, one, same, other = (
        loop.prepare(tiny(cache, tmp_path, task="vision", **{"data.images": "mnist-5k", **more}), silent)
        for more in ({}, DRAWS, DRAWS, {**DRAWS, "training.data_seed": 1})
    )
    assert torch.equal(one.rows(3)[0], same.rows(3)[0])
    assert not torch.equal(one.rows(3)[0], plain.rows(3)[0])
    assert torch.equal(one.rows(3)[1], plain.rows(3)[1])
    assert not torch.equal(one.rows(3)[0], other.rows(3)[0])
    held_out = [next(iter(task.held_out("validation", 4, 4)))[0] for task in (plain, one)]
    assert torch.equal(*held_out)


def test_the_test_split_at_the_best_evaluation(cache, tmp_path, monkeypatch):
    """Validation losses put in: each that is the best so far is followed by the test split, and the last of these counts."""
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.5, 9.0])
    calls = []

    def evaluate(self, model, split):
        calls.append(split)
        return {"loss": next(losses) if split == "validation" else 100.0 + len(calls)}

    monkeypatch.setattr(type(loop.prepare(tiny(cache, tmp_path), silent)), "evaluate", evaluate)
    run = loop.train(tiny(cache, tmp_path, "adamw", **{"training.test_best": True, "training.eval_every": 2, "measure.points": 0}))
    assert "".join(split[0] for split in calls) == "vtvtvvvtv"
    assert [line["step"] for line in run.metrics("test")] == [2, 4, 10]
    assert {key: value for key, value in run.summary().items() if "best" in key} == {
        "best_step": 10,
        "best_loss": 1.5,
        "test_best_loss": 108.0,
    }


def test_a_lost_test_line_of_the_best_is_missed_when_the_run_goes_on(cache, tmp_path):
    """Not after the last step, when all the time is spent."""
    config = tiny(cache, tmp_path, "adamw", **{"training.test_best": True, "training.eval_every": 2, "measure.points": 0})
    run = loop.train(config)
    (run.directory / "done.json").unlink()
    path = run.directory / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in run.metrics() if line["kind"] != "test"))
    with pytest.raises(UserError, match=r"0 lines of kind test at step 12, where training wrote 1; restore the file"):
        loop.train(config)


def test_jitter_moves_every_weight_a_little_and_is_of_init_seed(cache, tmp_path):
    def weights(**more):
        config = tiny(cache, tmp_path, **more)
        return torch.cat([p.flatten() for p in loop._jittered(loop.prepare(config, silent).model(), config).parameters()]).detach()

    plain, jittered = weights(), weights(**{"training.jitter": 0.01})
    relative = (jittered / plain - 1)[plain != 0]
    assert 0.009 < float(relative.std()) < 0.011
    assert abs(float(relative.mean())) < 0.001
    assert torch.equal(jittered, weights(**{"training.jitter": 0.01, "training.data_seed": 5}))


def test_decay_of_matrices_alone(cache, tmp_path):
    task = loop.prepare(tiny(cache, tmp_path, **{"optimizer.decay": "matrices"}), silent)
    model = task.model()
    optimizer = optimizer_of(task.config.optimizer, task, model)
    decayed = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {p: 0.1 if p.ndim > 1 else 0.0 for p in model.parameters()} == decayed
    task.config.optimizer.decay = "all"
    assert [group["weight_decay"] for group in optimizer_of(task.config.optimizer, task, model).param_groups] == [0.1]


def test_windows_are_evaluated_whole(cache, tmp_path):
    """Every token of the first documents is a target; bits per byte are of all their bytes."""
    config = tiny(cache, tmp_path, "adamw", **{"data.held_out": "windows", "training.eval_rows": 200})
    task = loop.prepare(config, silent)
    rows = list(task.data.eval_batches("validation", 8, 32, 200, windows=True))
    found = task.evaluate(task.model(), "validation")
    assert found["tokens"] == sum(int((targets >= 0).sum()) for _, targets, _ in rows)
    num_bytes = sum(int(covered.sum()) for *_, covered in rows)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / num_bytes)


def test_bf16_where_it_is_slow_is_said_once_with_the_way_out(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "bf16_times", lambda: 38.2)
    slow = tiny(cache, tmp_path, "adamw", **{"training.precision": "bf16", "training.steps": 1, "measure.points": 0})
    with pytest.warns(UserWarning, match="38 times as long .* training.precision=float32 avoids it"):
        loop.train(slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.warn_of_slow_bf16(tiny(cache, tmp_path))
        monkeypatch.setattr(precision, "bf16_times", lambda: 0.6)
        precision.warn_of_slow_bf16(slow)


def test_bf16_is_timed_quickly():
    began = time.perf_counter()
    assert 0.02 < precision.bf16_times() < 1000
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("where", ["_evaluate", "final_curvature", "robustness"])
def test_a_signal_after_the_last_step_waits_for_no_measurement(cache, tmp_path, monkeypatch, where):
    """A cluster kills a job `signal_delay` seconds after its signal: what the end measures may take longer, and begins anew."""
    settings = {"training.steps": 2, "training.test": True, "measure.curvature": True, "measure.robustness": True}
    settings |= {"measure.probes": 2, "measure.lanczos": 4, "measure.points": 0}
    config = tiny(cache, tmp_path, "adamw", **settings)
    whole = loop.train(tiny(cache, tmp_path / "whole", "adamw", **settings))
    usual = getattr(loop, where)

    def signalled(*given):
        if where != "_evaluate" or given[2] == "test":
            signal.raise_signal(signal.SIGUSR2)
        return usual(*given)

    monkeypatch.setattr(loop, where, signalled)
    with pytest.raises(Interrupted, match=f"SIGUSR2: all 2 steps are done and saved; .* train {Run(config).directory}$"):
        loop.train(config)
    monkeypatch.setattr(loop, where, usual)
    assert Run(config).state == "partial"
    run = loop.train(config)
    assert content(run) == content(whole)
    assert run.read("curvature.json") == whole.read("curvature.json")
    assert {**run.summary(), "seconds": 0} == {**whole.summary(), "seconds": 0}


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
    write_text(directory / "config.yaml", to_yaml(config))
    return directory / "config.yaml"


def test_a_begun_run_goes_on_with_the_runtime_settings_asked_for_now(cache, tmp_path):
    """Its process knows the config.yaml alone. log_every stays, by which the lines of metrics.jsonl are judged; the rest is new."""
    before = tiny(cache, tmp_path, "adamw", **{"runtime.device": "cuda", "runtime.cache": "gone", "runtime.log_every": 5})
    now = tiny(cache, tmp_path, "adamw", **{"runtime.checkpoint_every": 7})
    Run(before).for_a_process()
    assert load(Run(now).directory / "config.yaml") == before
    Run(now).for_a_process()
    assert load(Run(now).directory / "config.yaml") == replace(now, runtime=replace(now.runtime, log_every=5))
    other = tiny(cache, tmp_path, "adamw", **{"training.init_seed": 9})
    for text in (to_yaml(other), "damaged: [", "- 1"):  # whoever does the run says so, and the others go on
        write_text(Run(now).directory / "config.yaml", text)
        Run(now).for_a_process()
        assert (Run(now).directory / "config.yaml").read_text() == text


def test_two_processes_never_write_one_run(cache, tmp_path):
    config = tiny(cache, tmp_path)
    first = Run(config)
    first.open()
    with pytest.raises(RunLocked, match="another process"):
        loop.train(config)
    first.close()


def test_a_checkpoint_of_another_model_names_it_and_the_way_out(cache, tmp_path, monkeypatch):
    """Code that was changed since the run was begun may make another model of the same config."""
    config = tiny(cache, tmp_path, "adamw", **{"training.steps": 2, "measure.points": 0})
    run = loop.train(config)
    (run.directory / "done.json").unlink()
    other = tiny(cache, tmp_path, "adamw", **{"model.width": 32})
    made = prepare(other).model
    monkeypatch.setattr("functional_sam.tasks.language.Language.model", lambda self: made())
    with pytest.raises(UserError, match=rf"^{run.directory}/checkpoint, step 2: .* other code.*size mismatch.*remove the"):
        loop.train(config)


def test_a_checkpoint_of_another_run_of_the_same_shape_is_refused(cache, tmp_path):
    """Copied in by hand, say; nothing in its tensors would tell."""
    first, second = (tiny(cache, tmp_path, "adamw", **{"training.init_seed": seed, "measure.points": 0}) for seed in (1, 2))
    theirs, own = loop.train(first), Run(second)
    own.open()
    own.close()
    shutil.copytree(theirs.directory / "checkpoint", own.directory / "checkpoint", dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"^{own.directory}/checkpoint, step 12: of another run .hash {first.hash}, .*remove the"):
        loop.train(second)


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
    with pytest.raises(UserError, match="is cut, and the run is complete"):
        run.metrics()
    (run.directory / "done.json").unlink()
    assert len(run.metrics()) == lines.count("\n")
    run.open()
    run.restart_at(4)
    run.close()
    assert max(line["step"] for line in run.metrics()) == 4


def test_a_resume_needs_the_metrics_until_its_checkpoint(cache, tmp_path):
    """What a checkpoint is past would never be measured again: nothing is touched."""
    run = loop.train(tiny(cache, tmp_path))
    whole = {path.name: path.read_bytes() for path in run.directory.iterdir() if path.is_file()}
    (run.directory / "done.json").unlink()
    path = run.directory / "metrics.jsonl"
    for content in (None, b"", b"".join(whole[path.name].splitlines(True)[:3])):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"metrics\.jsonl: its lines of kind train end at step .* remove the checkpoints"):
            loop.train(run.config)
        assert (path.read_bytes() if path.exists() else None) == content
    path.write_bytes(whole[path.name])
    assert loop.train(run.config).metrics() == [json.loads(line) for line in whole[path.name].splitlines()]


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


def test_a_warmup_that_outlasts_the_run_is_said():
    config = compose("language", "adamw", overrides=["optimizer.warmup_steps=20", "training.steps=10"])
    with pytest.warns(UserWarning, match="warmup_steps=20 is not below training.steps=10: .* ends at 0.5. of optimizer.lr"):
        warn_of_long_warmup(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_long_warmup(replace(config, optimizer=replace(config.optimizer, warmup_steps=9)))
        warn_of_long_warmup(replace(config, optimizer=replace(config.optimizer, lr=0.0)))


def test_other_schedules():
    """Linear: a line from the peak to a tenth; constant: the peak; both after the same warm-up."""
    optimizer = compose("language-23.9M", "adamw", overrides=["optimizer.schedule=linear"]).optimizer
    assert learning_rate(optimizer, 500, 4000) == pytest.approx((1.6e-4 + 1.6e-3) / 2)
    assert learning_rate(optimizer, 1000, 4000) == pytest.approx(1.6e-3)
    assert learning_rate(optimizer, 2000, 4000) == pytest.approx(1.6e-3 * (2 + 0.1) / 3)
    assert learning_rate(optimizer, 4000, 4000) == pytest.approx(1.6e-4)
    optimizer.schedule = "constant"
    assert learning_rate(optimizer, 0, 4000) == pytest.approx(1.6e-4)
    assert learning_rate(optimizer, 3999, 4000) == learning_rate(optimizer, 1000, 4000) == 1.6e-3


def test_float64_and_vision_run(cache, tmp_path):
    run = loop.train(
        tiny(cache, tmp_path, "functional-sam", "vision", **{"training.precision": "float64", "data.images": "mnist-5k"})
    )
    assert 0 <= run.summary()["accuracy"] <= 1


def test_time_left_is_unknown_before_the_largest_shape_is_measured(cache, tmp_path):
    """Then it is remaining work at each shape's own speed, shared among the jobs; start-up and first lines alone say nothing."""
    large = {"model.width": 64, "training.steps": 100}
    configs = [tiny(cache, tmp_path, "adamw", **{"training.steps": 100, "training.init_seed": i}) for i in range(3)]
    configs += [tiny(cache, tmp_path, "sam", **large, **{"training.init_seed": i}) for i in range(2)]
    watched = [pool.Watched(Run(config), work_of(config)) for config in configs]
    assert math.isnan(pool.time_left(watched, 2))
    watched[0].step, watched[0].seconds = 50, 5.0
    watched[3].step, watched[3].seconds = 1, 30.0
    assert math.isnan(pool.time_left(watched, 2))
    watched[3].step, watched[3].seconds = 20, 20.0
    assert pool.time_left(watched, 1) == pytest.approx(50 * 0.1 + 2 * 100 * 0.1 + 80 + 100)
    assert pool.time_left(watched, 2) == pytest.approx((25 + 180) / 2)
    assert pool.time_left(watched, 50) == pytest.approx(100)
    assert pool._time(float("nan")) == "time left unknown yet"


def test_an_attempt_says_why_it_failed_and_forgets_it_at_success(cache, tmp_path, monkeypatch):
    """Divergence is complete; a signal and a lock are no failures; another process's error.txt is left to it."""
    config = tiny(cache, tmp_path, "adamw", **{"training.steps": 1, "measure.points": 0})
    directory = _written(config, Run(config).directory).parent
    error = directory / "error.txt"

    def raising(failure):
        def train(*_):
            raise failure

        return train

    train = loop.train
    for failure in (Interrupted("stopped"), RunLocked("locked")):
        monkeypatch.setattr("functional_sam.training.attempt.train", raising(failure))
        with pytest.raises(type(failure)):
            attempt(directory, 1)
        assert not error.exists()
    monkeypatch.setattr("functional_sam.training.attempt.train", raising(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        attempt(directory, 1, leads=False)
    assert not error.exists()
    with pytest.raises(OSError, match="no space"):
        attempt(directory, 1)
    assert error.read_text() == "OSError: no space\n"
    monkeypatch.setattr("functional_sam.training.attempt.train", train)
    assert attempt(directory, 1).done
    assert not error.exists()
    diverging = tiny(cache, tmp_path, "sam", **{"optimizer.lr": 1e30})
    assert attempt(_written(diverging, Run(diverging).directory).parent, 1).summary()["diverged"]

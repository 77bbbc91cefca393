"""Where a result comes from, whether it is still what the present code gives, and the released records that stand in for runs."""

import dataclasses
import gzip
import json
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest

from functional_sam import exhibits, files
from functional_sam.config import compose, to_yaml
from functional_sam.errors import UserError
from functional_sam.exhibits import check
from functional_sam.exhibits.output import as_written
from functional_sam.exhibits.spec import Bound, Spec, Tolerance, load_spec
from functional_sam.files import write_text
from functional_sam.records import Run, RunDirectories, RunLocked, code, move_aside, own, released, status
from functional_sam.records.provenance import commit, machine, provenance, resumed
from functional_sam.training.attempt import attempt
from functional_sam.training.speed import estimate, measured

HERE = {"code": code.fingerprint(), "versions": {}, "data": {"data": "d", "sha256": "s" * 64}}

AT_THE_END = [{"kind": kind, "step": 10, "loss": 3.0} for kind in ("train", "validation", "decompose")]


def record(root, method="adamw", steps=10, seconds=5.0, done=True, lines=(), more=(), **changes):
    """A run's directory, as if it had been run here."""
    config = compose("language", method, "quick", overrides=[f"training.steps={steps}", f"runtime.runs={root}", *more])
    run = Run(config)
    write_text(run.directory / "config.yaml", to_yaml(config))
    run.write("provenance.json", {"commit": "c", "diff": "", "machine": machine(), "threads": 1, **HERE, **changes})
    write_text(run.directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if done:
        run.write("done.json", {"step": steps, "seconds": seconds, "loss": 3.0})
    return run


# ---------------------------------------------------------------------- code and data


def test_a_place_that_is_no_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for place, words in (("file", "Not a directory|File exists"), ("nowhere", "File exists"), ("n" * 300, "File name too long")):
        with pytest.raises(UserError, match=f"cannot write .*({words}).*choose another place"):
            write_text(tmp_path / place / "config.yaml", "x")


def test_what_takes_its_name_is_on_the_disk_before_and_the_name_after(tmp_path, monkeypatch):
    """Else a power cut could leave the name without the content, or take a file that a later one relies on."""
    flushed = []
    monkeypatch.setattr(files, "sync", lambda path: flushed.append((path, (tmp_path / "new").exists())))

    write_text(tmp_path / "new", "x")
    (temporary, before), *after = flushed
    assert (temporary.parent, temporary.suffix, before, after) == (tmp_path, ".tmp", False, [(tmp_path, True)])

    (tmp_path / "new").unlink()
    flushed.clear()
    with files.atomic_directory(tmp_path / "new") as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "file").write_text("x")
    *contents, last = flushed
    assert {path for path, _ in contents} == {temporary, temporary / "part", temporary / "part" / "file"}
    assert not any(exists for _, exists in contents)
    assert last == (tmp_path, True)


def test_comments_and_docstrings_are_no_code():
    source = 'def f(x):\n    """Twice x."""\n    return 2 * x\n'
    assert code.digest(source) == code.digest("# another\ndef f(x):\n\n    return 2*x  # twice\n")
    assert code.digest(source) != code.digest(source.replace("2 *", "3 *"))
    assert code.digest('"""Nothing."""\n') == code.digest("")
    nested = "try:\n class A:\n  async def f(self):\n   {}1\nexcept E:\n match x:\n  case 1:\n   def g():\n    {}1\n"
    assert code.digest(nested.format('"""F."""; ', '"""G."""; ')) == code.digest(nested.format("", ""))


def test_what_only_watches_runs_is_no_code():
    files = code.fingerprint()["files"]
    assert {"training/loop.py", "ascents.py", "head.py", "vectors.py", "weights.py", "losses.py", "models/block.py"} <= files.keys()
    assert not {"training/pool.py", "cli.py", "exhibits/table_1.py"} & files.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"code": {"sha256": "0", "files": {**HERE["code"]["files"], "losses.py": "0"}}}, ["code: losses.py"]),
        ({"code": {"sha256": "0", "files": {"gone.py": "0"}}}, ["code: gone.py"]),
        ({"code": {"sha256": "0", "files": {"losses.py": HERE["code"]["files"]["losses.py"]}}}, []),  # the others are new since
        ({"data": {"sha256": "t" * 64}}, ["data tttttttt, here ssssssss"]),
        ({"versions": {"torch": "1.0.0+cpu"}}, ["torch 1.0.0+cpu, here 2"]),
        ({"resumed": [{"step": 3, "code": {"sha256": "0", "files": {"losses.py": "0"}}}]}, ["code: losses.py"]),
    ],
)
def test_what_differs_is_named(change, words):
    found = code.differences({**HERE, **change}, "s" * 64)
    assert len(found) == len(words)
    assert all(one.startswith(word) for one, word in zip(found, words, strict=True))
    if "data" in change:
        assert code.differences({**HERE, **change}, None) == []  # data that is not prepared cannot be compared


def test_the_repository_around_a_package_is_not_its_own(tmp_path, monkeypatch):
    """As of an environment within another project, or where a hook of git says which repository is meant."""
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]):
        code.within_git(*words, root=tmp_path)
    (tmp_path / "inside").mkdir()
    assert len(code.git("rev-parse", "HEAD", root=tmp_path)) == 40
    with pytest.raises(FileNotFoundError, match="not the root of a repository"):
        code.git("rev-parse", "HEAD", root=tmp_path / "inside")
    here = commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert commit() == here


def test_a_run_is_not_begun_anew_beside_its_renamed_directory(tmp_path, monkeypatch):
    run = record(tmp_path, done=False)
    assert Run.at(run.directory).directory == run.directory
    monkeypatch.chdir(run.directory)
    assert Run.at(Path()).directory == run.directory  # functional-sam train .
    renamed = run.directory.rename(tmp_path / "renamed")
    with pytest.raises(UserError, match=f"its config.yaml is that of {run.config.name} today, so that renamed was renamed"):
        Run.at(renamed)
    with pytest.raises(UserError, match="was renamed"):
        attempt(renamed, 1)


def test_a_record_without_fingerprint_is_judged_by_its_commit():
    assert code.differences({"commit": "unknown", "diff": ""}) == ["code: commit unknown, not known here"]
    assert code.differences({"commit": "HEAD", "diff": "changed"}) == ["code: made with uncommitted changes"]


def test_a_resumption_is_recorded_when_something_changed():
    before = {**provenance(), "data": {}, "processes": 1, "parallel": "none"}
    assert resumed(before, {**before, "started": "later"}, 5) == before
    once = resumed(before, {**before, "started": "later", "host": "elsewhere"}, 5)
    assert once["resumed"] == [{"step": 5, "started": "later", "host": "elsewhere"}]
    assert resumed(once, {**before, "started": "again", "host": "elsewhere"}, 7) == once
    back = resumed(once, {**before, "started": "again"}, 7)
    assert back["resumed"][1] == {"step": 7, "started": "again", "host": before["host"]}


def test_states(tmp_path):
    line = {"kind": "train", "step": 4, "loss": 3.5, "seconds": 1.0}
    done, stale = record(tmp_path), record(tmp_path, steps=11, versions={"torch": "1.0"})
    partial, missing = (
        record(tmp_path, steps=12, done=False, lines=[line]),
        Run(compose("vision", overrides=[f"runtime.runs={tmp_path}"])),
    )
    assert [status(run).state for run in (done, stale, partial, missing)] == ["done", "stale", "partial", "missing"]
    assert (status(partial).step, status(partial).loss) == (4, 3.5)
    assert stale.done  # shown as stale, and complete all the same
    partial.open()
    try:
        assert status(partial).state == "running"
        assert "running (process" in status(partial).words(partial)
        with pytest.raises(RunLocked):
            move_aside([done, partial], tmp_path)
        assert done.directory.is_dir()
    finally:
        partial.close()
    assert status(partial).state == "partial"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: [*lines[:1], b'{"kind": "tr', *lines[1:]], "line 2 is damaged"),
        (lambda lines: [b"\xff\xfe", *lines], "line 1 is damaged"),
        (lambda lines: [*lines, b"[1]"], "line 4 is damaged .no JSON object"),
        (lambda lines: [*lines, b'{"step": 3}'], "line 4 is damaged .no JSON object"),
    ],
)
@pytest.mark.parametrize("done", [True, False])
def test_damaged_metrics_are_refused(tmp_path, damage, words, done):
    run = record(tmp_path, lines=[{"kind": "train", "step": step, "loss": 3.0} for step in (1, 2, 3)], done=done)
    path = run.directory / "metrics.jsonl"
    content = b"".join(line + b"\n" for line in damage(path.read_bytes().splitlines()))
    path.write_bytes(content)
    for read in (run.metrics, run.open):
        with pytest.raises(UserError, match=words):
            read()
    assert path.read_bytes() == content
    assert not run.running


def test_a_lock_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    run = record(tmp_path, done=False)
    (run.directory / ".lock").touch()
    monkeypatch.setattr("fcntl.flock", refuse)  # whoever is root may read all
    with pytest.raises(UserError, match=r"\.lock \(Permission denied\): is the run another user's"):
        _ = run.running


def test_a_complete_run_has_its_metrics(tmp_path):
    """Cut in a line, at the end of one, in the middle, or gone, or with a line twice: none is drawn or released."""
    lines = [{"kind": "decompose", "step": 1, "loss": 3.0}, *AT_THE_END]
    run = record(tmp_path, lines=lines, more=["measure.points=2"])
    path, here = run.directory / "metrics.jsonl", RunDirectories()
    whole = path.read_bytes()
    assert len(here.metrics(run.config)) == 4
    first, *others = whole.splitlines(True)
    damages = [
        (whole[:-3], "line 4 is cut"),
        (first, "kind train end at step 0"),
        (first + others[0], "0 lines of kind validation at step 10, where training wrote 1"),
        (first + others[0] + others[1], "0 lines of kind decompose at step 10"),
        (b"".join(others), "0 lines of kind decompose at step 1"),
        (first + whole, "2 lines of kind decompose at step 1"),
    ]
    for content, words in (*damages, (None, "is missing")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=rf"metrics\.jsonl.*{words}"):
            here.metrics(run.config)
        with pytest.raises(UserError, match=words):
            released.save_pack("figure-1", "quick", [run])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("done.json", '{"step": 10, "test_loss": NaN}', "test_loss is nan"),
        ("done.json", '{"step": 10, "test_loss": "1"}', "test_loss is '1'"),
        ("done.json", "{}", "no step"),
        ("done.json", "[]", "a list, no JSON object"),
        ("done.json", '{"step": ', "is damaged"),
        ("provenance.json", "{}", "no commit, diff, versions, data"),
        ("provenance.json", "[]", "a list, no JSON object"),
        ("provenance.json", None, "is missing"),
        ("config.yaml", None, "is missing"),
    ],
)
def test_a_damaged_record_is_not_drawn(tmp_path, name, content, words):
    run, here = record(tmp_path), RunDirectories()
    assert here.summary(run.config)["loss"] == 3.0
    path = run.directory / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=rf"{name} .*{words}.* away and run again"):
        here.summary(run.config)
    if name == "done.json":
        assert status(run).state == "damaged"
        assert words in status(run).words(run)


def test_the_files_of_another_run_are_not_drawn(tmp_path):
    run, other, here = record(tmp_path), record(tmp_path, "sam"), RunDirectories()
    assert here.summary(run.config)["step"] == 10
    shutil.copy(other.directory / "config.yaml", run.directory)
    for read in (here.summary, here.metrics, lambda config: here.read(config, "provenance.json")):
        with pytest.raises(UserError, match=f"config.yaml is that of another run .{other.config.name}"):
            read(run.config)
    write_text(run.directory / "config.yaml", to_yaml(run.config))
    assert here.summary(run.config)["step"] == 10
    made = run.read("provenance.json")
    run.write("provenance.json", {**made, "hash": other.config.hash})
    with pytest.raises(UserError, match=r"provenance.json is that of another run"):
        here.summary(run.config)


def test_a_config_with_other_runtime_settings_or_without_newer_ones_is_the_runs_own(tmp_path):
    run = record(tmp_path)
    path = run.directory / "config.yaml"
    text = path.read_text().replace("threads: null", "threads: 7").replace("  jitter: 0.0\n", "")
    path.write_text(text)
    assert own._says(path, run.config)
    path.write_text(text.replace("lr_start: 0.1", "lr_start: 1e-1"))  # as OmegaConf reads it, and YAML 1.1 does not
    assert RunDirectories().summary(run.config)["step"] == 10


def test_moving_aside_keeps_everything(tmp_path):
    first = record(tmp_path)
    content = {path.name: path.read_bytes() for path in first.directory.iterdir()}
    asides = []
    for _ in range(2):  # within one second
        asides.append(move_aside([first], tmp_path))
        assert not first.directory.exists()
        record(tmp_path)
    assert asides[0] != asides[1]
    assert {path.name: path.read_bytes() for path in (asides[0] / first.directory.name).iterdir()} == content
    assert move_aside([Run(compose("vision", overrides=[f"runtime.runs={tmp_path}"]))], tmp_path) is None


# ---------------------------------------------------------------------- time


def test_time_from_runs_of_the_same_shape(tmp_path):
    record(tmp_path, "adamw", steps=10, seconds=5.0)  # half a second a step of one pass
    record(tmp_path, "sam", steps=20, seconds=30.0, machine="another machine")
    speeds = measured(tmp_path)
    assert len(speeds) == 1
    config = compose("language", "adamw", "quick", overrides=["training.init_seed=7"])
    assert estimate(config, speeds).seconds == pytest.approx(0.5)
    assert estimate(compose("language", "sam", "quick"), speeds).seconds == pytest.approx(1.0)  # two passes
    assert estimate(compose("language", "momentum-functional-sam", "quick"), speeds).seconds == pytest.approx(0.5 * 4 / 3)
    assert estimate(compose("vision", "adamw", "quick"), speeds) is None
    assert estimate(compose("language", "adamw", "quick", overrides=["model.width=32"]), speeds) is None
    partial = [{"kind": "train", "step": 5, "loss": 3.0, "seconds": 9.0}]
    record(tmp_path, "sam", steps=30, done=False, lines=partial)
    assert estimate(
        compose("language", "sam", "quick", overrides=["training.steps=30"]), measured(tmp_path)
    ).seconds == pytest.approx(1.8)


def test_the_same_text_is_the_same_data_whatever_the_last_bits_of_its_tokenizer():
    """Two kinds of processor train tokenizers that cut alike and differ in the last bits of their scores."""
    files = {name: {"bytes": 9, "sha256": name} for name in ("train.ids", "test.ids", "tokenizer.model")}
    here = {"sha256": "h", "files": files}
    there = {"sha256": "t", "files": {**files, "tokenizer.model": {"bytes": 9, "sha256": "of another machine"}}}
    other = {"sha256": "o", "files": {**files, "test.ids": {"bytes": 9, "sha256": "other text"}}}
    assert code.content(here) == code.content(there) != code.content(other)
    assert code.differences({**HERE, "data": there}, code.content(here)) == []
    assert code.differences({**HERE, "data": other}, code.content(here))[0].startswith("data ")
    assert code.content({"data": "d", "sha256": "s"}) == "s"  # recorded before files were
    assert code.content({}) == ""


# ---------------------------------------------------------------------- released records


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(released, "results_directory", lambda: tmp_path / "results")
    return tmp_path / "results"


def test_a_pack_gives_back_what_the_runs_hold(tmp_path, results, monkeypatch):
    lines = [
        {"kind": "train", "step": 1, "loss": 4.0, "seconds": 0.1},
        {"kind": "decompose", "step": 1, "gradient": {"share": 1 / 3}},
        *AT_THE_END,
    ]
    other = {"sha256": "0", "files": {"losses.py": "0"}}
    command = [str(code.ROOT / "src" / "x.py"), "train", "/elsewhere/runs/y"]
    run = record(tmp_path / "runs", lines=lines, diff="secret", command=command, resumed=[{"step": 1, "code": other}])
    run.write("curvature.json", {"trace": 0.1 + 0.2})
    path = released.save_pack("figure-1", "quick", [run])
    text = gzip.decompress(path.read_bytes()).decode()
    assert "secret" not in text
    assert str(code.ROOT) not in text
    assert "/elsewhere" not in text

    pack, here = released.load_pack("figure-1", "quick"), RunDirectories()
    config, gone = run.config, dataclasses.replace(run.config, task="vision")
    assert (pack.name, here.name) == ("results/runs/figure-1-quick.jsonl.gz", "runs")
    for source in (pack, here):
        assert source.done(config)
        assert not source.done(gone)
        assert source.metrics(config, "decompose")[0]["gradient"]["share"] == 1 / 3
        assert source.read(config, "curvature.json") == {"trace": 0.1 + 0.2}
        assert source.summary(config)["loss"] == 3.0
    assert here.metrics(config) == lines
    assert pack.metrics(config) == [line for line in lines if line["kind"] != "train"]
    record_back = pack.read(config, "provenance.json")
    assert record_back["code"] == code.fingerprint()
    assert record_back["resumed"][0]["code"] == other
    assert record_back["diff"]  # that there were changes is kept
    with pytest.raises(UserError, match="'train' are not released"):
        pack.metrics(config, "train")
    with pytest.raises(UserError, match="not among the released files"):
        pack.read(config, "other.json")
    with pytest.raises(UserError, match="not among the released runs"):
        pack.summary(gone)
    whole = path.read_bytes()
    monkeypatch.setattr(time, "time", lambda: 1e9)  # at another time the same file
    assert released.save_pack("figure-1", "quick", [run]).read_bytes() == whole
    for damaged in (whole[: len(whole) // 2], whole[:40] + b"?" + whole[41:], b"", gzip.compress(text[: len(text) // 2].encode())):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="restore it with git checkout"):
            released.load_pack("figure-1", "quick")
    assert released.load_pack("table-1", "quick") is None


def test_released_records_become_runs_that_release_as_the_same_file(tmp_path, results):
    lines = [{"kind": "decompose", "step": 1, "gradient": {"share": 1 / 3}}, *AT_THE_END]
    first = record(tmp_path / "there", lines=lines, diff="secret", commit="c", machine="processor A")
    second = record(tmp_path / "there", steps=20, lines=[{**line, "step": 20} for line in AT_THE_END])
    path = released.save_pack("figure-1", "quick", [first, second])
    whole, pack = path.read_bytes(), released.load_pack("figure-1", "quick")
    here = [
        compose("language", "adamw", "quick", overrides=[f"training.steps={n}", f"runtime.runs={tmp_path}/here"])
        for n in (10, 20, 30)
    ]
    begun = Run(here[1])
    begun.open()
    begun.restart_at(0)
    begun.log("train", 1, loss=1.0)
    begun.close()
    (run,) = released.restore(pack, here)  # not the one that was begun here, nor the one that was not released
    assert run.directory == Run(here[0]).directory
    assert (run.done, run.released, run.summary()) == (True, True, {"step": 10, "seconds": 5.0, "loss": 3.0})
    assert run.metrics() == [line for line in lines if line["kind"] != "train"]
    assert run.read("provenance.json")["machine"] == "processor A"
    assert (begun.state, begun.released, Run(here[2]).state) == ("partial", False, "missing")
    assert "(released)" in status(run).words(run)
    assert measured(tmp_path / "here") == []  # the speed of another machine is none of this one's
    assert released.restore(pack, here) == []
    (run.directory / "done.json").unlink()  # cut off while it was taken: taken again
    assert [one.directory for one in released.restore(pack, here)] == [run.directory]
    assert released.save_pack("figure-1", "quick", [run, second]).read_bytes() == whole
    run.open()
    run.restart_at(0)  # what is trained here is this machine's
    run.close()
    assert not run.released


def test_a_missing_file_of_a_run_is_named(tmp_path):
    run = record(tmp_path)
    with pytest.raises(UserError, match=r"curvature\.json is missing"):
        run.read("curvature.json")
    (run.directory / "curvature.json").write_text('{"trace": ')
    with pytest.raises(UserError, match=r"curvature\.json is damaged"):
        run.read("curvature.json")


@pytest.mark.parametrize(("name", "pack"), [("table-2", "language"), ("figure-1", "figure-1")])
def test_the_released_records_give_the_released_numbers(name, pack, tmp_path, monkeypatch):
    """Level 1 of a reviewer: no run directory anywhere, and the CSV to the last digit."""
    monkeypatch.chdir(tmp_path)
    frame, tolerance = check.load_released(load_spec(name, "quick"))
    plan = exhibits.ready(name)
    assert plan.source.name == f"results/runs/{pack}-quick.jsonl.gz"
    assert plan.source.path.stat().st_size < 200_000
    exhibit = exhibits.draw_plan(plan)
    assert as_written(exhibit.frame).equals(frame)
    assert check.compare(as_written(exhibit.frame), frame, tolerance) == []
    content = json.loads(exhibits.write(exhibit, tmp_path)[-1].read_text())
    assert all(len(run["hash"]) == 12 and len(run["code"]) == 64 and len(run["data"]["sha256"]) == 64 for run in content["runs"])
    with pytest.raises(UserError, match=f"functional-sam run {name}"):
        exhibits.fresh(name)


# ---------------------------------------------------------------------- check

RELEASED = pd.DataFrame(
    {"method": ["sam", "adamw"], "loss": [2.0, float("inf")], "n": [3, 3], "verdict": ["worse", None], "seconds": [1.0, 2.0]}
)
STATED = Tolerance(
    keys=["method"],
    bounds={"loss": Bound(absolute=0.1, relative=0.01)},
    exact=["n", "verdict"],
    ignored={"seconds": "a time"},
)


@pytest.mark.parametrize(
    ("row", "column", "value", "found"),
    [
        (0, "loss", 2.119, []),  # bound 0.1 + 0.01 * 2
        (0, "loss", 2.121, [("method sam", "loss")]),
        (0, "loss", float("nan"), [("method sam", "loss")]),
        (1, "loss", 1e9, [("method adamw", "loss")]),  # diverged then, not now
        (0, "n", 2, [("method sam", "n")]),
        (0, "verdict", "better", [("method sam", "verdict")]),
        (1, "verdict", "worse", [("method adamw", "verdict")]),
        (0, "seconds", 100.0, []),
        (0, "method", "asam", [("method sam", ""), ("method asam", "")]),
    ],
)
def test_cells_beyond_their_tolerance(row, column, value, found):
    fresh = RELEASED.copy()
    fresh.loc[row, column] = value
    assert [(one.row, one.column) for one in check.compare(fresh, RELEASED, STATED)] == found


def test_a_row_may_be_left_out_by_name():
    fresh = RELEASED.copy()
    fresh.loc[0, "loss"], fresh.loc[1, "n"] = 9.0, 4
    tolerance = dataclasses.replace(STATED, rows_ignored={"method sam": "luck"})
    assert [(one.row, one.column) for one in check.compare(fresh, RELEASED, tolerance)] == [("method adamw", "n")]
    assert check.compare(fresh.drop(index=0), RELEASED, tolerance)[0].fresh == "no such row"  # it must be there


def test_columns_that_came_or_went():
    assert [one.column for one in check.compare(RELEASED.drop(columns="n"), RELEASED, STATED)] == ["n"]
    assert [one.column for one in check.compare(RELEASED.assign(more=1), RELEASED, STATED)] == ["more"]


@pytest.mark.parametrize(
    ("tolerance", "words"),
    [
        (Tolerance(keys=["method"], exact=["n", "verdict"], ignored={"seconds": "a time"}), "columns without a tolerance: loss"),
        (Tolerance(keys=["method"], exact=["n", "verdict", "loss", "lost", "seconds"]), "not in table-1-quick.csv: lost"),
        (Tolerance(keys=["method"], exact=["n", "verdict", "loss", "n", "seconds"]), "stated twice: n"),
        (Tolerance(keys=["method"], exact=["n", "verdict", "*os*", "l*", "seconds"]), "stated twice: loss"),
        (Tolerance(keys=["method"], exact=["n", "verdict", "loss", "*x", "seconds"]), r"not in table-1-quick.csv: \*x"),
        (Tolerance(keys=["n"], exact=["method", "verdict", "loss", "seconds"]), "do not name each row"),
        (
            Tolerance(keys=["method"], exact=["n", "verdict", "loss", "seconds"], rows_ignored={"method gam": "x"}),
            "mean 'method sam'",
        ),
        (Tolerance(), "keys are missing"),
    ],
)
def test_a_tolerance_that_cannot_be(tmp_path, monkeypatch, tolerance, words):
    monkeypatch.setattr(check, "results_directory", lambda: tmp_path)
    spec = Spec("table-1", tolerance=tolerance)
    with pytest.raises(UserError, match="functional-sam release table-1"):
        check.load_released(spec)
    RELEASED.to_csv(tmp_path / "table-1-quick.csv", index=False)
    with pytest.raises(UserError, match=words):
        check.load_released(spec)


def test_a_pattern_stands_for_the_columns_not_named_in_full():
    stated = Tolerance(keys=["method"], bounds={"*s*": Bound(0.1)}, exact=["n", "ver*"], ignored={"seconds": "a time"})
    found = check.spelled_out(stated, list(RELEASED))
    assert found == dataclasses.replace(stated, bounds={"loss": Bound(0.1)}, exact=["n", "verdict"])

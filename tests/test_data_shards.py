"""C4 and ImageNet in the layout of the hub: exact, by many processes, and after a kill at any moment."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from functional_sam.cli import main
from functional_sam.config import compose
from functional_sam.data import c4, hub
from functional_sam.data.shards import Joined
from functional_sam.data.sources import read_sources
from functional_sam.data.tokenizer import BOS, EOS, Tokenizer
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE
from functional_sam.tasks import prepare, prepared_manifest

VOCAB, FILES = 600, 4


def write_c4(root, documents, split, files):
    """`documents` dealt to `files` gz files of JSON lines, as the hub has them."""
    (root / "en").mkdir(exist_ok=True)
    each = -(-len(documents) // files)
    for i in range(files):
        with gzip.open(root / "en" / f"c4-{split}.{i:05d}-of-{files:05d}.json.gz", "wt", encoding="utf-8") as file:
            for j, text in enumerate(documents[i * each : (i + 1) * each]):
                row = {"text": text, "timestamp": f"2019-04-{1 + j % 28:02d}T12:57:54Z", "url": f"https://example.org/{i}/{j}"}
                file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def texts():
    """Real prose: the first news articles and encyclopedia leads, with white space that has to be normalized."""
    documents = []
    for source in ("news", "encyclopedia"):
        some = read_sources([source])
        documents += [next(some).text.replace(" ", "  ", 1) + "\n\n" for _ in range(110)]
    return documents


@pytest.fixture(scope="module")
def source(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("c4")
    write_c4(root, texts[:-40], "train", FILES)
    write_c4(root, texts[-40:], "validation", 2)
    return root


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory, source):
    """The whole set by one process."""
    cache = tmp_path_factory.mktemp("one")
    return c4.prepare_c4(c4.C4(VOCAB, str(source)), cache, processes=1)


def files_of(data):
    """name -> bytes of everything prepared, the manifests too."""
    root = data.directory.parent
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock") and "first-2" not in path.parts
    }


def test_the_stream_is_the_files_in_order(one_pass, source):
    """Against gzip, json and the tokenizer alone."""
    tokenizer = Tokenizer(one_pass.directory / "tokenizer.model")
    expected = []
    for path in sorted(source.glob("en/c4-train.*")):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            text = "\n".join(" ".join(part.split()) for part in json.loads(line)["text"].splitlines() if part.strip())
            expected += [BOS, *tokenizer.encode(text), EOS]
    stream = one_pass._train[np.arange(len(one_pass._train))]
    assert stream.dtype == np.uint16
    assert stream.tolist() == expected
    assert one_pass.manifest["tokens"]["train"] == len(expected)
    assert one_pass.manifest["documents"]["train"] == 180


def test_held_out_documents_are_the_validation_file_in_halves(one_pass, source):
    with gzip.open(source / "en" / "c4-validation.00000-of-00002.json.gz", "rt", encoding="utf-8") as file:
        count = len(file.readlines())
    parts = {split: list(one_pass.eval_batches(split, 3, 10_000)) for split in ("validation", "test")}
    decoded = [
        one_pass.tokenizer.decode([t for t in row.tolist() if t > 2]) for part in parts.values() for x, _, _ in part for row in x
    ]
    assert len(set(decoded)) == count == sum(one_pass.manifest["documents"][split] for split in parts)
    assert min(one_pass.manifest["documents"][split] for split in parts) > 0
    covered = sum(int(num_bytes.sum()) for part in parts.values() for _, _, num_bytes in part)
    assert covered == one_pass.manifest["bytes"]["validation"] + one_pass.manifest["bytes"]["test"]


def test_many_processes_write_the_same_bytes(one_pass, source, tmp_path):
    seen, lines = [], []
    many = c4.prepare_c4(c4.C4(VOCAB, str(source)), tmp_path, lines.append, processes=2, watch=seen.append)
    assert files_of(many) == files_of(one_pass)
    assert many.sha256 == one_pass.sha256
    assert (seen[-1].whole, seen[-1].done) == (FILES, seen[-1].total)
    assert [status.done for status in seen] == sorted(status.done for status in seen)
    assert any("4 of 4 files" in line for line in lines)


def test_shards_are_shared_between_sets_of_files(one_pass, source):
    """Fewer files: the beginning of the same stream, and no shard is made again."""
    before = {path: path.stat().st_mtime_ns for path in one_pass.directory.parent.rglob("train.ids")}
    root = one_pass.directory.parents[1]
    two = c4.prepare_c4(c4.C4(VOCAB, str(source), files=2), root, processes=1)
    assert {path: path.stat().st_mtime_ns for path in one_pass.directory.parent.rglob("train.ids")} == before
    everything = np.arange(len(two._train))
    assert np.array_equal(two._train[everything], one_pass._train[everything])
    assert len(two._train) < len(one_pass._train)
    assert two.sha256 != one_pass.sha256


KILLED = """
import warnings
from pathlib import Path
from functional_sam.data import c4
if __name__ == "__main__":
    c4.ENCODE_AT_ONCE = 5

    wanted, watch = c4.C4({vocab}, {source!r}), lambda status: print(status.made, flush=True)
    c4.prepare_c4(wanted, Path({cache!r}), processes={processes}, watch=watch)
"""


def begin(source, cache, processes):
    code = KILLED.format(vocab=VOCAB, source=str(source), cache=str(cache), processes=processes)
    script = cache / "run.py"
    script.write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, start_new_session=True)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_and_go_on(one_pass, source, tmp_path, processes):
    """kill -9 after some reports, twice: what is whole stays, what is not is not taken for whole."""
    root = tmp_path / one_pass.directory.parent.name
    for lines in (1, 6) if processes == 1 else (6,):
        process = begin(source, tmp_path, processes)
        for _ in range(lines):
            assert process.stdout.readline(), "it ended before it could be killed"
        whole = {path: path.stat().st_mtime_ns for path in root.glob("c4-train*/train.ids")}
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (root / "all").exists()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and alive(process.pid):  # its workers notice and end
            time.sleep(0.1)
        assert not alive(process.pid)
        assert any(root.glob(".*.tmp"))
    again = c4.prepare_c4(c4.C4(VOCAB, str(source)), tmp_path, processes=1)
    assert files_of(again) == files_of(one_pass)  # and nothing half-written is left
    assert {path: path.stat().st_mtime_ns for path in whole} == whole


def alive(session):
    """Whether a process of that session is left."""
    done = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True)
    return any(not line.split()[1].startswith("Z") for line in done.stdout.splitlines())


def test_batches_are_arithmetic(one_pass):
    """Step s reads B * L tokens from offset s * B * L on, around the end; resuming needs the step alone."""
    length, batch = 32, 5
    windows = one_pass.train_windows(length)
    stream = one_pass._train[np.arange(windows * length)].astype(np.int64).reshape(windows, length)
    for step in (0, 1, windows // batch, 10_000_000_000):
        inputs, targets = one_pass.train_batch(step, batch, length, seed=0)
        expected = stream[(step * batch + np.arange(batch)) % windows]
        assert np.array_equal(inputs.numpy(), expected)
        assert torch.equal(targets[:, :-1], inputs[:, 1:])
        assert (targets[:, -1] == IGNORE).all()
    other, _ = one_pass.train_batch(0, batch, length, seed=1)
    assert not torch.equal(other, one_pass.train_batch(0, batch, length, seed=0)[0])
    few, _ = one_pass.train_batch(7, batch, length, seed=0, unique_tokens=64)
    assert {tuple(row) for row in few.tolist()} == {tuple(row) for row in stream[:2].tolist()}


def test_joined_arrays(tmp_path):
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 9, (n, 3), dtype=np.uint8) for n in (4, 0, 1, 5)]
    paths = [tmp_path / str(i) for i in range(4)]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part.tobytes())
    whole, joined = np.concatenate(parts), Joined(paths, np.uint8, (3,))
    assert len(joined) == 10
    chosen = generator.integers(0, 10, (6, 2))
    assert np.array_equal(joined[chosen], whole[chosen])


def small_run(source, cache, **data):
    return compose(
        "language",
        overrides=[
            "data.sources=[c4]",
            f"data.vocab={VOCAB}",
            f"runtime.data={source}",
            f"runtime.cache={cache}",
            "training.batch=4",
            *(f"data.{key}={value}" for key, value in data.items()),
        ],
    )


@pytest.mark.filterwarnings("ignore:the run reads")  # of a few files, which is the next test's subject
def test_the_task_trains_on_it(one_pass, source):
    """The language task unchanged; nothing is prepared again, and the source is needed no more."""
    config = small_run(source, one_pass.directory.parents[1])
    task = prepare(config)
    assert task.data.sha256 == one_pass.sha256 == prepared_manifest(config)["sha256"] == task.provenance["sha256"]
    ((inputs, _),) = task.batch(3)
    assert torch.equal(inputs, one_pass.train_batch(3, 4, 128, 0)[0])
    assert task.evaluate(task.model(), "test")["tokens"] > 0


def test_a_run_that_reads_the_files_twice_is_told(one_pass, source):
    """Silently, its data would repeat; where that is meant, data.unique_tokens says so."""
    cache, windows = one_pass.directory.parents[1], len(one_pass._train) // 128
    exact, longer = (small_run(source, cache) for _ in range(2))
    exact.training.steps, longer.training.steps = windows // 4, windows // 4 + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(exact)
        words = rf"reads {512 * longer.training.steps:,} tokens, .* holds {128 * windows:,}: it goes on"
        with pytest.raises(UserWarning, match=words):
            prepare(longer)
        longer.data.unique_tokens = 128 * windows
        prepare(longer)


def test_a_given_tokenizer(one_pass, source, tmp_path):
    model = one_pass.directory / "tokenizer.model"
    data = c4.prepare_c4(c4.C4(VOCAB, str(source), 1, str(model)), tmp_path, processes=1)
    assert (data.directory / "tokenizer.model").read_bytes() == model.read_bytes()
    assert np.array_equal(data._train[np.arange(len(data._train))], one_pass._train[np.arange(len(data._train))])
    with pytest.raises(UserError, match=f"{VOCAB} pieces.*data.vocab={VOCAB}"):
        c4.prepare_c4(c4.C4(700, str(source), 1, str(model)), tmp_path, processes=1)


def test_the_corpus_is_in_the_hash_and_where_it_lies_is_not():
    plain = ["data.sources=[c4]"]
    assert compose("language", overrides=[*plain, "runtime.data=/elsewhere"]).hash == compose("language", overrides=plain).hash
    for override in ("data.files=3", "data.hub=allenai/c4@v1"):
        assert compose("language", overrides=[*plain, override]).hash != compose("language", overrides=plain).hash


def test_refusals(source, tmp_path, monkeypatch):
    """Each names the value, the place and the way out."""

    def refused(match, location=source, **options):
        with pytest.raises(UserError, match=match):
            c4.prepare_c4(c4.C4(VOCAB, str(location), **options), tmp_path / "cache", processes=1)

    refused(r"data.files=9.*4 train files", files=9)
    refused("no train file.*hf download", location=tmp_path)
    refused("neither a directory nor a data set", location=tmp_path / "absent")
    refused("data.tokenizer=.*no such file", tokenizer=str(tmp_path / "absent"))
    (tmp_path / "text").write_text("no model")
    refused("not a SentencePiece model", tokenizer=str(tmp_path / "text"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("cannot be listed.*hf download allenai/c4", location="allenai/c4")
    with pytest.raises(UserError, match="c4 stands alone"):
        prepare(compose("language", overrides=["data.sources=[c4,news]"]))
    with pytest.raises(UserError, match=r"data.files.*\[c4\]"):
        prepare(compose("language", overrides=["data.files=3"]))


def test_missing_cut_and_changed_files(texts, tmp_path):
    """A gap in the numbers, a download that stopped half way, a file that changed after it was tokenized."""
    write_c4(tmp_path, texts[:60], "train", 3)
    write_c4(tmp_path, texts[60:80], "validation", 1)
    second = tmp_path / "en" / "c4-train.00001-of-00003.json.gz"
    content = second.read_bytes()
    second.unlink()
    wanted, cache = c4.C4(500, str(tmp_path)), tmp_path / "cache"
    with pytest.raises(UserError, match=r"train file 1 of 3 is not in .*data.files"):
        c4.prepare_c4(wanted, cache, processes=1)
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cannot read .*c4-train.00001-of-00003"):
        c4.prepare_c4(wanted, cache, processes=1)
    assert {path.name for path in wanted.directory(cache).parent.glob("c4*")} == {"c4-train.00000-of-00003"}
    second.write_bytes(content)
    data = c4.prepare_c4(wanted, cache, processes=1)
    shard = data.directory.parent / "c4-train.00001-of-00003" / "train.ids"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-2])
    with pytest.raises(UserError, match=r"damaged: train.ids has .* instead of"):
        c4.prepare_c4(wanted, cache)
    shard.write_bytes(kept)
    write_c4(tmp_path, texts[80:140], "train", 3)
    with pytest.raises(UserError, match="the one that was tokenized"):
        c4.prepare_c4(c4.C4(500, str(tmp_path), files=2), cache, processes=1)


def test_the_command(one_pass, source, tmp_path, capsys):
    arguments = [f"data.vocab={VOCAB}", "data.files=2", f"runtime.data={source}", f"runtime.cache={tmp_path}"]
    assert main(["data", "--task", "language-23.9M", "--processes", "1", *arguments]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 files" in out
    assert "tokens/s" in out
    config = small_run(source, tmp_path, files=2)
    assert prepared_manifest(config)["sha256"][:16] in out


def test_layout_on_the_hub(monkeypatch):
    """Names and sizes come from the hub's file system; a revision is passed on."""
    import huggingface_hub

    asked = []

    class FileSystem:
        def glob(self, pattern, detail):
            asked.append(pattern)
            name = pattern.replace("*.json.gz", "c4-train.0000{}-of-00002.json.gz")
            return {name.format(i): {"size": 5 + i} for i in (1, 0)}

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    files = hub.layout("allenai/c4@v1", "en", "train", ".json.gz")
    assert asked == ["datasets/allenai/c4@v1/en/*.json.gz"]
    assert [(file.url, file.size) for file in files] == [
        (f"hf://datasets/allenai/c4@v1/en/c4-train.0000{i}-of-00002.json.gz", 5 + i) for i in (0, 1)
    ]

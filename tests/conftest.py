"""Shared by all tests: one thread, and the small models and batches that most of them use."""

import gc
import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from processes import PRELOAD

torch.set_num_threads(1)  # for tiny operations a second one gains nothing, and where the cores are busy it costs tenfold

LONGEST = ["test_slurm", "test_sharpness_distributed", "test_distributed_training", "test_cli", "test_faults"]
LONGEST += ["test_integrations_transformers", "test_sharpness_memory", "test_training", "test_packaging", "test_planning"]
LONGEST += ["test_released", "test_exhibits_curvature", "test_exhibits", "test_study_exhibits", "test_vision", "test_data_shards"]
LONGEST += ["test_figure_9", "test_text_to_text", "test_study", "test_integrations_trainer_loss", "test_finetune_exhibits"]
LONGEST += ["test_sharpness_state", "test_integrations_lightning", "test_integrations_accelerate"]


class TinyModel(torch.nn.Module):
    """A two-layer net with an embedding, LayerNorm and a tied head: every kind of parameter, 300 numbers, no readout."""

    def __init__(self, vocab: int = 11, width: int = 6, dropout: float = 0.0):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, width)
        self.up = torch.nn.Linear(width, 2 * width)
        self.down = torch.nn.Linear(2 * width, width, bias=False)
        self.norm = torch.nn.LayerNorm(width)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.down(self.dropout(torch.nn.functional.gelu(self.up(x))))
        return self.norm(x) @ self.embedding.weight.T


class TinyReadout(TinyModel):
    """The same with the readout protocol."""

    has_readout = True

    def forward(self, tokens, readout=None):
        x = self.embedding(tokens)
        x = x + self.down(self.dropout(torch.nn.functional.gelu(self.up(x))))
        h = self.norm(x)
        return h @ self.embedding.weight.T if readout is None else readout(h, self.embedding.weight)


def make_model(kind=TinyModel, seed: int = 0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return kind(**options).to(dtype)


def make_batch(rows: int = 4, length: int = 5, vocab: int = 11, seed: int = 1, ignored: int = 0):
    """Random tokens and targets; the first `ignored` targets of each row are -100."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(vocab, (rows, length), generator=generator)
    targets = torch.randint(vocab, (rows, length), generator=generator)
    targets[:, :ignored] = -100
    return inputs, targets


def parts_of(batch, cuts):
    """The batch cut into micro-batches before the rows `cuts`."""
    inputs, targets = batch
    return [(inputs[a:b], targets[a:b]) for a, b in zip([0, *cuts], [*cuts, len(inputs)], strict=True)]


def run(sharpness, optimizer, steps, cuts=()):
    """Train for some steps, each of 6 rows cut before `cuts`."""
    for step in range(steps):
        optimizer.zero_grad()
        sharpness.backward(parts_of(make_batch(6, seed=step), list(cuts)))
        optimizer.step()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adamw(model, lr=1e-2, **options):
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1, **options)


def warmed_up(model, steps: int = 3):
    """An AdamW with a few steps behind it, so that its moments exist."""
    optimizer = adamw(model)
    for step in range(steps):
        inputs, targets = make_batch(seed=100 + step)
        torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a run may have set another number


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Prepared data: the checkout's own where it is there, otherwise made once for the session (by whichever worker is first)."""
    there = Path(__file__).resolve().parents[1] / ".cache"
    if there.is_dir():
        return there
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"


@pytest.fixture(scope="session")
def server():
    """The server of processes.py, started before anything else starts one; all processes have its environment."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # where it finds preloaded.py
        forkserver.ensure_running()


def pytest_collection_modifyitems(config, items):
    """Several workers (pytest -n): the files that take longest first, so that none of them is left for the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_configure():
    """No garbage is collected while all is imported, for there is none."""
    gc.disable()


def pytest_collection_finish():
    """From here on it is, but never looked for in what is imported: a million objects, again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A directory in which runs/, paper/ and results/ are made; the configs are the checkout's."""
    monkeypatch.setattr("functional_sam.exhibits.output.paper_directory", lambda: tmp_path / "paper")
    for place in ("records.released", "exhibits.check"):
        monkeypatch.setattr(f"functional_sam.{place}.results_directory", lambda: tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path

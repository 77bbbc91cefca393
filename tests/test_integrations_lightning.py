"""Lightning's automatic optimization: the loop of SharpnessAware written by hand, and without a radius the stock loop."""

import copy
import os
import pickle

import lightning
import pytest
import torch
from processes import gloo
from test_sharpness_oracle import close, theta_of
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from functional_sam import SharpnessAware, UserError
from functional_sam.integrations.lightning import SharpnessAwareModule

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Stock(lightning.LightningModule):
    """Dropout, BatchNorm, a schedule by step."""

    def __init__(self, dropout=0.3):
        super().__init__()
        torch.manual_seed(0)
        layers = [torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 3)]
        self.net, self.losses = torch.nn.Sequential(*layers), []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]


class Ours(SharpnessAwareModule, Stock):
    def __init__(self, dropout=0.3, **options):
        super().__init__(dropout)
        self.sharpness_options = options

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if "train_loss" in self.trainer.callback_metrics:
            self.losses.append(float(self.trainer.callback_metrics["train_loss"]))


def data(rank=0, world=1):
    """Seven batches an epoch, the last of one row; of two ranks the rows of each."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(25, 5, generator=generator), torch.randint(3, (25,), generator=generator)
    x, y = (x[:24], y[:24]) if world > 1 else (x, y)
    return DataLoader(TensorDataset(x[rank::world], y[rank::world]), batch_size=4 // world, drop_last=world == 1)


def fitted(model, loader=None, resume=None, **options):
    given = {"max_epochs": 2, "gradient_clip_val": 0.5, "enable_checkpointing": False, **QUIET, **options}
    trainer = lightning.Trainer(**given)
    torch.manual_seed(7)
    trainer.fit(model, loader or data(), ckpt_path=resume)
    return model, trainer


def by_hand(accumulation, epochs=2, dropout=0.3, **options):
    model = Stock(dropout).train()
    ([optimizer], [schedule]) = model.configure_optimizers()
    sharpness, loader, losses = SharpnessAware(model, optimizer, **options), data(), []
    torch.manual_seed(7)
    for _ in range(epochs):
        batches = list(loader)
        for i in range(0, len(batches), accumulation):
            losses.append(float(sharpness.backward(batches[i : i + accumulation])))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule["scheduler"].step()
            optimizer.zero_grad()
    return model, losses


METHODS = [
    {"method": "functional-sam", "rho": 0.3},
    {"method": "precond-sam", "rho": 0.3},
    {"method": "looksam", "rho": 0.3, "every": 2},
    {"method": "tram", "rho": 30.0},
    {"method": "wsam", "rho": 0.3},
]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("words", METHODS, ids=lambda words: words["method"])
def test_it_is_the_loop_by_hand(words, accumulation):
    """Six batches an epoch: the second step of four has two. Weights, statistics and the loss that is logged."""
    model, _ = fitted(Ours(**words), accumulate_grad_batches=accumulation)
    expected, losses = by_hand(accumulation, **words)
    close(theta_of(model), theta_of(expected), 1e-6)
    close(dict(model.named_buffers()), dict(expected.named_buffers()), 1e-6)
    assert list(dict.fromkeys(model.losses)) == pytest.approx(losses, rel=1e-5)
    plain, _ = by_hand(accumulation, method="plain")
    with pytest.raises(AssertionError):  # a radius makes a difference
        close(theta_of(model), theta_of(plain), 1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("words", [{"method": "plain"}, {"method": "functional-sam", "rho": 0.0}])
def test_without_a_radius_it_is_the_stock_loop(words, accumulation):
    stock, _ = fitted(Stock(), accumulate_grad_batches=accumulation)
    ours, _ = fitted(Ours(**words), accumulate_grad_batches=accumulation)
    close(theta_of(ours), theta_of(stock), 1e-6)
    close(dict(ours.named_buffers()), dict(stock.named_buffers()), 0)


@pytest.mark.parametrize("words", [METHODS[2], METHODS[3], METHODS[0]], ids=lambda words: words["method"])
def test_resume(words, tmp_path):
    """Stopped between two epochs of three steps: bit for bit; without what looksam and tram carry not."""
    options = {"accumulate_grad_batches": 2, "max_epochs": 1}
    whole, _ = fitted(Ours(0.0, **words), **{**options, "max_epochs": 2})
    _, trainer = fitted(Ours(0.0, **words), **options)
    trainer.save_checkpoint(tmp_path / "with.ckpt")
    resumed, trainer = fitted(Ours(0.0, **words), resume=tmp_path / "with.ckpt", **{**options, "max_epochs": 2})
    close(theta_of(resumed), theta_of(whole), 0)
    assert (resumed.sharpness.steps, trainer.global_step) == (6, 6)
    content = torch.load(tmp_path / "with.ckpt", weights_only=True)
    del content["sharpness"]
    torch.save(content, tmp_path / "without.ckpt")
    other, _ = fitted(Ours(0.0, **words), resume=tmp_path / "without.ckpt", **{**options, "max_epochs": 2})
    same = all(torch.equal(a, b) for a, b in zip(other.parameters(), whole.parameters(), strict=True))
    assert same == (words["method"] == "functional-sam")


def test_a_second_fit_starts_anew():
    model, _ = fitted(Ours(method="sam", rho=0.1), max_epochs=1)
    first = model.sharpness
    fitted(model, max_epochs=1)
    assert model.sharpness is not first
    assert model.sharpness.steps == 6


def test_bf16_runs_forward_in_autocast():
    """Near the float32 weights and not equal to them; the parameters stay float32."""
    results = [theta_of(fitted(Ours(0.0, method="sam", rho=0.1), precision=p, max_epochs=1)[0]) for p in ("32-true", "bf16-mixed")]
    assert all(value.dtype == torch.float32 for value in results[1].values())
    close(*results, 0.2)
    with pytest.raises(AssertionError):
        close(*results, 1e-5)


class Counted(torch.nn.Module):
    """Cross-entropy as a sum, with a buffer that moves at each call; `dtypes` are those of its sums."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.dtypes = set()

    def forward(self, logits, targets):
        total = F.cross_entropy(logits, targets, reduction="sum")
        self.calls += 1
        self.dtypes.add(total.dtype)
        return total, len(targets)


@pytest.mark.parametrize("of", [lambda loss: loss, lambda loss: loss.forward, lambda loss: lambda *given: loss(*given)])
def test_a_loss_of_ones_own_is_in_autocast_as_in_a_training_step(of):
    """Of bf16 logits torch computes it in float32 there, outside in bf16: module, method and function alike."""
    stock, _ = fitted(Stock(0.0), precision="bf16-mixed", max_epochs=1)
    loss = Counted()
    ours, _ = fitted(Ours(0.0, method="functional-sam", rho=0.0, loss_fn=of(loss)), precision="bf16-mixed", max_epochs=1)
    assert loss.dtypes == {torch.float32}
    close(theta_of(ours), theta_of(stock), 1e-6)
    if of(loss) in (loss, loss.forward):
        assert loss.calls == 6  # once a step, in whatever number of passes


def two_processes(rank):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    options = {"method": "functional-sam", "rho": 0.3}
    model = Ours(0.0, **options)
    model.net[1] = torch.nn.LayerNorm(8)  # of the rows of each process BatchNorm has its own statistics
    words = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "accumulate_grad_batches": 2}
    fitted(model, data(rank, 2), **words)
    alone = Stock(0.0)
    alone.net[1] = torch.nn.LayerNorm(8)
    ([optimizer], [schedule]) = alone.configure_optimizers()
    sharpness = SharpnessAware(alone, optimizer, **options)
    for _ in range(2):
        batches = list(data())
        for i in range(0, 6, 2):
            sharpness.backward(batches[i : i + 2])
            torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
            optimizer.step()
            schedule["scheduler"].step()
    close(theta_of(model), theta_of(alone), 1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(server):
    gloo(2, two_processes)


def test_micro_batches_of_a_fit_that_was_stopped_go_into_no_other():
    """Stopped after the second of three: what waits is dropped, as the stock loop zeroes what it has accumulated."""

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 1

    words = {"method": "sam", "rho": 0.3}
    model, _ = fitted(Ours(0.0, **words), max_epochs=1, min_epochs=0, accumulate_grad_batches=3, callbacks=[Stop()])
    assert len(model.waiting) == 2
    fitted(model, accumulate_grad_batches=3)
    expected, losses = by_hand(3, dropout=0.0, **words)
    assert list(dict.fromkeys(model.losses)) == pytest.approx(losses, rel=1e-5)
    close(theta_of(model), theta_of(expected), 1e-6)


def test_a_module_that_was_fitted_is_copied_and_pickled():
    model, _ = fitted(Ours(method="looksam", rho=0.3), max_epochs=1)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(theta_of(made), theta_of(model), 0)
        assert made.sharpness is None
        fitted(made, max_epochs=1)
    assert model.sharpness is not None


def test_manual_optimization_is_refused():
    """Nothing would call backward, and nothing be trained."""
    model = Ours(method="sam", rho=0.3)
    model.automatic_optimization = False
    with pytest.raises(UserError, match="automatic_optimization=False: nothing would call backward"):
        fitted(model, max_epochs=1, gradient_clip_val=None)


@pytest.mark.parametrize("words", [{"lr": 0.5, "max_iter": 4}, {"line_search_fn": "strong_wolfe"}])
def test_lbfgs_is_refused(words):
    """It would compare losses that are not known while it asks, and take the micro-batches of a step several times."""

    class Quasi(Ours):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), **words)

    with pytest.raises(UserError, match="LBFGS asks for several gradients a step: SharpnessAware gives one"):
        fitted(Quasi(method="sam", rho=0.0), max_epochs=1, gradient_clip_val=None)


def test_the_closure_returns_the_loss_of_the_step():
    """To an optimizer that reads it, and to callbacks; by an optimizer_step of the module's own too."""
    read, outputs = [], []

    class Reading(torch.optim.SGD):
        def step(self, closure=None):
            read.append(float(super().step(closure)))

    class Net(Ours):
        def configure_optimizers(self):
            return Reading(self.parameters(), lr=0.1)

        def on_train_batch_end(self, found, batch, batch_idx):
            super().on_train_batch_end(found, batch, batch_idx)
            outputs.append(float(found["loss"]))

    model, _ = fitted(Net(0.0, method="sam", rho=0.1), max_epochs=1, accumulate_grad_batches=2)
    assert read == list(dict.fromkeys(model.losses))
    assert outputs == [value for loss in read for value in (0.0, loss)]


def test_a_learning_rate_is_found_as_in_the_stock_loop(tmp_path):
    """Losses and suggestion of lr_find, whose steps are none of the fit that follows."""
    found = []
    for model in (Stock(0.0), Ours(0.0, method="functional-sam", rho=0.0)):
        model.lr = 1e-3
        model.configure_optimizers = lambda model=model: torch.optim.SGD(model.parameters(), lr=model.lr)
        trainer = lightning.Trainer(max_epochs=9, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET)
        torch.manual_seed(7)
        result = lightning.pytorch.tuner.Tuner(trainer).lr_find(model, data(), num_training=30, attr_name="lr")
        found.append((result.results["loss"], result.suggestion()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == found[0][1]
    assert max(found[1][0]) > 0
    fitted(model, max_epochs=1)
    assert model.sharpness.steps == 6


class Net(Ours):
    """As load_from_checkpoint makes it: without arguments."""

    def __init__(self):
        super().__init__(0.0, method="functional-sam", rho=0.3, rho_schedule="warmup", warmup_steps=50)


class Other(Ours):
    def __init__(self):
        super().__init__(0.0, method="looksam", rho=0.3)


def test_a_state_is_carried_with_the_optimizers_alone(tmp_path):
    """Weights that were loaded, or tested, begin a fit of their own: as of a module that was given them."""
    path = tmp_path / "first.ckpt"
    first, trainer = fitted(Net(), max_epochs=1)
    trainer.save_checkpoint(path)
    expected = Net()
    expected.load_state_dict(first.state_dict())
    fitted(expected, max_epochs=1)
    assert expected.sharpness.steps == 6
    loaded = Net.load_from_checkpoint(path)
    fitted(loaded, max_epochs=1)

    class Tested(Net):
        def test_step(self, batch, batch_idx):
            return None

    tested = Tested()
    lightning.Trainer(**QUIET).test(tested, data(), ckpt_path=path, verbose=False)
    fitted(tested, max_epochs=1)
    for model in (loaded, tested):
        assert model.sharpness.steps == 6
        close(theta_of(model), theta_of(expected), 0)
    other = Other.load_from_checkpoint(path)  # another method
    fitted(other, max_epochs=1)
    assert other.sharpness.steps == 6
    with pytest.raises(UserError, match="load it into the method that saved it"):
        fitted(Other(), resume=path)


def test_a_fit_that_ended_before_its_first_step_leaves_no_state(tmp_path):
    path = tmp_path / "first.ckpt"
    _, trainer = fitted(Net(), max_epochs=1)
    trainer.save_checkpoint(path)
    model, _ = fitted(Net(), resume=path, max_epochs=1)
    assert model.loaded["steps"] == 6
    fitted(model, max_epochs=1)
    assert model.sharpness.steps == 6


def test_a_forward_of_ones_own_runs_in_autocast():
    """The same weights as without it, bit for bit."""
    results, options = [], {"method": "sam", "rho": 0.1}
    for words in (options, {**options, "forward": lambda model, inputs: model(inputs)}):
        results.append(theta_of(fitted(Ours(0.0, **words), precision="bf16-mixed", max_epochs=1)[0]))
    close(*results, 0)


def test_a_batch_that_changes_while_it_waits_is_refused():
    class Writing(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            batch[0].zero_()

    fitted(Ours(method="sam", rho=0.1), max_epochs=1, callbacks=[Writing()])  # none waits
    with pytest.raises(UserError, match="inputs of micro-batch 1 of 2 was changed while it waited"):
        fitted(Ours(method="sam", rho=0.1), max_epochs=1, callbacks=[Writing()], accumulate_grad_batches=2)

"""The Trainer of transformers: with rho = 0 it is the stock one bit for bit, else a loop of SharpnessAware written by hand."""

import copy
import os
import sys
import tempfile

import pytest
import torch
import torch.distributed as dist
import transformers
from processes import gloo
from test_sharpness_oracle import close, theta_of
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from functional_sam import SharpnessAware, UserError
from functional_sam.integrations.transformers import STATE, SharpnessAwareMixin, SharpnessAwareTrainer

VOCAB, LENGTH = 29, 7
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}


def llama(dropout=0.3):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, attention_dropout=dropout, max_position_embeddings=16, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3, max_position_embeddings=16))


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, vocab_size=VOCAB, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def rows(number=14, kind="tokens"):
    """Rows with uneven numbers of valid labels."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (number, LENGTH), generator=generator)
    labels = tokens.clone()
    for i in range(number):
        labels[i, : i % 5] = -100
    if kind == "classes":
        labels = torch.randint(3, (number,), generator=generator)
    return [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]


def arguments(path, **options):
    """7 micro-batches an epoch."""
    given = {"max_steps": 5, "learning_rate": 1e-2, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    given |= {"per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    return TrainingArguments(str(path), **{**given, "disable_tqdm": True, "seed": 3, **options})


def trained(kind, model, path, data=None, sharpness=None, resume=None, func=None, **options):
    words = {} if sharpness is None else {"sharpness": sharpness}
    trainer = kind(model, arguments(path, **options), train_dataset=data or rows(), compute_loss_func=func, **words)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def smoothed(outputs, labels, num_items_in_batch):
    z, y = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(z, y, label_smoothing=0.2, reduction="sum") / num_items_in_batch


CASES = {
    "llama": (llama, {}),
    "llama-3": (llama, {"gradient_accumulation_steps": 3}),
    "llama-smoothing": (llama, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}),
    "llama-func": (llama, {"func": smoothed, "gradient_accumulation_steps": 2}),
    "llama-bf16": (llama, {"bf16": True, "gradient_accumulation_steps": 2}),
    "bert": (bert, {"data": rows(kind="classes"), "gradient_accumulation_steps": 2}),
    "t5": (t5, {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("words", [{"method": "plain"}, {"method": "functional-sam", "rho": 0.0}])
@pytest.mark.parametrize("case", CASES)
def test_without_a_radius_it_is_the_stock_trainer(case, words, tmp_path):
    """Bit for bit: the last step of an epoch with fewer micro-batches, dropout, clipping, schedule; and what is logged."""
    build, options = CASES[case]
    stock = trained(Trainer, build(), tmp_path, **options)
    ours = trained(SharpnessAwareTrainer, build(), tmp_path, sharpness=words, **options)
    close(theta_of(ours.model), theta_of(stock.model), 0)
    assert len(stock.state.log_history) == 6
    for a, b in zip(ours.state.log_history[:-1], stock.state.log_history[:-1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert (a["learning_rate"], a["grad_norm"], a["epoch"]) == (b["learning_rate"], b["grad_norm"], b["epoch"])


class Recording(SharpnessAwareTrainer):
    """Keeps the batches of every step, and the random state before the first."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not hasattr(self, "seen"):
            self.seen, self.rng = [[]], torch.get_rng_state()
        self.seen[-1].append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.seen.append([])
        return loss


def by_hand(model, trainer, words):
    """The loop that a reader would write: labels shifted here, the default loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, trainer.args.max_steps)
    sharpness = SharpnessAware(model.train(), optimizer, forward=lambda m, x: m(input_ids=x).logits, **words)
    torch.set_rng_state(trainer.rng)
    losses = []
    for step in trainer.seen[:-1]:
        shifted = [(b["input_ids"], F.pad(b["labels"][:, 1:], (0, 1), value=-100)) for b in step]
        losses.append(float(sharpness.backward(shifted)))
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


METHODS = [
    {"method": "functional-sam", "rho": 0.2},
    {"method": "precond-sam", "rho": 0.2},
    {"method": "looksam", "rho": 0.2, "every": 2},
    {"method": "tram", "rho": 30.0},
    {"method": "wsam", "rho": 0.2},
]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("words", METHODS, ids=lambda words: words["method"])
def test_it_is_the_loop_by_hand(words, accumulation, tmp_path):
    """Ten micro-batches, one epoch: the last step of three has one."""
    model, options = llama(), {"gradient_accumulation_steps": accumulation, "max_steps": 4, "data": rows(20)}
    ours = trained(Recording, copy.deepcopy(model), tmp_path, sharpness=words, **options)
    losses = by_hand(model, ours, words)
    assert [len(step) for step in ours.seen[:-1]] == ([1] * 4 if accumulation == 1 else [3, 3, 3, 1])
    close(theta_of(ours.model), theta_of(model), 1e-5)
    assert [entry["loss"] for entry in ours.state.log_history[:-1]] == pytest.approx(losses, rel=1e-4)
    plain = llama()
    by_hand(plain, ours, {"method": "plain"})
    with pytest.raises(AssertionError):  # a radius makes a difference
        close(theta_of(plain), theta_of(model), 1e-4)


@pytest.mark.parametrize("words", [METHODS[2], METHODS[3], METHODS[0]], ids=lambda words: words["method"])
def test_resume(words, tmp_path):
    """Stopped after three of six steps: the same weights, bit for bit; without what looksam and tram carry others."""
    options = {"sharpness": words, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = trained(SharpnessAwareTrainer, llama(), tmp_path, **options)
    checkpoint = tmp_path / "checkpoint-3"
    resumed = trained(SharpnessAwareTrainer, llama(), tmp_path / "b", resume=str(checkpoint), **options)
    close(theta_of(resumed.model), theta_of(whole.model), 0)
    assert resumed.sharpness.steps == 6
    (checkpoint / STATE).unlink()
    other = trained(SharpnessAwareTrainer, llama(), tmp_path / "c", resume=str(checkpoint), **options)
    same = all(torch.equal(a, b) for a, b in zip(other.model.parameters(), whole.model.parameters(), strict=True))
    assert same == (words["method"] == "functional-sam")


def test_adapters_of_peft(tmp_path):
    """LoRA: the adapters as in the loop by hand, and nothing else moves."""
    import peft

    torch.manual_seed(2)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    start = theta_of(model)
    words = {"method": "functional-sam", "rho": 0.2}
    ours = trained(Recording, copy.deepcopy(model), tmp_path, sharpness=words, gradient_accumulation_steps=3, max_steps=2)
    by_hand(model, ours, words)
    found = theta_of(ours.model)
    close(found, theta_of(model), 1e-5)
    moved = {name for name in start if not torch.equal(start[name], found[name])}
    assert moved == {name for name in start if "lora_" in name}


def two_processes(rank):
    """Micro-batches of one row on two processes: the steps of the loop by hand over the rows of both.

    In float64 throughout: P amplifies the rounding of elements whose gradient is nothing else (1e-5 of the weights in float32).
    """
    torch.Tensor.float = lambda self: self  # in this process alone: the loss of a model casts its logits to float32
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 4, "data": rows(20)}
    for words in METHODS[:4]:
        with tempfile.TemporaryDirectory() as directory:
            ours = trained(Recording, llama(0.0).double(), directory, sharpness=words, **options)
        assert ours.args.world_size == 2
        everyone = [None, None]
        dist.all_gather_object(everyone, ours.seen)
        ours.seen = [a + b for a, b in zip(*everyone, strict=True)]
        assert [len(step) for step in ours.seen] == [4, 4, 4, 4, 0]
        model = llama(0.0).double()
        losses = by_hand(model, ours, words)
        close(theta_of(ours.model), theta_of(model), 1e-11)
        assert [entry["loss"] for entry in ours.state.log_history[:-1]] == pytest.approx(
            losses, rel=1e-4
        )  # logged with four digits


@pytest.mark.slow
def test_two_processes(server):
    gloo(2, two_processes)


def test_the_other_way_to_a_class(tmp_path):
    class Mine(SharpnessAwareMixin, transformers.Seq2SeqTrainer):
        pass

    arguments_ = transformers.Seq2SeqTrainingArguments(**{**arguments(tmp_path).to_dict(), "max_steps": 1})
    trainer = Mine(t5(), arguments_, train_dataset=rows(), sharpness={"method": "sam"})
    trainer.train()
    assert trainer.sharpness.steps == 1


def test_a_loss_beside_the_logits_is_refused(tmp_path):
    class Penalized(transformers.LlamaForCausalLM):
        def forward(self, labels=None, **inputs):
            outputs = super().forward(labels=labels, **inputs)
            if labels is not None:
                outputs.loss = outputs.loss + 0.1 * self.lm_head.weight.square().sum()
            return outputs

    model = Penalized(llama().config)
    with pytest.raises(UserError, match=r"the loss of the model is .* compute_loss_func="):
        trained(SharpnessAwareTrainer, model, tmp_path, sharpness={"method": "sam"}, remove_unused_columns=False)


def test_a_router_at_its_published_coefficient_is_refused(tmp_path):
    """Its term is a thousandth of the loss, and all of the gate's gradient but for a trifle; without it the model is trained."""
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 4}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    for words in ({"output_router_logits": True}, {"output_router_logits": True, "router_aux_loss_coef": 0.0}, {}):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, **words))
        if words == {"output_router_logits": True}:
            with pytest.raises(UserError, match=r"a part of it does not come from the logits \(a router\)"):
                trained(SharpnessAwareTrainer, model, tmp_path, sharpness={"method": "sam"})
        else:
            trained(SharpnessAwareTrainer, model, tmp_path, sharpness={"method": "sam"}, max_steps=1)


def test_what_is_wrong_is_said_before_training(tmp_path):
    with pytest.raises(UserError, match="did you mean 'rho_schedule'"):
        SharpnessAwareTrainer(llama(), arguments(tmp_path), sharpness={"method": "sam", "rho_schedul": "lr"})
    with pytest.raises(UserError, match="a batch without labels"):
        trained(SharpnessAwareTrainer, llama(), tmp_path, data=[{"input_ids": r["input_ids"]} for r in rows()], sharpness={})


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "functional_sam.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install '\.\[transformers\]'"):
        import functional_sam.integrations.transformers  # noqa: F401

"""What a compute_loss of one's own may do with the model it is given: as in the stock Trainer, or refused, in any step."""

import pytest
import torch
import transformers
from test_integrations_transformers import VOCAB, arguments, bert, llama, rows, trained
from test_sharpness_oracle import close, theta_of
from torch.nn import functional as F
from transformers import Trainer

from functional_sam import UserError
from functional_sam.integrations.transformers import SharpnessAwareMixin, SharpnessAwareTrainer

ZERO = {"method": "functional-sam", "rho": 0.0}


def of_batch(trainer, model, inputs):
    """(loss, inputs without labels, labels) of one forward."""
    given = {key: value for key, value in inputs.items() if key != "labels"}
    return F.cross_entropy(model(**given).logits, inputs["labels"]), given, inputs["labels"]


def decayed(trainer, model, inputs):
    loss, _, _ = of_batch(trainer, model, inputs)
    return loss + 0.05 * sum(p.square().sum() for p in model.parameters())


def two_forwards(trainer, model, inputs):
    loss, given, labels = of_batch(trainer, model, inputs)
    return loss + F.cross_entropy(model(**given).logits, labels)


def augmented(trainer, model, inputs):
    return of_batch(trainer, model, {**inputs, "input_ids": (inputs["input_ids"] + 1) % 29})[0]


def left_out(trainer, model, inputs):
    return of_batch(trainer, model, {key: value for key, value in inputs.items() if key != "token_type_ids"})[0]


def written_to(trainer, model, inputs):
    inputs["input_ids"].add_(1).remainder_(29)
    return of_batch(trainer, model, inputs)[0]


def by_position(trainer, model, inputs):
    return F.cross_entropy(model(inputs["input_ids"], token_type_ids=inputs["token_type_ids"]).logits, inputs["labels"])


def past_the_model(trainer, model, inputs):
    return of_batch(trainer, trainer.model, inputs)[0]


LATE = {
    decayed: "has a term that depends on the model's .* other than by its logits",
    two_forwards: "compute_loss calls the model twice",
    augmented: "compute_loss gives the model another 'input_ids'",
    left_out: "compute_loss gives the model another 'token_type_ids'",
    written_to: r"compute_loss writes to inputs\['input_ids'\]",
    by_position: r"by position \(1\)",
    past_the_model: "has a term that depends on the model's .* other than by its logits",
}


def marked():
    """Rows of texts, the second half of each another segment."""
    return [{**row, "token_type_ids": (torch.arange(7) > 3).long()} for row in rows(kind="classes")]


def trainers(loss):
    """The stock Trainer with compute_loss(trainer, model, inputs), and ours."""

    class Stock(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return loss(self, model, inputs)

    class Ours(SharpnessAwareMixin, Stock):
        pass

    return Stock, Ours


@pytest.mark.parametrize("loss", LATE, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("start", [0, 2])
def test_what_has_no_gradient_is_refused_when_it_begins(loss, start, tmp_path):
    """Until then the weights are the stock Trainer's."""

    def late(trainer, model, inputs):
        return (loss if trainer.state.global_step >= start else lambda *given: of_batch(*given)[0])(trainer, model, inputs)

    stock, ours = trainers(late)
    model, options = bert(), {"data": marked(), "lr_scheduler_type": "constant_with_warmup"}
    with pytest.raises(UserError, match=LATE[loss] if start else "compute_loss|the loss of the model|other than by its logits"):
        trained(ours, model, tmp_path, sharpness=ZERO, max_steps=4, **options)
    if start:
        expected = trained(stock, bert(), tmp_path, max_steps=2, **options)
        close(theta_of(model), theta_of(expected.model), 0)


def of_the_config(trainer, model, inputs):
    """Weights of classes as the documentation of transformers has them, a scale of the model's weights, its mode."""
    assert isinstance(model, type(trainer.model))
    assert (model.training, model.device, model.config.num_labels) == (True, torch.device("cpu"), 3)
    labels, _ = inputs.pop("labels"), inputs.pop("row")  # which the model has no name for
    z = model(**inputs, return_dict=True).get("logits")
    weight = torch.arange(1.0, 1 + model.config.num_labels)
    return F.cross_entropy(z, labels, weight=weight) * model.classifier.weight.detach().norm()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_known_of_the_model_is_the_models(accumulation, tmp_path):
    stock, ours = trainers(of_the_config)
    options = {"data": [{**row, "row": i} for i, row in enumerate(marked())], "remove_unused_columns": False}
    options["gradient_accumulation_steps"] = accumulation
    found = trained(ours, bert(), tmp_path, sharpness=ZERO, **options)
    close(theta_of(found.model), theta_of(trained(stock, bert(), tmp_path, **options).model), 0)


def test_one_batch_twice_in_a_step(tmp_path):
    """The same object: the gradient is not halved."""
    rows_ = rows(2, kind="classes")
    batch = {key: torch.stack([row[key] for row in rows_]) for key in rows_[0]}

    class Same(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from [batch] * 4

    class Stock(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(Same(), batch_size=None, collate_fn=lambda given: given)

    class Ours(SharpnessAwareMixin, Stock):
        pass

    options = {"gradient_accumulation_steps": 2, "max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0}
    found = trained(Ours, bert(), tmp_path, sharpness=ZERO, **options)
    close(theta_of(found.model), theta_of(trained(Stock, bert(), tmp_path, **options).model), 0)


def test_a_batch_that_changes_while_it_waits_is_refused(tmp_path):
    class Writing(trainers(decayed)[1]):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            inputs["input_ids"].zero_()
            return loss

    with pytest.raises(UserError, match=r"inputs\['input_ids'\] of micro-batch 1 of 2 was changed while it waited"):
        trained(Writing, bert(), tmp_path, data=marked(), sharpness=ZERO, gradient_accumulation_steps=2)


def bart():
    torch.manual_seed(0)
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    small |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.BartConfig(d_model=16, vocab_size=VOCAB, max_position_embeddings=32, pad_token_id=0, **small)
    return transformers.BartForConditionalGeneration(config)


def test_a_decoder_whose_inputs_are_not_made_of_labels(tmp_path):
    """Label smoothing takes the labels away, and BART shifts its inputs; a compute_loss that does so is named."""
    options = {"label_smoothing_factor": 0.1, "max_steps": 2}
    found = trained(SharpnessAwareTrainer, bart(), tmp_path, sharpness=ZERO, **options)
    close(theta_of(found.model), theta_of(trained(Trainer, bart(), tmp_path, **options).model), 0)

    def without_labels(trainer, model, inputs):
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())

    with pytest.raises(UserError, match="compute_loss gives the model no labels, of which its decoder_input_ids are made"):
        trained(trainers(without_labels)[1], bart(), tmp_path, sharpness=ZERO, max_steps=1)


def test_a_loss_that_needs_more_than_logits_is_refused(tmp_path):
    import peft

    def reads_states(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels) + outputs.hidden_states[-1].square().mean()

    model = bert()
    model.config.output_hidden_states = True
    with pytest.raises(UserError, match=r"of its logits \[2, 3\] alone there is none \(TypeError: .* compute_loss_func="):
        trained(SharpnessAwareTrainer, model, tmp_path, rows(kind="classes"), sharpness=ZERO, func=reads_states)
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UserError, match=r"of its logits \[2, 10, 29\] alone there is none .*prompt tuning lengthens texts"):
        trained(SharpnessAwareTrainer, model, tmp_path, sharpness=ZERO)


@pytest.mark.parametrize("word", ["forward", "loss_fn"])
def test_forward_and_loss_are_the_trainers(word, tmp_path):
    with pytest.raises(UserError, match=f"sharpness={{'{word}': ...}}: forward and loss are the Trainer's"):
        SharpnessAwareTrainer(llama(), arguments(tmp_path), sharpness={"method": "sam", word: len})

"""Pretrained models: all of their weights are from the files, or they are refused with the value and the way out."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pretrained import SIZES, WORDS, save_bert

from functional_sam.config import compose
from functional_sam.data import packages
from functional_sam.data.labelled import padded, prepare_labelled
from functional_sam.data.labels import TEXTS, Labelled
from functional_sam.errors import UserError
from functional_sam.models.encoder import SUPPORTED, Encoder
from functional_sam.models.t5 import pretrained_t5, t5
from functional_sam.tasks.finetune import FineTune

T5_SIZES = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def save_t5(directory, tied=False):
    t5(T5_SIZES, tied, 0.1).save_pretrained(directory)


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("change", ["missing", "renamed", "reshaped"])
@pytest.mark.parametrize(
    ("save", "load", "part"),
    [
        (save_bert, lambda directory: Encoder(directory, 2), "encoder.layer.1.output.dense.weight"),
        (save_t5, lambda directory: pretrained_t5(directory, False, 0.1), "decoder.block.1.layer.2.DenseReluDense.wo.weight"),
    ],
    ids=["bert", "t5"],
)
def test_a_weight_that_the_files_lack_is_not_drawn(save, load, part, change, tmp_path):
    save(tmp_path)
    load(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    own = weights.pop(part)
    if change == "renamed":
        weights = {f"backbone.{name}": value for name, value in weights.items()}
    elif change == "reshaped":
        weights[part] = own[:, :-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"lacks {'.*weights in all' if change == 'renamed' else part}"):
        load(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_and_a_pooler_of_theirs_are_not_missed(tied, tmp_path):
    save_t5(tmp_path / "t5", tied)
    if tied:
        with pytest.raises(UserError, match="head"):  # of version 5, whose files do not say it; not that a weight is missing
            pretrained_t5(tmp_path / "t5", False, 0.1)
    pretrained_t5(tmp_path / "t5", tied, 0.1)
    from transformers import BertModel

    save_bert(tmp_path)
    BertModel.from_pretrained(tmp_path).save_pretrained(tmp_path)  # with a pooler
    assert "pooler.dense.weight" in load_file(tmp_path / "model.safetensors")
    Encoder(tmp_path, 2)


def test_only_encoders_like_bert_are_taken(tmp_path):
    """Others have no pooler to leave out, or call dropout and layers by other names."""
    from transformers import AutoConfig, AutoModel

    sizes = {"vocab_size": 45, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    for model_type in (*SUPPORTED, "electra", "deberta-v2", "distilbert"):
        more = {"pad_token_id": 1} if model_type in SUPPORTED else {}
        if model_type == "distilbert":
            own = AutoConfig.for_model(model_type, vocab_size=45, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        else:
            own = AutoConfig.for_model(model_type, **sizes, **more)
        AutoModel.from_config(own).save_pretrained(tmp_path / model_type)
        if model_type in SUPPORTED:
            assert Encoder(tmp_path / model_type, 2, frozen=1)(**padded([np.array([2, 7, 3])], 1)).shape == (1, 2)
        else:
            with pytest.raises(UserError, match=f"is a {model_type}: an encoder is one of bert, camembert"):
                Encoder(tmp_path / model_type, 2)


# ---------------------------------------------------------------------- what it reads


@pytest.fixture
def pairs(monkeypatch):
    """Made-up pairs of texts, and made-up single ones."""
    draw = np.random.RandomState(0)
    texts = [" ".join(draw.choice(WORDS, size=draw.randint(2, 7))) for _ in range(240)]
    for name, rows in (
        ("made-up-pairs", [(*pair, float(i % 2)) for i, pair in enumerate(zip(texts[::2], texts[1::2], strict=True))]),
        ("made-up", [(text, None, float(i % 2)) for i, text in enumerate(texts)]),
    ):
        monkeypatch.setitem(TEXTS, name, Labelled(lambda rows=rows: rows, ("a", "b")))
        monkeypatch.setitem(packages.HOLDS, name, packages.Package("made-up", "1"))


def test_a_bert_is_told_the_two_texts_of_a_pair_apart(pairs, tmp_path):
    """By the ids of its own tokenizer, cut and padded with the tokens."""
    bert = save_bert(tmp_path / "bert", segments=True)
    data = prepare_labelled("made-up-pairs", str(bert), 10, tmp_path / "cache")
    inputs, _ = data.train_batch(0, 32, 0)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    separators = (ids == 3).long()
    assert (separators.sum(1) == 2).all()
    expected = (separators.cumsum(1) - separators).clamp(max=1) * mask  # 1 after the first separator
    assert torch.equal(inputs["token_type_ids"], expected)
    assert ids.shape[1] == 10
    assert 0 < mask.float().mean() < 1
    model = Encoder(bert, 2, dropout=0.0).eval()
    with torch.no_grad():
        h = model.encoder(input_ids=ids, attention_mask=mask, token_type_ids=expected).last_hidden_state
        pooled = (h * mask[..., None]).sum(1) / mask[..., None].sum(1)
        torch.testing.assert_close(model(**inputs), model.head(pooled))
        assert not torch.allclose(model(**inputs), model(ids, mask))


@pytest.mark.parametrize(("name", "segments"), [("made-up", True), ("made-up-pairs", False)])
def test_other_texts_are_read_as_before(name, segments, pairs, tmp_path):
    bert = save_bert(tmp_path / "bert", segments=segments)
    inputs, _ = prepare_labelled(name, str(bert), 10, tmp_path / "cache").train_batch(0, 32, 0)
    assert set(inputs) == {"input_ids", "attention_mask"}
    model = Encoder(bert, 2).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs), model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"])))


def test_a_length_fits_positions_and_special_tokens(pairs, tmp_path):
    """RoBERTa's positions begin after that of padding: 514 are 512."""
    bert = save_bert(tmp_path / "bert")
    own = json.loads((bert / "config.json").read_text())
    for model_type, most in (("bert", 514), ("roberta", 512)):
        (bert / "config.json").write_text(
            json.dumps(own | {"model_type": model_type, "max_position_embeddings": 514, "pad_token_id": 1})
        )
        for length in (most, most + 1):
            given = [f"model.pretrained={bert}", "data.texts=made-up", f"model.length={length}", "data.transfer=[]", *SIZES]
            config = compose("question-type", overrides=[*given, f"runtime.cache={tmp_path}"])
            if length == most:
                FineTune.prepare(config)
                continue
            with pytest.raises(UserError, match=f"model.length={length}: at most {most}, the positions of"):
                FineTune.prepare(config)
    for name, least in (("made-up", 3), ("made-up-pairs", 4)):
        with pytest.raises(UserError, match=f"model.length={least - 1}: at least {least}"):
            prepare_labelled(name, str(bert), least - 1, tmp_path)
        inputs, _ = prepare_labelled(name, str(bert), least, tmp_path).train_batch(0, 32, 0)
        assert inputs["input_ids"].shape[1] == least

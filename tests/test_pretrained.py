"""Pretrained models: all of their weights are from the files, or they are refused with the value and the way out."""

import pytest
from safetensors.torch import load_file, save_file
from tiny_pretrained import save_bert

from functional_sam.errors import UserError
from functional_sam.models.encoder import Encoder
from functional_sam.models.t5 import pretrained_t5, t5

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

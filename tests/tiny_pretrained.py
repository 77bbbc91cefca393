"""Pretrained models of a few thousand numbers with their tokenizers, as `transformers` saves them, for tests of fine-tuning."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
SIZES = ["model.width=16", "model.depth=2", "model.heads=2", "data.vocab=45"]  # of save_bert's, as overrides


def save_bert(directory, words=WORDS, segments=False):
    """A BERT of two layers whose words are `words`, in `directory`. segments: its tokenizer tells the texts of a pair apart."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    second = ":1" if segments else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=f"[CLS] $A [SEP] $B{second} [SEP]{second}", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    own = ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=own, **special).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(names), max_position_embeddings=512, **sizes)
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    return directory


def save_tokenizer_of_t5(directory, words=WORDS):
    """A tokenizer of whole words that pads and ends as T5's does, in `directory`; its number of words."""
    names = ["<pad>", "</s>", "<unk>", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(r" ", "removed")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    return len(names)

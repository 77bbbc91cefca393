"""Which settings of a config's sections `model` and `data` a task reads: by the kind of its model, which is the task's.

And which of the section `optimizer` an optimizer reads.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from omegaconf import OmegaConf

from functional_sam.config import Config, settings_of
from functional_sam.errors import UserError

TRANSFORMER = "width depth heads mlp dropout"

# kind of model -> what is read of section model (beside kind), what of section data
READS: dict[str, tuple[str, str]] = {
    "decoder": (
        f"{TRANSFORMER} length embedding_scale head_dtype checkpoint_blocks",
        "sources vocab held_out transfer elsewhere unique_tokens hub files tokenizer",
    ),
    "vit": (
        f"{TRANSFORMER} patch activation head_dtype checkpoint_blocks",
        "images augment relabel noise unique_images hub files",
    ),
    "convnet": (
        "width stages bottleneck patch activation norm head_dtype",
        "images augment relabel noise unique_images hub files",
    ),
    "encoder": (f"{TRANSFORMER} length pretrained frozen pooling", "texts transfer share unique_texts vocab hub"),
    "t5": (f"{TRANSFORMER} head_width length pretrained tied", "texts transfer share unique_texts vocab hub tokenizer"),
    "marian": (f"{TRANSFORMER} length activation", "sources vocab unique_pairs hub files"),
}


# setting of section optimizer -> the only optimizer that reads it
ONLY_OF = {"beta1": "adamw", "beta2": "adamw", "eps": "adamw", "momentum": "sgd", "relative": "adafactor"}

# setting -> the one that switches it on, and by which values
ON_BY = {
    "model.head_dtype": ("training.precision", ("bf16",)),
    "optimizer.lr_end": ("optimizer.schedule", ("cosine", "linear")),
}


def readers(section: str, key: str) -> list[str]:
    """The kinds of model whose tasks read a setting."""
    return [kind for kind, (model, data) in READS.items() if key in {"model": model, "data": data}[section].split()]


def require_read(config: Config, overrides: Sequence[str]) -> None:
    """Raise UserError for one of the overrides of a run, key=value, that would change its name and nothing else.

    Of what is typed for one run: files, and the overrides of an exhibit, are for every task and model that it has.
    """
    default, kind = Config(), config.model.kind
    for override in overrides:
        layer: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        for section in ("model", "data"):
            for key in layer.get(section, {}):
                value, usual = (getattr(getattr(one, section), key) for one in (config, default))
                known = readers(section, key)
                if value != usual and key != "kind" and kind not in known:
                    raise UserError(
                        f"override {override!r} does nothing in a task of kind {config.kind} with model.kind={kind}; "
                        f"it is for {', '.join(known)}"
                    )
        for key in layer.get("optimizer", {}):
            value, usual = (getattr(one.optimizer, key) for one in (config, default))
            own, only = config.optimizer.name, ONLY_OF.get(key)
            retrained = config.measure.robustness and only == "adamw"  # training/robustness.py has an AdamW of its own
            if only and only != own and value != usual and not retrained:
                raise UserError(f"override {override!r} does nothing with optimizer.name={own}; it is for {only}")
        for setting in set(settings_of((override,))) & set(ON_BY):
            switch, by = ON_BY[setting]
            value, usual, at = (attrgetter(name)(one) for name, one in ((setting, config), (setting, default), (switch, config)))
            if value != usual and at not in by:
                raise UserError(f"override {override!r} does nothing with {switch}={at}; it is for {', '.join(by)}")

"""Which settings of a config's sections `model` and `data` a task reads: by the kind of its model, which is the task's."""

from typing import Any

from functional_sam.config import Config
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
    "encoder": (f"{TRANSFORMER} length pretrained frozen pooling", "texts transfer share unique_texts vocab"),
    "t5": (f"{TRANSFORMER} head_width length pretrained tied", "texts transfer share unique_texts vocab tokenizer"),
    "marian": (f"{TRANSFORMER} length activation", "sources vocab unique_pairs hub files"),
}


def readers(section: str, key: str) -> list[str]:
    """The kinds of model whose tasks read a setting."""
    return [kind for kind, (model, data) in READS.items() if key in {"model": model, "data": data}[section].split()]


def require_read(config: Config, layer: dict[str, Any], where: str) -> None:
    """Raise UserError for a setting of a layer that would change the run's name and nothing else."""
    default, kind = Config(), config.model.kind
    for section in ("model", "data"):
        for key in layer.get(section) or {}:
            value, usual = (getattr(getattr(one, section), key) for one in (config, default))
            known = readers(section, key)
            if value != usual and key != "kind" and kind not in known:
                raise UserError(
                    f"{where}: {section}.{key}={value} does nothing in a task of kind {config.kind} with model.kind={kind}; "
                    f"it is for {', '.join(known)}"
                )

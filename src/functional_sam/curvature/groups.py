"""Parameters by what they do and by where they are."""

import fnmatch
import re
from collections.abc import Iterable

from torch import nn

from functional_sam.errors import UserError

KINDS = ("embedding", "attention", "mlp", "norm", "head")

# Matched against the name of a parameter in lower case, in this order.
_NAMES = {
    "norm": r"norm|(^|\.|_)ln(_|\.|\d|$)",
    "attention": r"attn|attention|(^|\.)(qkv|out|[qkvo]_proj|query|key|value)\.(weight|bias)$",
    "mlp": r"mlp|ffn|feed_?forward|dense_?relu|(^|\.)(fc\d?|up|down|gate|wi|wo|w[123]|linear[12]|c_fc|intermediate)(\.|_|$)",
    "embedding": r"embed|(^|\.)(wte|wpe|tokens|positions|patches|shared|cls_token|pos_?emb\w*|tok_?emb\w*)(\.|$)",
    "head": r"(^|\.)(head|heads|lm_head|classifier|fc_out|output_layer|score|unembed)(\.|$)",
}

Selection = str | Iterable[str | nn.Parameter] | None


def parameter_groups(model: nn.Module, by: str = "kind") -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each group.

    by="kind"   "embedding" (tokens, positions, patches), "attention", "mlp", "norm", "head"; by the classes of the modules and the
                names of the parameters. A head tied to the embedding is the embedding.
    by="layer"  one group for each block, called by its place, such as "blocks.0"; what is outside of them by kind.
    Raises UserError for another `by`, and for parameters that no rule knows or a model without numbered blocks.
    """
    groups = _groups(model, by)
    unknown = [name for name, kind in _kinds(model).items() if kind == "other"]
    if "other" in groups:
        raise UserError(
            f"no kind is known for {', '.join(unknown[:4])}{' ...' if len(unknown) > 4 else ''} of {type(model).__name__}: "
            "choose parameters by name instead, such as parameters=['blocks.0.*']"
        )
    if by == "layer" and not any(_block(name) for name, _ in model.named_parameters()):
        raise UserError(f"{type(model).__name__} has no numbered blocks: choose parameters by name or by kind instead")
    return groups


def select(model: nn.Module, chosen: Selection) -> list[nn.Parameter]:
    """The chosen parameters: all trainable ones for None, kinds, patterns such as "blocks.0.*", or parameters themselves.

    Raises UserError for a string that chooses nothing, for none at all and for frozen ones.
    """
    if chosen is None:
        found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    else:
        items = [chosen] if isinstance(chosen, str) else list(chosen)
        kinds = _kinds(model)
        found = []
        for item in items:
            if not isinstance(item, str):
                found.append(item)
                continue
            named = [p for name, p in _trainable(model) if kinds[name] == item or fnmatch.fnmatchcase(name, item)]
            if not named:
                raise UserError(
                    f"parameters={item!r} chooses no trainable parameter of {type(model).__name__}: give a kind "
                    f"({', '.join(KINDS)}) or a pattern of names such as {next(iter(kinds), 'blocks.0.*')!r}"
                )
            found += named
        found = list(dict.fromkeys(found))
    if not found or not all(parameter.requires_grad for parameter in found):
        raise UserError("parameters are frozen, or none is selected: set requires_grad on those whose curvature you want")
    return found


def labels(model: nn.Module, parameters: Iterable[nn.Parameter], by: str) -> list[str]:
    """The group of each of the parameters, "other" where no rule knows it."""
    found = {p: group for group, members in _groups(model, by).items() for p in members}
    return [found.get(p, "other") for p in parameters]


def _groups(model: nn.Module, by: str) -> dict[str, list[nn.Parameter]]:
    if by not in ("kind", "layer"):
        raise UserError(f"by={by!r}: choose 'kind' or 'layer'")
    kinds = _kinds(model)
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in _trainable(model):
        groups.setdefault((_block(name) if by == "layer" else "") or kinds[name], []).append(parameter)
    return groups


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _block(name: str) -> str:
    """ "blocks.0" of "blocks.0.up.weight", "" without a number."""
    found = re.match(r"(.*?(?:^|\.)\d+)\.", name)
    return found[1] if found else ""


def _kinds(model: nn.Module) -> dict[str, str]:
    """The kind of each trainable parameter by its name, "other" if unknown."""
    kinds: dict[str, str] = {}
    modules = dict(model.named_modules())
    for name, _ in _trainable(model):
        module = modules[name.rpartition(".")[0]]
        kind = next((kind for kind, pattern in _NAMES.items() if re.search(pattern, name.lower())), "other")
        if "norm" in type(module).__name__.lower():
            kind = "norm"
        elif isinstance(module, nn.Embedding) and kind != "attention":
            kind = "embedding"
        elif kind == "other" and re.search(r"(^|\.)(encoder\.)?layers?\.\d+\.output\.dense", name):
            kind = "mlp"  # of BERT and its kin, whose attention has an output of its own
        kinds[name] = kind
    return kinds

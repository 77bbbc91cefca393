"""The words of methods and options: their types, their defaults by axis, and what older names are called now."""

from collections.abc import Callable
from typing import Any, Literal, TypedDict, get_args, get_origin

import torch
from torch import Tensor

MethodName = Literal[
    "plain",
    "adamw",
    "sam",
    "functional-sam",
    "logit-sam",
    "precond-sam",
    "precond-functional-sam",
    "penalty-sam",
    "angle-sam",
    "asam",
    "sam-on",
    "fisher-sam",
    "gsam",
    "wsam",
    "gnp",
    "looksam",
    "momentum-sam",
    "momentum-functional-sam",
    "tram",
    "random-sam",
    "friendly-sam",
    "vasso",
]
Ascent = Literal["gradient", "adam", "adaptive", "fisher", "momentum", "random"]
Path = Literal["sam", "functional", "logit", "penalty"]
WARMUPS = ("warmup", "after-warmup", "in-warmup")  # values of rho_schedule that read warmup_steps


class Options(TypedDict, total=False):
    """What SharpnessAware takes by keyword; a method accepts the options of its own ascent, path and mix, and the general ones."""

    ascent: Ascent  # to leave the named combination
    path: Path
    # of an ascent
    normalize_by: Literal["direction", "gradient", "energy", "none"]  # gradient, adam: size |d|, |g|, sqrt(g^T d) or 1
    eta: float  # adaptive, fisher
    per: Literal["element", "layer"]  # adaptive: what |theta| is taken of
    direction: Literal["ascent", "descent"]  # momentum: along the first moment or against it
    preconditioned: bool  # momentum
    seed: int  # random
    # of a path
    phi: float  # penalty: degrees
    derivative: Literal["exact", "difference"]  # penalty
    step: float  # penalty by difference: the displacement
    dose: float | None  # penalty: |correction| / |g| of every step, in (0, 1)
    # of a mix
    alpha: float  # gnp, gsam, looksam
    sigma: float  # friendly: the weight of the average of g; tram: the standard deviation of the noise
    decay: float  # friendly, vasso: of the average of g
    gamma: float  # wsam
    decoupled: bool  # wsam
    divergence: Literal["previous", "initial", "noise"]  # tram
    # of all
    scope: Literal["step", "rank", "micro-batch"]  # whose gradient makes eps
    every: int  # steps from one perturbed pass to the next
    ascent_steps: int  # of length rho / ascent_steps each, every one along its own gradient
    ascent_part: float  # of the step's micro-batches, whose gradient makes eps
    subset: Literal["norm"] | Callable[[str, Tensor], bool] | None  # what is perturbed
    rho_schedule: Literal["constant", "warmup", "after-warmup", "in-warmup", "lr"]
    warmup_steps: int
    lr_max: float | None
    lr_min: float
    rho_min: float
    keep: Literal["auto", "hidden", "u", "cotangent"]
    keep_dtype: torch.dtype | None


ASCENT_OPTIONS: dict[str | None, dict[str, Any]] = {
    None: {},
    "gradient": {"normalize_by": "direction"},
    "adam": {"normalize_by": "direction"},
    "adaptive": {"eta": 0.01, "per": "element"},
    "fisher": {"eta": 1.0},
    "momentum": {"direction": "ascent", "preconditioned": False},
    "random": {"seed": 0},
}
PATH_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sam": {},
    "functional": {},
    "logit": {},
    "penalty": {"phi": 45.0, "derivative": "exact", "step": 1e-3, "dose": None},
}
MIX_OPTIONS: dict[str | None, dict[str, Any]] = {
    None: {},
    "gnp": {"alpha": 0.8},
    "wsam": {"gamma": 0.9, "decoupled": True},
    "gsam": {"alpha": 1.0},
    "looksam": {"every": 10, "alpha": 0.7},
    "tram": {"divergence": "previous", "sigma": 0.1},
    "friendly": {"sigma": 1.0, "decay": 0.9},
    "vasso": {"decay": 0.1},
}
GENERAL_OPTIONS: dict[str, Any] = {
    "scope": "step",
    "every": 1,
    "ascent_steps": 1,
    "ascent_part": 1.0,
    "subset": None,
    "rho_schedule": "constant",
    "warmup_steps": 0,
    "lr_max": None,
    "lr_min": 0.0,
    "rho_min": 0.0,
    "keep": "auto",
    "keep_dtype": None,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    key: get_args(kind) for key, kind in Options.__annotations__.items() if str(get_origin(kind)) == "typing.Literal"
}

# The names that these options had before, with the new one and what became of the values.
FORMER: dict[str, tuple[str, dict[Any, str]]] = {
    "form": ("normalize_by", {"a": "direction", "b": "gradient", "c": "energy"}),
    "m": ("scope", {"global": "step", "rank": "rank", "microbatch": "micro-batch"}),
    "k": ("every", {}),
    "interval": ("every", {}),
    "only": ("subset", {}),
    "sign": ("direction", {1: "ascent", -1: "descent"}),
}

"""Every named method, as a point of the grid ascent x path (x mix): one table.

Notation: g = J^T u the gradient at theta, theta' = theta + eps, g' the gradient (by the path) at theta'.
passes counts gradient evaluations (one forward and backward = 1, a forward alone = 1/3).
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One method: where it looks (ascent), which derivative it takes there (path), what it does with it (mix)."""

    ascent: str | None
    path: str
    mix: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # defaults of this method, on top of those of ascent, path, mix
    passes: str = "2"
    memory: str = "theta"  # beyond AdamW's own
    rho: float = 0.05  # published default radius where there is one
    source: str = ""


# Options and defaults of each axis; a method accepts those of its own ascent, path and mix, and the general ones.
ASCENT_OPTIONS: dict[str | None, dict[str, Any]] = {
    None: {},
    "gradient": {},
    "adam": {"form": "a"},
    "adaptive": {"eta": 0.01},
    "fisher": {"eta": 1.0},
    "momentum": {"sign": 1.0, "preconditioned": False},
}
PATH_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sam": {},
    "functional": {},
    "logit": {},
    "penalty": {"phi": 45.0, "derivative": "exact", "step": 1e-3},
}
MIX_OPTIONS: dict[str | None, dict[str, Any]] = {
    None: {},
    "gnp": {"alpha": 0.8},
    "wsam": {"gamma": 0.9, "decoupled": True},
    "gsam": {"alpha": 1.0},
    "looksam": {"k": 10, "alpha": 0.7},
    "tram": {"divergence": "previous"},
}
GENERAL_OPTIONS: dict[str, Any] = {
    "m": "global",
    "interval": 1,
    "only": None,
    "rho_schedule": "constant",
    "warmup_steps": 0,
    "lr_max": None,
    "lr_min": 0.0,
    "rho_min": 0.0,
    "keep": "auto",
    "keep_dtype": None,
}

SINGH = "Singh et al. 2025 (Functional-SAM)"
METHODS: dict[str, Method] = {
    "adamw": Method(None, "plain", passes="1", memory="none", source="Loshchilov & Hutter 2019"),
    "sam": Method("gradient", "sam", source="Foret et al. 2020"),
    "functional-sam": Method("gradient", "functional", memory="theta, h", source=SINGH),
    "logit-sam": Method("gradient", "logit", passes="2.33", memory="theta, h, head", source=f"{SINGH}, the other half"),
    "precond-sam": Method("adam", "sam", source=SINGH),
    "precond-functional-sam": Method("adam", "functional", memory="theta, h", source=SINGH),
    "penalty-sam": Method("gradient", "penalty", passes="about 4", memory="graph of second order", source=SINGH),
    "angle-sam": Method(
        "gradient",
        "penalty",
        options={"phi": 0.0},
        passes="about 4",
        memory="graph of second order",
        source=f"{SINGH}; scaling ours",
    ),
    "asam": Method("adaptive", "sam", rho=0.5, source="Kwon et al. 2021"),
    "sam-on": Method("gradient", "sam", options={"only": "norm"}, memory="norm parameters", source="Mueller et al. 2023"),
    "fisher-sam": Method("fisher", "sam", source="Kim et al. 2022"),
    "gsam": Method(
        "gradient", "sam", "gsam", options={"rho_schedule": "lr"}, memory="theta, g", rho=0.6, source="Zhuang et al. 2022"
    ),
    "wsam": Method("gradient", "sam", "wsam", memory="theta, g", source="Yue et al. 2023"),
    "gnp": Method("gradient", "sam", "gnp", memory="theta, g", rho=0.1, source="Zhao et al. 2022"),
    "looksam": Method("gradient", "sam", "looksam", passes="1 + 1/k", memory="theta, g, g_v", source="Liu et al. 2022"),
    "momentum-sam": Method("momentum", "sam", options={"sign": -1.0}, passes="1", source="Becker et al. 2024"),
    "momentum-functional-sam": Method("momentum", "functional", passes="1.33", memory="theta, h", source="ours"),
    "tram": Method("gradient", "sam", "tram", passes="2.33", memory="2 theta, h twice", rho=1.0, source="Sherborne et al. 2023"),
}


def table() -> list[tuple[str, str, str, str, str, str, float, str]]:
    """One row a method: name, ascent, path, mix, passes, extra memory, default rho, source; "-" where there is none."""
    return [
        (name, method.ascent or "-", method.path, method.mix or "-", method.passes, method.memory, method.rho, method.source)
        for name, method in METHODS.items()
    ]

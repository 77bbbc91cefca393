"""Every named method, as a point of the grid ascent x path (x mix), what it costs, and its complete options: one table.

Notation: g = J^T u the gradient at theta, theta' = theta + eps, g' the gradient (by the path) at theta'.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from functional_sam.errors import UserError
from functional_sam.sharpness.options import ASCENT_OPTIONS, CHOICES, FORMER, GENERAL_OPTIONS, MIX_OPTIONS, PATH_OPTIONS, WARMUPS


@dataclass(frozen=True)
class Cost:
    """What one step costs, averaged over `every` steps, and the memory it takes beyond the optimizer's own.

    Computation: forwards and backwards of the whole model; heads, products with the head's matrix, of which a gradient takes 3 (a
    model with a readout does not evaluate its head in a forward whose cotangents are only kept).
    Memory, in copies of the parameters: theta, while they are perturbed; g, of the gradient for a mix; carried, what is kept from
    step to step (in a checkpoint too). h, head: copies of the last hidden states of a step, and of the head's matrix.
    """

    forwards: float = 1.0
    backwards: float = 1.0
    heads: float = 3.0
    theta: int = 0
    g: int = 0
    carried: int = 0
    h: int = 0
    head: int = 0
    second_order: bool = False  # keeps the graph of a gradient

    @property
    def gradients(self) -> float:
        """Gradient evaluations: a forward is 1/3 of one, a backward 2/3."""
        return (self.forwards + 2 * self.backwards) / 3

    @property
    def memory(self) -> str:
        """The copies in words."""
        copies = {"theta": self.theta, "g": self.g, "carried": self.carried, "h": self.h, "head": self.head}
        words = [f"{number} {name}" if number > 1 else name for name, number in copies.items() if number]
        return ", ".join(words + ["graph of second order"] * self.second_order) or "none"


@dataclass(frozen=True)
class Method:
    """One method: where it looks (ascent), which derivative it takes there (path), what it does with it (mix)."""

    ascent: str | None
    path: str
    mix: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # defaults of this method, on top of those of ascent, path, mix
    rho: float = 0.05  # the published radius where it is known
    source: str = ""

    def has_first_pass(self, options: Mapping[str, Any]) -> bool:
        """Whether a perturbed step takes g of all its batches: for eps, or where eps does without, for a mix or the penalty."""
        looks = self.ascent in WITH_GRADIENT and options["ascent_part"] == 1.0
        return looks or self.mix is not None or self.path == "penalty"

    def cost(self, options: Mapping[str, Any]) -> Cost:
        """Count the passes of a step. options: complete, as `resolve` gives them."""
        if self.path == "plain":
            return Cost()
        first = self.has_first_pass(options)
        passes: list[tuple[float, float, float]] = [(1, 1, 3)] if first else []  # (forwards, backwards, heads) of each
        if self.ascent in WITH_GRADIENT:  # beyond pass 1
            looks = options["ascent_part"] * options["ascent_steps"] - first
            passes.append((looks, looks, 3 * looks))
        if self.mix == "tram":
            passes.append((1, 0, 2))  # a forward at the earlier weights, and logits twice for the divergence
        if self.path == "functional" and not first:
            passes.append((1, 0, 0))  # u at theta
        if self.path == "logit":
            passes.append((1, 0, 0))  # u at theta'
        exact = self.path == "penalty" and options["derivative"] == "exact"
        if exact:
            passes.append((3, 3, 9))  # by double backward, as measured
        elif self.path == "penalty":
            functional, logit = coefficients(options["phi"])
            passes.append((1, 1, 3 if functional == logit or not logit else 6))  # cotangents of two points, pulled back together
        else:
            passes.append((1, 1, 3))
        keeps_u = self.path in ("functional", "logit") or (not exact and needs_cotangent(self, options))
        every = options["every"]
        forwards, backwards, heads = ((sum(part) + every - 1) / every for part in zip(*passes, strict=True))
        return Cost(
            forwards,
            backwards,
            heads + 2 * (every - 1) / every,
            theta=1,
            g=int(self.mix is not None or self.path == "penalty") + int(options["ascent_steps"] > 1),
            carried=int(self.mix in ("looksam", "friendly", "vasso") or (self.mix == "tram" and options["divergence"] != "noise")),
            h=2 if self.mix == "tram" else int(keeps_u),
            head=int(self.path == "logit"),
            second_order=exact,
        )


WITH_GRADIENT = ("gradient", "adam", "adaptive", "fisher")  # ascents that point along one
AVERAGED = ("friendly", "vasso")  # mixes that give the ascent another vector than g
SINGH = "Singh et al. 2025 (Functional-SAM)"
PLAIN = Method(None, "plain", source="Loshchilov & Hutter 2019")
METHODS: dict[str, Method] = {
    "plain": PLAIN,
    "adamw": PLAIN,  # its other name
    "sam": Method("gradient", "sam", source="Foret et al. 2020"),
    "functional-sam": Method("gradient", "functional", source=SINGH),
    "logit-sam": Method("gradient", "logit", source=f"{SINGH}, the other part"),
    "precond-sam": Method("adam", "sam", source=SINGH),
    "precond-functional-sam": Method("adam", "functional", source=SINGH),
    "penalty-sam": Method("gradient", "penalty", source=SINGH),
    "angle-sam": Method("gradient", "penalty", options={"phi": 0.0}, source=f"{SINGH}; scaling ours"),
    "asam": Method("adaptive", "sam", rho=0.5, source="Kwon et al. 2021"),
    "sam-on": Method("gradient", "sam", options={"subset": "norm"}, source="Mueller et al. 2023"),
    "fisher-sam": Method("fisher", "sam", source="Kim et al. 2022"),
    "gsam": Method("gradient", "sam", "gsam", options={"rho_schedule": "lr"}, rho=0.6, source="Zhuang et al. 2022"),
    "wsam": Method("gradient", "sam", "wsam", source="Yue et al. 2023"),
    "gnp": Method("gradient", "sam", "gnp", rho=0.1, source="Zhao et al. 2022"),
    "looksam": Method("gradient", "sam", "looksam", source="Liu et al. 2022"),
    "momentum-sam": Method("momentum", "sam", options={"direction": "descent"}, source="Becker et al. 2024"),
    "momentum-functional-sam": Method("momentum", "functional", source="ours"),
    "tram": Method("gradient", "sam", "tram", rho=1.0, source="Sherborne et al. 2023"),
    "random-sam": Method("random", "sam", source="ours, a control"),
    "friendly-sam": Method("gradient", "sam", "friendly", source="Li et al. 2024"),
    "vasso": Method("gradient", "sam", "vasso", source="Li & Giannakis 2023"),
}


def coefficients(phi: float) -> tuple[float, float]:
    """(c cos(phi), c sin(phi)), c = sqrt(2): weights of delta_func and delta_logit in the penalty; exact where 0 or 1."""
    angle = math.radians(phi)
    return round(math.sqrt(2.0) * math.cos(angle), 14), round(math.sqrt(2.0) * math.sin(angle), 14)


def needs_cotangent(method: Method, options: Mapping[str, Any]) -> bool:
    """Whether pass 1 must keep u(theta): for the functional path, and for the penalty by difference unless it is H eps alone."""
    if method.path == "penalty":
        functional, logit = coefficients(options["phi"])
        return bool(options["derivative"] == "difference" and functional != logit)
    return method.path == "functional"


def resolve(name: str, given: Mapping[str, Any] | None = None) -> tuple[Method, dict[str, Any]]:
    """Look up the method of a name (ascent and path as given, if they are) and complete its options; no model is needed.

    lr_max stays None: it is filled in from the optimizer. Raises UserError for a name, an option or a value that does not exist,
    with the nearest one that does, and for numbers out of range.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    named, given = METHODS[name], dict(given or {})
    ascent, path = given.pop("ascent", named.ascent), given.pop("path", named.path)
    if ascent not in ASCENT_OPTIONS:
        raise unknown("ascent", ascent, [a for a in ASCENT_OPTIONS if a])
    if path not in PATH_OPTIONS:
        raise unknown("path", path, PATH_OPTIONS)
    if (ascent is None) != (path == "plain"):
        raise UserError(f"method {name!r} with ascent={ascent!r} and path={path!r}: give both, or start from another method")
    method = dataclasses.replace(named, ascent=ascent, path=path)

    options = {**GENERAL_OPTIONS, **ASCENT_OPTIONS[ascent], **PATH_OPTIONS[path], **MIX_OPTIONS[method.mix]}
    options |= {key: value for key, value in named.options.items() if key in options}
    for key, value in given.items():
        if key in FORMER:
            raise _renamed(key, value)
        if key not in options:
            raise unknown(f"option of {name}", key, options)
        if key in CHOICES and value not in CHOICES[key]:
            raise unknown(f"value of {key}", value, CHOICES[key])
    options |= given
    _require_general(options)
    _require_path_and_mix(method, options)
    _require_scope(method, options)
    _require_ascent(method, options)
    return method, options


def _require_general(options: Mapping[str, Any]) -> None:
    """Raise UserError for a value of a general option that is out of range or of another type."""
    if not isinstance(options["every"], int) or options["every"] < 1:
        raise UserError(f"every={options['every']!r}: the perturbed pass comes every so many steps, a whole number >= 1")
    if not (options["subset"] in (None, "norm") or callable(options["subset"])):
        raise UserError(f'subset={options["subset"]!r}: expected None, "norm", or a function (name, parameter) -> bool')
    if options["rho_schedule"] in WARMUPS and options["warmup_steps"] < 1:
        raise UserError(f'rho_schedule="{options["rho_schedule"]}" needs warmup_steps >= 1')
    if options["keep_dtype"] not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise UserError(
            f"keep_dtype={options['keep_dtype']!r}: what is kept, u, is of the order of 1 / (number of targets), which float16 and "
            "whole numbers have as zeros: torch.bfloat16, torch.float32, torch.float64, or None for the logits' own"
        )


def _require_path_and_mix(method: Method, options: Mapping[str, Any]) -> None:
    """Raise UserError for a number of the path or the mix that is out of range."""
    if options.get("step", 1.0) <= 0:
        raise UserError(f"step={options['step']!r}: the displacement of the finite difference is > 0")
    if options.get("dose") is not None:
        _require_dose(method, options)
    if method.mix == "tram" and options["sigma"] <= 0:
        raise UserError(f"sigma={options['sigma']!r}: the standard deviation of the noise on the inputs is > 0")
    if not 0.0 <= options.get("gamma", 0.0) < 1.0:
        raise UserError(f"gamma={options['gamma']!r}: the weight of the sharpness is in [0, 1)")


def _require_scope(method: Method, options: Mapping[str, Any]) -> None:
    """Raise UserError for what needs one eps for the whole step and is given another scope."""
    scope = options["scope"]
    if scope != "step" and (method.mix is not None or method.path == "penalty"):
        does = "averages g" if method.mix in AVERAGED else "mixes both gradients"
        raise UserError(f"scope={scope!r} does not combine with {method.mix or 'penalty'}, which {does}")
    if scope == "micro-batch" and (method.ascent == "fisher" or options.get("normalize_by") == "none"):
        what = f"ascent {method.ascent!r}" if method.ascent == "fisher" else 'normalize_by="none"'
        raise UserError(f'scope="micro-batch" does not combine with {what}: eps would depend on the size of the step\'s gradient')


def _require_ascent(method: Method, options: Mapping[str, Any]) -> None:
    """Raise UserError for numbers out of range, and for what an ascent in several steps or on a part cannot be combined with."""
    steps, part, seed, decay = (options.get(key, 0) for key in ("ascent_steps", "ascent_part", "seed", "decay"))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"seed={seed!r}: of the random directions, a whole number")
    if not 0.0 <= decay < 1.0:
        raise UserError(f"decay={decay!r}: the weight of the past in the average of g is in [0, 1)")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"ascent_steps={steps!r}: a whole number >= 1 of steps of rho / ascent_steps each")
    if not 0.0 < part <= 1.0:
        raise UserError(f"ascent_part={part!r}: the part of the micro-batches whose gradient makes eps is in (0, 1]")
    for name, given in (("ascent_steps", steps), ("ascent_part", part)):
        if given == 1:
            continue
        clash = (
            (method.path == "plain" and "method plain, which has no ascent")
            or (method.ascent not in WITH_GRADIENT and f"ascent {method.ascent!r}, which takes no gradient")
            or (method.path == "penalty" and "the penalty path, which is of g along one direction")
            or (options["scope"] != "step" and f"scope={options['scope']!r}: it is of the whole step")
            or (name == "ascent_steps" and method.mix in AVERAGED and f"mix {method.mix!r}, whose average has one g a step")
            or (name == "ascent_part" and method.mix is not None and f"mix {method.mix!r}, which needs g of the whole step")
        )
        if clash:
            raise UserError(f"{name}={given!r} does not combine with {clash}")


def _require_dose(method: Method, options: Mapping[str, Any]) -> None:
    """Raise UserError for a dose out of range, or where something else would say how large the correction is."""
    dose = options["dose"]
    if isinstance(dose, bool) or not isinstance(dose, int | float) or not 0.0 < dose < 1.0:
        raise UserError(f"dose={dose!r}: |correction| / |g|, a number between 0 and 1; None leaves the correction as it is")
    if method.mix is not None:
        raise UserError(f"dose={dose} does not combine with {method.mix}, which weighs the correction anew: leave one of the two")
    if options["rho_schedule"] != "constant":
        raise UserError(
            f"dose={dose} fixes the size of the correction, so that rho_schedule={options['rho_schedule']!r} would do nothing: "
            "leave one of them out"
        )


def cost(name: str, options: Mapping[str, Any] | None = None) -> Cost:
    """Return what a step of a method costs, with these options over its own. Raises UserError as resolve does."""
    method, complete = resolve(name, options)
    return method.cost(complete)


def table() -> list[tuple[str, str, str, str, str, str, float, str]]:
    """List the methods: name, ascent, path, mix, gradients of a step, extra memory, default rho, source; "-" for none."""
    rows = []
    for name, method in METHODS.items():
        if name == "adamw":
            continue
        _, options = resolve(name)
        spent = method.cost(options)
        gradients = f"{spent.gradients:.3g}" + (f" (every {options['every']})" if options["every"] > 1 else "")
        memory = spent.memory.replace("theta", "norm parameters") if options["subset"] == "norm" else spent.memory
        shown = "plain (adamw)" if name == "plain" else name
        rows.append(
            (shown, method.ascent or "-", method.path, method.mix or "-", gradients, memory, method.rho, method.source),
        )
    return rows


def unknown(kind: str, value: object, known: Iterable[object]) -> UserError:
    """Make the error for a name that is not in `known`, with the nearest one."""
    names = list(map(str, known))
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {value!r}{hint} (known: {', '.join(names)})")


def _renamed(key: str, value: object) -> UserError:
    new, values = FORMER[key]
    now = values.get(value, value) if isinstance(value, str | int | float) else value
    return UserError(f"option {key} is called {new} now: {new}={now!r} in the place of {key}={value!r}")

"""Candidate settings of fusion, each adjusted to meet a budget.

A candidate is a method, its settings, and the distribution of the reduction over the layers.
:func:`meet` computes its numbers of tokens from a budget of multiply-accumulates. So candidates of
all methods cost the same and can be compared by their loss.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cost import Description, describe, fusion_config_of
from .reducers import REDUCERS

# Largest weight of a layer, relative to the mean of the layers.
MOST_WEIGHT = 3.0


@dataclass(frozen=True)
class Dial:
    """A setting that a search may vary.

    Attributes:
        name: name of the setting.
        untuned: its value in the method's paper, or this library's default.
        high: largest value of what is varied; the smallest is 0.
        inverse: whether the setting is a temperature, of which the inverse is varied.
        choices: all values of a setting that is not a number; empty for numbers.
    """

    name: str
    untuned: Any
    high: float = 1.0
    inverse: bool = False
    choices: tuple[Any, ...] = ()

    def value(self, turned: Any) -> Any:
        """Convert a position in [0, 1], from 0 to ``high``, to a value; choices are unchanged."""
        if self.choices:
            return turned
        value = turned * self.high
        if not self.inverse:
            return round(value, 4)
        return round(1 / value, 2) if value > 1e-3 else 0.0

    def turned(self, value: Any) -> Any:
        """Convert a value to a position in [0, 1]; the inverse of :meth:`value`."""
        if self.choices:
            return value
        value = (1 / value if value else 0.0) if self.inverse else value
        return min(1.0, value / self.high)


_PROPORTIONAL = Dial("proportional_attention", True, choices=(True, False))
_CRITERIA = (
    Dial("tau_info", 20.0, high=0.1, inverse=True),
    Dial("tau_size", 40.0, high=0.1, inverse=True),
    Dial("key_share", 0.0),
    Dial("class_share", 0.0),
    Dial("bidirectional", True, choices=(True, False)),
    Dial("pooling", "attention_size", choices=("attention_size", "size")),
    _PROPORTIONAL,
)


@dataclass(frozen=True)
class Method:
    """A method and the settings that a search may vary.

    Attributes:
        fixed: settings that select the method.
        dials: settings to vary.
        first_layer: index of the first layer that fuses by default.
        drops: whether it drops tokens; not offered for models that restore tokens.
    """

    fixed: Mapping[str, Any]
    dials: tuple[Dial, ...] = ()
    first_layer: int = 0
    drops: bool = False


METHODS: dict[str, Method] = {
    "mctf": Method({"reduction": "mctf", "one_step_ahead": "approximate"}, _CRITERIA, 1),
    "mctf_present": Method({"reduction": "mctf", "one_step_ahead": "present"}, _CRITERIA, 1),
    "tome": Method({"reduction": "tome"}, (_PROPORTIONAL,)),
    "pitome": Method({"reduction": "pitome"}, (Dial("margin", 0.75),)),
    "diffrate": Method({"reduction": "diffrate"}, (Dial("dropped", 0.0, high=0.95), _PROPORTIONAL),
        drops=True),
    "token_mergence": Method({"reduction": "token_mergence"}, (_PROPORTIONAL,)),
    "evit": Method({"reduction": "evit"}),
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A way to reduce tokens, without the numbers of tokens.

    Attributes:
        method: name in :data:`METHODS`.
        settings: values of the method's dials.
        weights: share of each layer in the reduction, one number of at least 0 per layer; ``None``
            for the method's default.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None

    @classmethod
    def untuned(cls, method: str) -> "Candidate":
        """The candidate with the settings of the method's paper."""
        return cls(method, {dial.name: dial.untuned for dial in METHODS[method].dials})

    @classmethod
    def of(cls, settings: Any, num_tokens: int) -> "Candidate | None":
        """The candidate that matches settings for ``num_tokens`` tokens; ``None`` if none does."""
        amounts = [float(fused) for fused in settings.tokens_fused(num_tokens)]
        if not any(amounts):
            return None
        if settings.reducer_class.amount == "keep_rate":
            amounts = [1 - rate for rate in settings.kept_by_layer()]
            whole = max(amounts)
        else:
            whole = sum(amounts) / len(amounts)
        for name, method in METHODS.items():
            values = {dial.name: getattr(settings, dial.name) for dial in method.dials}
            alike = all(getattr(settings, key) == value for key, value in method.fixed.items())
            if alike and not any(isinstance(value, list) for value in values.values()):
                return cls(name, values, tuple(amount / whole for amount in amounts))
        return None


# Further starting points of a search: weak informativeness, keys, more fusion in early layers.
_MILD = {
    "tau_info": 45.0,
    "tau_size": 40.0,
    "bidirectional": True,
    "pooling": "attention_size",
    "proportional_attention": True,
}
HINTS = (
    Candidate("mctf_present", {**_MILD, "key_share": 0.2, "class_share": 0.5}),
    Candidate("mctf_present", {**_MILD, "key_share": 0.6, "class_share": 0.0}),
    Candidate("mctf", {**_MILD, "key_share": 0.2, "class_share": 0.0}),
    Candidate("tome", {"proportional_attention": True}),
)
# Slope of the layers' counts there: 0 falls to zero, 0.5 is constant, 1 rises from zero.
FALLING = 0.25


@dataclass(frozen=True)
class FittedCandidate:
    """A candidate that meets a budget.

    Attributes:
        candidate: the candidate.
        settings: all settings of fusion that it sets.
        cost: multiply-accumulates of one image.
    """

    candidate: Candidate
    settings: dict[str, Any]
    cost: int


def methods_for(model: Any) -> tuple[str, ...]:
    """Names of the methods for a model: if it restores tokens, only those that drop none."""
    restores = fusion_config_of(model).restore
    return tuple(name for name, method in METHODS.items() if not (method.drops and restores))


def meet(
    model: Any, candidate: Candidate, budget: int, described: Description | None = None
) -> FittedCandidate:
    """Find the settings with which a candidate costs the most within a budget.

    Args:
        model: see :func:`.cost.multiply_accumulates`.
        budget: multiply-accumulates of one image.
        described: result of :func:`.cost.describe` for the model, if it is already known.

    Raises:
        ValueError: if the candidate cannot meet the budget.
    """
    described = described or describe(model)
    config = copy.copy(fusion_config_of(model))
    chosen: dict[str, Any] = {
        **METHODS[candidate.method].fixed,
        **candidate.settings,
        "fusion_layers": None,
        "inflection": 0.0,
    }
    for name, value in chosen.items():
        setattr(config, name, value)
    weights = _weights(config, candidate, described.num_layers)
    if candidate.weights is not None and described.num_read is not None:
        weights[-1] = 0.0  # fusing saves nothing there: the layer outputs only the tokens read
    by_rate = REDUCERS[config.reduction].amount == "keep_rate"

    def amounts(scale: float) -> list[int | float]:
        if by_rate:
            return [round(max(0.02, 1 - scale * weight), 3) for weight in weights]
        return [int(scale * weight + 0.5) for weight in weights]

    def cost(amounts: Sequence[int | float]) -> int:
        name = "keep_rate" if by_rate else "r"
        return described.of(config, **{name: list(amounts)})

    low, high = 0.0, 1.0 if by_rate else float(described.num_tokens)
    least = cost(amounts(high))
    if least > budget:
        raise ValueError(
            f"a budget of {budget / 1e9:.4g} GMACs cannot be met by {candidate.method}, which "
            f"leaves {least / 1e9:.4g} of {described.unfused / 1e9:.4g}"
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(amounts(middle)) > budget else (low, middle)
    found = amounts(high)
    if by_rate:
        chosen["keep_rate"] = found
    else:
        chosen["r"] = _filled(list(config.tokens_fused(described.num_tokens, found)), cost, budget)
    return FittedCandidate(candidate, chosen, cost(chosen["keep_rate" if by_rate else "r"]))


def untuned(
    model: Any, methods: Sequence[str], budget: int, described: Description | None = None
) -> dict[str, FittedCandidate]:
    """Methods with the settings of their papers, at a budget, without those that cannot meet it.

    Args:
        model, budget, described: see :func:`meet`.
        methods: names in :data:`METHODS`.

    Raises:
        ValueError: if no method can meet the budget.
    """
    found: dict[str, FittedCandidate] = {}
    problems: list[ValueError] = []
    for method in methods:
        try:
            found[method] = meet(model, Candidate.untuned(method), budget, described)
        except ValueError as error:
            problems.append(error)
    if not found:
        raise ValueError("; ".join(map(str, problems)))
    return found


def _weights(config: Any, candidate: Candidate, num_layers: int) -> list[float]:
    if candidate.weights is not None:
        return list(candidate.weights)
    reducer = REDUCERS[config.reduction]
    if reducer.amount == "keep_rate":
        fusing = reducer.default_layers(num_layers)
    else:
        fusing = range(METHODS[candidate.method].first_layer, num_layers)
    return [float(layer in fusing) for layer in range(num_layers)]


def _filled(counts: list[int], cost: Any, budget: int) -> list[int]:
    """Reduce each layer's count by one, first layer first, if the cost stays within the budget."""
    for layer, count in enumerate(counts):
        less = [*counts[:layer], count - 1, *counts[layer + 1 :]]
        if count and cost(less) <= budget:
            counts = less
    return counts


def budget_of(model: Any, fraction: float, described: Description | None = None) -> int:
    """Multiply-accumulates of a fraction of a model's cost without fusion.

    Raises:
        ValueError: if the fraction is not above 0 and below 1.
    """
    if isinstance(fraction, bool) or not 0 < fraction < 1 or not math.isfinite(fraction):
        raise ValueError(f"budget={fraction!r} is not allowed: it must be above 0 and below 1")
    return int(fraction * (described or describe(model)).unfused)

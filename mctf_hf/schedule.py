"""Number of tokens that each layer fuses, computed from ``r`` or ``keep_rate``.

The counts are static: they depend only on the settings and the number of tokens.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .reducers import Reducer, count_or_fraction

# A count or fraction of tokens, a list with one of these per layer, or (r, inflection).
TokensFused = int | float | list[int | float] | tuple[int | float, int | float]
KeepRate = int | float | list[int | float]


def is_number(value: Any) -> bool:
    """Whether a value is a number with an absolute value below 2**63."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def check_tokens_fused(value: TokensFused) -> None:
    """Raise ValueError unless every entry of ``r`` is a whole count or a fraction in (0, 1)."""
    if isinstance(value, tuple) and len(value) == 2:
        value, inflection = value
        check_inflection(inflection)
    for entry in value if isinstance(value, list) else [value]:
        if not is_number(entry) or entry < 0 or (entry >= 1 and entry != int(entry)):
            raise ValueError(
                f"r={value!r} is not allowed: r is a count of tokens (0, 1, 2, …), a fraction of "
                "them between 0 and 1, a list with one of these for each layer, or a count and an "
                "inflection: (r, inflection)"
            )


def check_dropped(value: int | float | list[int | float]) -> None:
    for entry in value if isinstance(value, list) else [value]:
        if not is_number(entry) or entry < 0 or (entry >= 1 and entry != int(entry)):
            raise ValueError(
                f"dropped={value!r} is not allowed: it must be a count of tokens (0, 1, 2, …), a "
                "fraction between 0 and 1 of those that a layer loses, or a list with one of these "
                "for each layer"
            )


def check_inflection(value: float) -> None:
    if not is_number(value) or not -1 <= value <= 1:
        raise ValueError(f"inflection={value!r} is not allowed: it must be a number from -1 to 1")


def check_keep_rate(value: KeepRate) -> None:
    for entry in value if isinstance(value, list) else [value]:
        if not is_number(entry) or not 0 < entry <= 1:
            raise ValueError(
                f"keep_rate={value!r} is not allowed: it must be above 0 and at most 1, or a list "
                "with one such number for each layer"
            )


class ScheduleMixin:
    """Turns ``r``, ``keep_rate``, ``inflection`` and ``fusion_layers`` into one count per layer."""

    if TYPE_CHECKING:
        r: Any
        keep_rate: Any
        inflection: float | int
        fusion_layers: list[int] | None
        min_tokens: int
        num_hidden_layers: int
        num_prefix_tokens: int
        reducer_class: type[Reducer] | None

        def check_effect(self, given: dict[str, Any]) -> None: ...

        def own_amount(self) -> dict[str, Any]: ...

    def tokens_fused(
        self, num_tokens: int, r: TokensFused | None = None, keep_rate: KeepRate | None = None
    ) -> tuple[int, ...]:
        """Number of tokens that each layer removes.

        Args:
            num_tokens: number of tokens that enter the first layer, including prefix tokens.
            r: amount for any method, instead of the configuration's ``r`` or ``keep_rate``.
            keep_rate: rates instead of the configuration's, for a method with keep rates.

        Returns:
            One count per layer. A fraction removes that part of the patch tokens, rounded down; a
            rate keeps that part, rounded up. No layer removes more than its method allows (half of
            the patch tokens if tokens are matched) or leaves fewer than ``min_tokens``.

        Raises:
            ValueError: if ``r`` or ``keep_rate`` is not allowed, both are given, or one has no
                effect on the method.
        """
        return tuple(count for _, count in self.scheduled(num_tokens, r, keep_rate))

    def shortfall(
        self,
        num_tokens: int,
        r: TokensFused | None = None,
        keep_rate: KeepRate | None = None,
        scheduled: Sequence[tuple[int, int]] | None = None,
    ) -> str | None:
        """Message if the layers cannot fuse as many tokens as they are asked to; else ``None``.

        Args:
            num_tokens, r, keep_rate: see :meth:`tokens_fused`.
            scheduled: result of :meth:`scheduled` for these arguments, if known.
        """
        scheduled = scheduled or self.scheduled(num_tokens, r, keep_rate)
        asked, fused = (sum(counts) for counts in zip(*scheduled, strict=True))
        if asked <= fused:
            return None
        amounts = {"r": r, "keep_rate": keep_rate}
        given = {name: value for name, value in amounts.items() if value is not None}
        amount = ", ".join(f"{k}={v!r}" for k, v in (given or self.own_amount()).items())
        return (
            f"{amount} asks the layers to fuse {asked:,} tokens of {num_tokens}, and they can fuse "
            f"{fused}: no layer fuses more than its method can, or leaves fewer tokens than "
            f"min_tokens={self.min_tokens}"
        )

    def scheduled(
        self, num_tokens: int, r: TokensFused | None, keep_rate: KeepRate | None
    ) -> list[tuple[int, int]]:
        """Number of tokens that each layer is asked to fuse, and number that it fuses.

        For arguments and errors, see :meth:`tokens_fused`.
        """
        reducer = self.reducer_class
        if torch.compiler.is_compiling():
            r, keep_rate = _constant(r), _constant(keep_rate)
        if r is not None and keep_rate is not None:
            raise ValueError(f"r={r!r} and keep_rate={keep_rate!r}: give one of them")
        self.check_effect({"keep_rate": keep_rate})
        if reducer is None:
            if r is not None:
                check_tokens_fused(r)
            if r and r != [0] * self.num_hidden_layers:
                self.check_effect({"r": r})
            return [(0, 0)] * self.num_hidden_layers
        if reducer.amount == "keep_rate" and r is None:
            rates = self.kept_by_layer(keep_rate)
            added = reducer.tokens_added(self)
            fewer = [partial(_fewer_by_rate, rate=rate, added=added) for rate in rates]
        else:
            wanted = self._wanted_by_layer(self.r if r is None else r)
            fewer = [partial(count_or_fraction, want) for want in wanted]
        counts = []
        for count_of in fewer:
            patches = num_tokens - self.num_prefix_tokens
            most = min(reducer.most(patches), num_tokens - self.min_tokens)
            asked = count_of(patches)
            counts.append((max(0, asked), max(0, min(asked, most))))
            num_tokens -= counts[-1][1]
        return counts

    def _wanted_by_layer(self, r: TokensFused) -> Sequence[int | float]:
        """Count or fraction of tokens that each layer is asked to fuse."""
        check_tokens_fused(r)
        r, inflection = r if isinstance(r, tuple) else (r, self.inflection)
        if inflection and not isinstance(r, list):
            if 0 < r < 1:
                raise ValueError(
                    f"inflection={inflection!r} is not allowed with r={r!r}: it takes a count"
                )
            first, steps = int(r * (1 - inflection)), max(1, self.num_hidden_layers - 1)
            rise = 2 * (r - first) / steps
            rising = [int(first + rise * layer) for layer in range(self.num_hidden_layers)]
            return self._in_fusing_layers(rising, 0)
        return self._by_layer("r", r, 0)

    def kept_by_layer(self, keep_rate: KeepRate | None = None) -> Sequence[int | float]:
        """Fraction of the patch tokens that each layer keeps; unset, that of the configuration.

        Raises:
            ValueError: for rates that are not allowed.
        """
        keep_rate = self.keep_rate if keep_rate is None else keep_rate
        check_keep_rate(keep_rate)
        return self._by_layer("keep_rate", keep_rate, 1)

    def _in_fusing_layers(
        self, amounts: Sequence[int | float], nothing: int
    ) -> Sequence[int | float]:
        """The amounts in the layers that fuse, and ``nothing`` in the others."""
        layers = range(self.num_hidden_layers)
        fusing = self.fusion_layers
        if fusing is None and self.reducer_class is not None:
            fusing = list(self.reducer_class.default_layers(len(layers)))
        return [amounts[layer] if layer in (fusing or ()) else nothing for layer in layers]

    def _by_layer(
        self, name: str, amount: int | float | list[int | float], nothing: int
    ) -> Sequence[int | float]:
        """One amount per layer; ``nothing`` is the amount that changes no tokens."""
        layers = range(self.num_hidden_layers)
        if not isinstance(amount, list):
            return self._in_fusing_layers([amount] * len(layers), nothing)
        if len(amount) != len(layers):
            raise ValueError(
                f"{name}={amount!r} has {len(amount)} entries: a list has one for each of the "
                f"{len(layers)} layers"
            )
        allowed = layers if self.fusion_layers is None else self.fusion_layers
        outside = [i for i in layers if amount[i] != nothing and i not in allowed]
        if outside:
            raise ValueError(
                f"{name}={amount!r} fuses in layers {outside}, which fusion_layers="
                f"{self.fusion_layers!r} leaves out: leave fusion_layers unset or let the list be "
                f"{nothing} there"
            )
        return amount


def _constant(amount: Any) -> Any:
    """The same numbers, each as a constant of the compiled program, with a guard.

    Otherwise, if a number changes in a second call, the compiler would make it a variable, and the
    numbers of tokens too. What it hashes becomes a constant.
    """
    if isinstance(amount, (list, tuple)):
        return type(amount)([_constant(number) for number in amount])
    return next(iter({amount})) if isinstance(amount, (int, float)) else amount


def _fewer_by_rate(patches: int, rate: int | float, added: int) -> int:
    return patches - math.ceil(patches * rate - 1e-9) - added  # 0.55 * 100 is a little above 55

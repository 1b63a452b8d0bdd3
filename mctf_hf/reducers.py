"""Methods of token reduction: from the tokens of a layer to a reduction.

A reducer is a small immutable object made from a model's configuration. It declares which setting
controls it, at which point of a layer it acts, and which data it needs there. Called with these
data, it returns a :class:`~.fusion.Reduction`. It has no state, so one layer can run in several
threads. To add a method, decorate a subclass of :class:`Reducer` with :func:`register`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .fusion import Reduction
from .matching import attraction, bipartite_soft_matching, cosine_similarity, similarity
from .pairing import energy, merge_within_ranking, pair_highest
from .selection import drop_and_merge, keep_most_important, merge_into_most_important


def count_or_fraction(amount: int | float, whole: int) -> int:
    """A count unchanged, or a fraction in (0, 1) times ``whole``, rounded down."""
    return int(whole * amount) if 0 < amount < 1 else int(amount)


class Stage(Enum):
    """The point of a layer at which its tokens are reduced, and how its attention is then used."""

    REUSE = "before attention, whose map is fused along with the tokens"
    RECOMPUTE = "before attention, which is then computed among the tokens left"
    AFTER_ATTENTION = "between attention and MLP"
    AFTER_MLP = "after the layer has run in full"

    @property
    def ahead(self) -> bool:
        """Whether tokens are reduced before the layer's own attention."""
        return self in (Stage.REUSE, Stage.RECOMPUTE)


class Observation(NamedTuple):
    """Data that a layer passes to its reducer; of the last four, only those it needs.

    Attributes:
        tokens: (b, n, d), before any normalisation.
        sizes: (b, n), number of patches per token; ``None`` if all are 1.
        num_prefix_tokens: number of tokens at the front that are not reduced.
        keys: (b, n, d / h), mean over heads.
        attention: (b, h, n, n), the whole map; every row sums to 1.
        attention_received: (b, n), attention that each token receives, mean over heads and queries.
        class_attention: (b, n), attention that each token receives from the class token, mean over
            heads; ``attention_received`` in a model without class token.
    """

    tokens: Tensor
    sizes: Tensor | None
    num_prefix_tokens: int
    keys: Tensor | None = None
    attention: Tensor | None = None
    attention_received: Tensor | None = None
    class_attention: Tensor | None = None


_OBSERVABLE = Observation._fields[3:]


class Reducer(ABC):
    """A method of token reduction.

    Attributes:
        stage: point of the layer at which it acts.
        needs: names of the fields of :class:`Observation` it needs, besides the first three.
        amount: setting that controls how many tokens a layer loses, ``"r"`` or ``"keep_rate"``.
        settings: names of the configuration's fields that only this method uses.
        biases_attention: whether sizes change attention if ``proportional_attention`` is set.
        pools_linearly: whether its reductions have weights, not ``maximum``.
        drops_tokens: whether some tokens are dropped, so that tokens cannot be restored.
    """

    stage: Stage
    needs: ClassVar[tuple[str, ...]] = ()
    amount: ClassVar[str] = "r"
    settings: ClassVar[tuple[str, ...]] = ()
    biases_attention: ClassVar[bool] = True
    pools_linearly: bool = True
    drops_tokens: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "Reducer":
        """The reducer with the settings of a configuration of this library."""
        return cls()

    def for_layer(self, layer: int, num_layers: int) -> "Reducer":
        """The reducer for one of ``num_layers`` layers; ``layer`` is zero-based."""
        return self

    @classmethod
    def default_layers(cls, num_layers: int) -> Sequence[int]:
        """Zero-based indices of the layers that reduce tokens if ``fusion_layers`` is unset."""
        return range(1, num_layers)

    @classmethod
    def most(cls, num_patches: int) -> int:
        """Largest number of patch tokens that one layer can remove."""
        return num_patches // 2 if cls.amount == "r" else num_patches - 1

    @classmethod
    def tokens_added(cls, config: Any) -> int:
        """Number of tokens that are left in addition to those that ``keep_rate`` keeps."""
        return 0

    @abstractmethod
    def __call__(self, seen: Observation, r: int) -> Reduction:
        """Choose the tokens to reduce.

        Args:
            seen: the layer's tokens and the data that this reducer needs.
            r: number of tokens to remove from every image.
        """

    def multiply_accumulates(self, num_patches: int, r: int, width: int, heads: int) -> int:
        """Cost of the matrix products that choose the tokens, for one image."""
        return 0


REDUCERS: dict[str, type[Reducer]] = {}
_Class = TypeVar("_Class", bound=type[Reducer])


def register(name: str) -> Callable[[_Class], _Class]:
    """Register a subclass of :class:`Reducer` as a value of the setting ``reduction``.

    Raises:
        ValueError: for a name that another class has, a class without ``stage``, or an unknown
            name in ``needs`` or ``amount``.
    """

    def add(reducer: _Class) -> _Class:
        known = REDUCERS.get(name)
        same = known is not None and (known.__module__, known.__qualname__) == (
            reducer.__module__,
            reducer.__qualname__,
        )
        if name == "none" or (known is not None and not same):
            owner = "no reduction" if known is None else f"{known.__module__}.{known.__qualname__}"
            raise ValueError(f"reduction {name!r} cannot be registered: {owner} has this name")
        if not hasattr(reducer, "stage") and "stage" not in reducer.__annotations__:
            raise ValueError(
                f"{reducer.__qualname__} has no stage: it must be one of "
                f"{', '.join(f'Stage.{stage.name}' for stage in Stage)}"
            )
        unknown = [need for need in reducer.needs if need not in _OBSERVABLE]
        if unknown or reducer.amount not in ("r", "keep_rate"):
            raise ValueError(
                f"{reducer.__qualname__}: needs={reducer.needs!r}, amount={reducer.amount!r} are "
                f"not allowed: needs are among {', '.join(_OBSERVABLE)}, the amount is r or "
                "keep_rate"
            )
        REDUCERS[name] = reducer
        return reducer

    return add


def build_reducer(config: Any) -> Reducer | None:
    """The reducer of a configuration; ``None`` for ``reduction="none"``."""
    return None if config.reduction == "none" else REDUCERS[config.reduction].from_config(config)


def _given(seen: Tensor | None) -> Tensor:
    assert seen is not None
    return seen


def _positive(seen: Tensor | None) -> Tensor:
    seen = _given(seen)
    return seen.clamp(min=torch.finfo(seen.dtype).tiny)


# Reducers are no frozen dataclasses: torch.compile before torch 2.10 cannot create those.
@register("mctf")
@dataclass
class MCTFReducer(Reducer):
    """Multi-criteria Token Fusion (CVPR 2024, arXiv 2403.10030, section 3).

    ``stage`` follows from ``one_step_ahead``, the choice of attention that guides the fusion. The
    paper has the layer's own, one step ahead, reused for the fused tokens (``approximate``) or only
    to rank them (``precise``), and the attention of the finished layer (``past``). ``present``
    fuses tokens between attention and MLP, by the attention just applied.

    ``key_share`` and ``class_share`` are not from the paper. They are the weights, in geometric
    means, of the keys in the similarity and of the class token in the informativeness.
    """

    settings: ClassVar = (
        "tau_sim",
        "tau_info",
        "tau_size",
        "bidirectional",
        "one_step_ahead",
        "pooling",
        "key_share",
        "class_share",
    )

    stage: Stage
    tau_sim: float
    tau_info: float
    tau_size: float
    bidirectional: bool
    pooling: str
    key_share: float = 0.0
    class_share: float = 0.0
    needs: tuple[str, ...] = ("attention_received",)

    @classmethod
    def from_config(cls, config: Any) -> "MCTFReducer":
        stages = {
            "approximate": Stage.REUSE,
            "precise": Stage.RECOMPUTE,
            "present": Stage.AFTER_ATTENTION,
            "past": Stage.AFTER_MLP,
        }
        share = config.class_share
        needs = ["attention_received"] if share < 1 else []
        needs += ["class_attention"] if share > 0 else []
        needs += ["keys"] if config.tau_sim and config.key_share else []
        return cls(
            stage=stages[config.one_step_ahead],
            tau_sim=config.tau_sim,
            tau_info=config.tau_info,
            tau_size=config.tau_size,
            bidirectional=config.bidirectional,
            pooling=config.pooling,
            key_share=config.key_share,
            class_share=share,
            needs=tuple(needs),
        )

    @property
    def pools_linearly(self) -> bool:
        return self.pooling != "max"

    def __call__(self, seen: Observation, r: int) -> Reduction:
        informativeness = self._informativeness(seen)
        scores = attraction(
            seen.tokens,
            informativeness,
            seen.sizes,
            keys=seen.keys,
            key_share=self.key_share,
            num_prefix_tokens=seen.num_prefix_tokens,
            tau_sim=self.tau_sim,
            tau_info=self.tau_info,
            tau_size=self.tau_size,
        )
        reduction = bipartite_soft_matching(
            scores, r, num_prefix_tokens=seen.num_prefix_tokens, bidirectional=self.bidirectional
        )
        if self.pools_linearly:
            reduction.weigh(self._pooling_weights(informativeness, seen.sizes))
        else:
            reduction.maximum = True
        return reduction

    def _informativeness(self, seen: Observation) -> Tensor:
        """Informativeness (b, n), positive because it is a divisor."""
        share = self.class_share
        if not share:
            return _positive(seen.attention_received)
        from_class = _positive(seen.class_attention)
        if share == 1:
            return from_class
        return _positive(seen.attention_received).pow(1 - share) * from_class.pow(share)

    def _pooling_weights(self, informativeness: Tensor, sizes: Tensor | None) -> Tensor:
        """Weight of each token in its pool, before normalisation: (b, n)."""
        if self.pooling == "attention_size":
            return informativeness if sizes is None else informativeness * sizes
        if self.pooling == "size" and sizes is not None:
            return sizes
        return torch.ones_like(informativeness)

    def multiply_accumulates(self, num_patches: int, r: int, width: int, heads: int) -> int:
        if not self.tau_sim:
            return 0
        channels = width * (self.key_share < 1) + width // heads * (self.key_share > 0)
        return _bipartite(num_patches) * channels


@register("tome")
@dataclass
class ToMeReducer(Reducer):
    """Token Merging (ToMe, ICLR 2023, arXiv 2210.09461, section 3).

    After attention, the tokens with the most similar keys are merged in one direction. The result
    is their mean, weighted by size.
    """

    stage: ClassVar = Stage.AFTER_ATTENTION
    needs: ClassVar = ("keys",)

    @classmethod
    def default_layers(cls, num_layers: int) -> Sequence[int]:
        return range(num_layers)

    def __call__(self, seen: Observation, r: int) -> Reduction:
        keys, sizes = _given(seen.keys), seen.sizes
        reduction = bipartite_soft_matching(
            similarity(keys, seen.num_prefix_tokens),
            r,
            num_prefix_tokens=seen.num_prefix_tokens,
            bidirectional=False,
        )
        weights = torch.ones_like(keys[:, :, 0], dtype=torch.float32) if sizes is None else sizes
        reduction.weigh(weights)
        return reduction

    def multiply_accumulates(self, num_patches: int, r: int, width: int, heads: int) -> int:
        return _bipartite(num_patches) * width // heads


@register("pitome")
@dataclass
class PiToMeReducer(Reducer):
    """PiToMe (NeurIPS 2024, arXiv 2405.16148, section 3).

    After attention, tokens are ranked by energy, which is high for tokens with many similar ones.
    The second half of the layers merges the 2r tokens of highest energy in pairs. In the first
    half, as in the authors' code, any token may merge. Means are weighted by size, and sizes do not
    change attention.

    Attributes:
        margin: cosine above which tokens count as similar; over the layers it falls towards 0.
        within_ranking: whether any token may merge.
    """

    stage: ClassVar = Stage.AFTER_ATTENTION
    needs: ClassVar = ("keys",)
    settings: ClassVar = ("margin",)
    biases_attention: ClassVar = False

    margin: float
    within_ranking: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "PiToMeReducer":
        return cls(config.margin)

    def for_layer(self, layer: int, num_layers: int) -> "PiToMeReducer":
        margin = self.margin * (1 - layer / num_layers)
        return PiToMeReducer(margin, within_ranking=2 * layer < num_layers)

    @classmethod
    def default_layers(cls, num_layers: int) -> Sequence[int]:
        return range(num_layers)

    def __call__(self, seen: Observation, r: int) -> Reduction:
        keys, prefix = _given(seen.keys), seen.num_prefix_tokens
        cosines = cosine_similarity(keys[:, prefix:])
        order = energy(cosines, self.margin).argsort(1, descending=True)
        merge = merge_within_ranking if self.within_ranking else pair_highest
        reduction = merge(cosines, order, r, num_prefix_tokens=prefix)
        weights = keys.new_ones(keys.shape[:2], dtype=torch.float32)
        reduction.weigh(weights if seen.sizes is None else seen.sizes)
        return reduction

    def multiply_accumulates(self, num_patches: int, r: int, width: int, heads: int) -> int:
        return num_patches**2 * width // heads


@register("diffrate")
@dataclass
class DiffRateReducer(Reducer):
    """DiffRate (ICCV 2023, arXiv 2305.17997, section 3).

    After attention, the patch tokens with the least attention from the class token are dropped. The
    next ones are merged, each into the most similar token that stays, in a plain mean; the size of
    a merged token counts times its cosine. The new order is by descending attention.

    Attributes:
        dropped: per layer, how many of the r tokens are dropped: a count, or a fraction of r.
    """

    stage: ClassVar = Stage.AFTER_ATTENTION
    needs: ClassVar = ("class_attention",)
    settings: ClassVar = ("dropped",)

    dropped: tuple[int | float, ...]

    @classmethod
    def from_config(cls, config: Any) -> "DiffRateReducer":
        dropped = config.dropped
        if not isinstance(dropped, list):
            dropped = [dropped] * config.num_hidden_layers
        return cls(tuple(dropped))

    def for_layer(self, layer: int, num_layers: int) -> "DiffRateReducer":
        return DiffRateReducer(self.dropped[layer : layer + 1])

    @property
    def drops_tokens(self) -> bool:
        return any(self.dropped)

    def _num_dropped(self, r: int) -> int:
        return min(count_or_fraction(self.dropped[0], r), r)

    @classmethod
    def default_layers(cls, num_layers: int) -> Sequence[int]:
        return range(num_layers)

    @classmethod
    def most(cls, num_patches: int) -> int:
        return num_patches - 1

    def __call__(self, seen: Observation, r: int) -> Reduction:
        return drop_and_merge(
            seen.tokens,
            _given(seen.class_attention),
            r,
            self._num_dropped(r),
            num_prefix_tokens=seen.num_prefix_tokens,
        )

    def multiply_accumulates(self, num_patches: int, r: int, width: int, heads: int) -> int:
        return (r - self._num_dropped(r)) * (num_patches - r) * width


def _bipartite(num_patches: int) -> int:
    """Number of pairs of alpha and beta tokens."""
    return num_patches // 2 * (num_patches - num_patches // 2)


class _KeepRateReducer(Reducer):
    """Base class of methods that keep the patches with the most attention from the class token."""

    stage: ClassVar = Stage.AFTER_ATTENTION
    needs: ClassVar = ("class_attention",)
    amount: ClassVar = "keep_rate"

    @classmethod
    def default_layers(cls, num_layers: int) -> Sequence[int]:
        """The first layers of the last three quarters: the 4th, 7th and 10th of 12."""
        return sorted({num_layers * quarter // 4 for quarter in (1, 2, 3)})


@register("evit")
@dataclass
class EViTReducer(_KeepRateReducer):
    """Token reorganization (EViT, ICLR 2022, arXiv 2202.07800, section 3).

    After attention, the tokens that receive most attention from the class token are kept, in
    descending order. The others are summed, weighted by that attention, into one additional token,
    or dropped. Sizes do not change attention. No gradient flows through the weights.
    """

    settings: ClassVar = ("fuse_token",)
    biases_attention: ClassVar = False

    fuse_token: bool

    @classmethod
    def from_config(cls, config: Any) -> "EViTReducer":
        return cls(config.fuse_token)

    @property
    def drops_tokens(self) -> bool:
        return not self.fuse_token

    @classmethod
    def tokens_added(cls, config: Any) -> int:
        return int(config.fuse_token)

    def __call__(self, seen: Observation, r: int) -> Reduction:
        return keep_most_important(
            _given(seen.class_attention),
            r,
            num_prefix_tokens=seen.num_prefix_tokens,
            fuse_token=self.fuse_token,
        )


@register("token_mergence")
@dataclass
class TokenMergenceReducer(_KeepRateReducer):
    """Token mergence (arXiv 2306.04897).

    After attention, the tokens that receive most attention from the class token are crucial. Each
    other token is merged into the most similar crucial token, in a mean weighted by that attention.
    No token is dropped, and crucial tokens keep their order.
    """

    def __call__(self, seen: Observation, r: int) -> Reduction:
        return merge_into_most_important(
            seen.tokens,
            _given(seen.class_attention),
            r,
            num_prefix_tokens=seen.num_prefix_tokens,
        )

    def multiply_accumulates(self, num_patches: int, r: int, width: int, heads: int) -> int:
        return r * (num_patches - r) * width

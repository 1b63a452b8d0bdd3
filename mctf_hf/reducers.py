"""From one layer's tensors to a reduction.

A reducer is a small immutable value made from a model's configuration. It says at which point of
a layer it acts and, called with that layer's tokens, attention and sizes, returns a
:class:`~.fusion.Reduction`. It holds no state, so one layer may run in many threads at once.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from .fusion import Reduction
from .matching import attraction, bipartite_soft_matching, similarity


class Stage(Enum):
    """The point of a layer at which its tokens are reduced, and what its attention does then."""

    REUSE = "before attention, whose map is fused along with the tokens"
    RECOMPUTE = "before attention, which is then computed among the tokens left"
    AFTER_ATTENTION = "between attention and MLP"
    AFTER_MLP = "after the layer has run in full"


class Signal(Enum):
    """What of a layer's attention tells a reducer about the tokens."""

    ATTENTION_RECEIVED = "attention that each token receives, mean over heads and queries: (b, n)"
    KEYS = "keys, mean over heads: (b, n, d / h)"


@dataclass(frozen=True)
class MCTFReducer:
    """Multi-criteria Token Fusion (CVPR 2024, arXiv 2403.10030, section 3).

    ``stage`` is the paper's choice of attention that informs the fusion: the layer's own, one step
    ahead, reused for the fused tokens (``approximate``) or only to rank them (``precise``), or the
    attention of the layer already done (``past``).
    """

    signal: ClassVar = Signal.ATTENTION_RECEIVED

    stage: Stage
    tau_sim: float
    tau_info: float
    tau_size: float
    bidirectional: bool
    pooling: str

    @classmethod
    def from_config(cls, config: Any) -> "MCTFReducer":
        stages = {
            "approximate": Stage.REUSE,
            "precise": Stage.RECOMPUTE,
            "past": Stage.AFTER_MLP,
        }
        return cls(
            stage=stages[config.one_step_ahead],
            tau_sim=config.tau_sim,
            tau_info=config.tau_info,
            tau_size=config.tau_size,
            bidirectional=config.bidirectional,
            pooling=config.pooling,
        )

    def __call__(
        self,
        tokens: Tensor,
        signal: Tensor,
        sizes: Tensor | None,
        *,
        r: int,
        num_prefix_tokens: int,
    ) -> Reduction:
        """Choose ``r`` tokens to fuse.

        Args:
            tokens: (b, n, d), before any normalisation.
            signal: (b, n), the attention that each token receives.
            sizes: (b, n), how many patches each token stands for; ``None`` if all stand for one.
            r: how many tokens to fuse.
            num_prefix_tokens: how many tokens at the front take no part.
        """
        informativeness = signal.clamp(min=torch.finfo(signal.dtype).tiny)  # a divisor
        scores = attraction(
            tokens,
            informativeness,
            sizes,
            num_prefix_tokens=num_prefix_tokens,
            tau_sim=self.tau_sim,
            tau_info=self.tau_info,
            tau_size=self.tau_size,
        )
        reduction = bipartite_soft_matching(
            scores, r, num_prefix_tokens=num_prefix_tokens, bidirectional=self.bidirectional
        )
        if self.pooling != "max":
            reduction.weigh(self._pooling_weights(informativeness, sizes))
        return reduction

    def _pooling_weights(self, informativeness: Tensor, sizes: Tensor | None) -> Tensor:
        """How much each token counts in its pool, before normalisation: (b, n)."""
        if self.pooling == "attention_size":
            return informativeness if sizes is None else informativeness * sizes
        if self.pooling == "size" and sizes is not None:
            return sizes
        return torch.ones_like(informativeness)


@dataclass(frozen=True)
class ToMeReducer:
    """Token Merging (ToMe, ICLR 2023, arXiv 2210.09461, section 3).

    After attention, the tokens whose keys are most similar are merged, one-directionally, into the
    mean weighted by their sizes.
    """

    signal: ClassVar = Signal.KEYS
    stage: ClassVar = Stage.AFTER_ATTENTION

    @classmethod
    def from_config(cls, config: Any) -> "ToMeReducer":
        return cls()

    def __call__(
        self,
        tokens: Tensor,
        signal: Tensor,
        sizes: Tensor | None,
        *,
        r: int,
        num_prefix_tokens: int,
    ) -> Reduction:
        """Choose ``r`` tokens to merge.

        Args:
            tokens: (b, n, d), of which nothing is asked.
            signal: (b, n, d / h), the mean of the keys of all heads.
            sizes: (b, n), how many patches each token stands for; ``None`` if all stand for one.
            r: how many tokens to merge.
            num_prefix_tokens: how many tokens at the front take no part.
        """
        reduction = bipartite_soft_matching(
            similarity(signal, num_prefix_tokens),
            r,
            num_prefix_tokens=num_prefix_tokens,
            bidirectional=False,
        )
        weights = torch.ones_like(signal[:, :, 0], dtype=torch.float32) if sizes is None else sizes
        reduction.weigh(weights)
        return reduction


Reducer = MCTFReducer | ToMeReducer

_REDUCERS: dict[str, type[Reducer]] = {"mctf": MCTFReducer, "tome": ToMeReducer}


def build_reducer(config: Any) -> Reducer | None:
    """The reducer that a configuration asks for; ``None`` for ``reduction="none"``."""
    return None if config.reduction == "none" else _REDUCERS[config.reduction].from_config(config)

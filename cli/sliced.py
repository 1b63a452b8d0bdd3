"""An upper bound on the speed of fusion: a plain model whose layers cut off tokens for free."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mctf_hf.families import find_encoders
from mctf_hf.fused_encoder import exchange_class, fused_class
from mctf_hf.fused_layer import FusedLayer
from mctf_hf.reducers import Stage


class SlicedLayer(FusedLayer):
    """First base of a layer class: cuts off the last tokens where a method would fuse tokens.

    Attributes:
        left: number of tokens that the layer returns.
        stage: point in the layer at which tokens are cut off.
    """

    left: int
    stage: Stage

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(b, n, d) -> (b, left, d)."""
        if self.stage.ahead:
            hidden_states = hidden_states[:, : self.left]
        output = self.attend(self.norm_attention(hidden_states))
        hidden_states = self.add(hidden_states, output, self.names.after_attention)
        if self.stage is Stage.AFTER_ATTENTION:
            hidden_states = hidden_states[:, : self.left]
        output = self.run_mlp(hidden_states)
        return self.add(hidden_states, output, self.names.after_mlp)[:, : self.left]


def slice_tokens(model: nn.Module, counts: Sequence[int], stage: Stage, num_tokens: int) -> None:
    """Make each layer of a plain model cut off as many tokens as a fusing model's layer fuses.

    Args:
        counts: number of tokens that each layer cuts off.
        stage: point in a layer at which they are cut off.
        num_tokens: number of tokens that enter the first layer.
    """
    (encoder,) = find_encoders(model)
    for layer, count in zip(encoder.layers, counts, strict=True):
        num_tokens -= count
        exchange_class(
            layer, fused_class(SlicedLayer, type(layer), names=encoder.family.layer_names)
        )
        sliced: Any = layer
        sliced.left, sliced.stage = num_tokens, stage

"""What no fusion can beat: a model of transformers whose layers lose tokens for nothing."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mctf_hf.families import find_encoders
from mctf_hf.fused_encoder import exchange_class, fused_class
from mctf_hf.fused_layer import FusedLayer
from mctf_hf.reducers import Stage


class SlicedLayer(FusedLayer):
    """A layer that cuts off its last tokens where a method would fuse some; before one.

    Attributes:
        left: how many tokens leave it.
        stage: when they are cut off.
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
    """Let the layers of a plain model run on as many tokens as those of a model that fuses.

    Args:
        counts: tokens that each layer loses.
        stage: when a layer loses them.
        num_tokens: that enter the first layer.
    """
    (encoder,) = find_encoders(model)
    for layer, count in zip(encoder.layers, counts, strict=True):
        num_tokens -= count
        exchange_class(
            layer, fused_class(SlicedLayer, type(layer), names=encoder.family.layer_names)
        )
        sliced: Any = layer
        sliced.left, sliced.stage = num_tokens, stage

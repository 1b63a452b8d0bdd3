"""T2T-ViT with token fusion (Tokens-to-Token ViT, arXiv 2101.11986).

The front end converts overlapping windows of the image to tokens, in three steps with a small
transformer between them. Everything else is as in :mod:`modeling_mctf_vit`.
"""

from .dependencies import OLDEST as OLDEST  # first, to report releases that are too old

# isort: split

import math
from dataclasses import field
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_mctf import as_pair, number, one_of
from .modeling_mctf_vit import (
    MCTFViTConfig,
    MCTFViTEmbeddings,
    MCTFViTForImageClassification,
    MCTFViTModel,
)

# Prevents division by zero in performers: 1e-8 rounded up to the next float32, because onnxscript
# removes additions of at most 1e-8.
EPSILON = 1.0000001e-8
# Windows of the three steps: side, stride, padding.
WINDOWS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
PATCH = 16  # pixels per side of a token after these steps


@strict
class MCTFT2TViTConfig(MCTFViTConfig):
    """Configuration of a T2T-ViT (arXiv 2101.11986) that fuses tokens.

    All fields of :class:`MCTFViTConfig`, with the defaults of T2T-ViT_t-14, and:

    Args:
        tokens_type: attention of the two token transformers in the front end: ``"transformer"``
            (softmax, one head) or ``"performer"`` (positive random features, arXiv 2009.14794).
        token_dim: channels of the front end.
        attention_scale: channels whose square root divides the layers' scores: those of a head
            (``"head_dim"``) or all (``"hidden_size"``, as in the published weights).
    """

    model_type = "mctf_t2t_vit"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "modeling_mctf_t2t_vit.MCTFT2TViTConfig",
        "AutoModel": "modeling_mctf_t2t_vit.MCTFT2TViTModel",
        "AutoModelForImageClassification": (
            "modeling_mctf_t2t_vit.MCTFT2TViTForImageClassification"
        ),
    }
    plain_types: ClassVar[dict[str, str]] = {}

    hidden_size: int = 384
    num_hidden_layers: int = 14
    num_attention_heads: int = 6
    intermediate_size: int = 1152
    qkv_bias: bool = False
    layer_norm_eps: float = 1e-5
    tokens_type: str = field(
        default="transformer", metadata=one_of("tokens_type", "transformer", "performer")
    )
    token_dim: int = field(default=64, metadata=number("token_dim", 2))
    attention_scale: str = field(
        default="head_dim", metadata=one_of("attention_scale", "head_dim", "hidden_size")
    )

    def validate_stride(self) -> None:
        """Check that the patch size is that of the front end."""
        if as_pair(self.patch_size) != (16, 16):
            raise ValueError(f"patch_size={self.patch_size!r} is not allowed: a T2T-ViT's is 16")


def windows(x: Tensor, side: int, stride: int, padding: int) -> Tensor:
    """Overlapping windows of a map: (b, h, w, c) -> (b, h', w', c * side * side).

    The result is that of ``torch.nn.Unfold``, in the same order, for maps with channels last.
    """
    x = F.pad(x, (0, 0, padding, padding, padding, padding))
    return x.unfold(1, side, stride).unfold(2, side, stride).flatten(3)


class TokenTransformer(nn.Module):
    """A layer whose attention maps tokens of ``dim`` channels to ``width`` channels.

    Its residual connection starts at the values, because the input has other channels.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(dim)
        self.qkv_proj = self._make_projection(dim, width)
        self.o_proj = nn.Linear(width, width)
        self.layernorm_after = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.scaling = dim**-0.5

    def _make_projection(self, dim: int, width: int) -> nn.Module:
        return nn.Linear(dim, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, width)."""
        attended, value = self._attend(self.qkv_proj(self.layernorm_before(x)))
        x = value + self.o_proj(attended)
        return x + self.mlp(self.layernorm_after(x))

    def _attend(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """The attention output and the values: (b, n, 3 * width) -> two of (b, n, width)."""
        query, key, value = (part[:, None] for part in qkv.chunk(3, dim=-1))
        output = F.scaled_dot_product_attention(query, key, value, scale=self.scaling)
        return output[:, 0], value[:, 0]


class TokenPerformer(TokenTransformer):
    """A token transformer with attention in linear time (Performer, arXiv 2009.14794).

    ``softmax(q kᵀ)`` is approximated by positive random features of queries and keys. Queries and
    keys are not scaled. The projection outputs keys, queries and values, in this order.
    """

    def __init__(self, dim: int, width: int):
        super().__init__(dim, width)
        self.features = nn.Parameter(torch.zeros(width // 2, width), requires_grad=False)

    def _make_projection(self, dim: int, width: int) -> nn.Module:
        return nn.Linear(dim, 3 * width)

    def _attend(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        key, query, value = qkv.chunk(3, dim=-1)
        key, query = self._random_features(key), self._random_features(query)  # [b, n, m]
        norm = (query * key.sum(1, keepdim=True)).sum(-1, keepdim=True)  # [b, n, 1]
        output = query @ (key.mT @ value)
        return output / (norm + EPSILON), value

    def _random_features(self, x: Tensor) -> Tensor:
        """``exp(w x - |x|² / 2) / √m``: (b, n, width) -> (b, n, m)."""
        squared = x.square().sum(-1, keepdim=True) / 2
        return torch.exp(x @ self.features.mT - squared) / math.sqrt(len(self.features))


_TOKENS_TYPES = {"transformer": TokenTransformer, "performer": TokenPerformer}


class T2TPatchEmbeddings(nn.Module):
    """Tokens-to-token: windows and a token transformer, twice; then windows and a projection."""

    def __init__(self, config: MCTFT2TViTConfig):
        super().__init__()
        layer, width = _TOKENS_TYPES[config.tokens_type], config.token_dim
        first, second, third = (side**2 for side, _, _ in WINDOWS)
        self.numbers_per_pixel = 3 * width / 16  # of queries, keys and values
        self.token_transformers = nn.ModuleList(
            [layer(config.num_channels * first, width), layer(width * second, width)]
        )
        self.projection = nn.Linear(width * third, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(b, channels, height, width) -> (b, height / 16 * width / 16, d).

        Raises:
            ValueError: for a height or width that is not a multiple of 16.
        """
        height, width = pixel_values.shape[2:]
        if height % PATCH or width % PATCH:
            raise ValueError(
                f"images of {height} x {width} pixels are not allowed: T2T-ViT takes heights and "
                f"widths that are multiples of {PATCH}"
            )
        x = pixel_values.permute(0, 2, 3, 1)
        *before, last = WINDOWS
        for step, transform in zip(before, self.token_transformers, strict=True):
            x = windows(x, *step)  # [b, h, w, c]
            x = transform(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        return self.projection(windows(x, *last).flatten(1, 2))


def sinusoidal_positions(num_positions: int, width: int) -> Tensor:
    """Fixed position embeddings (Attention Is All You Need, section 3.5): (1, positions, width)."""
    channel = torch.arange(width, dtype=torch.float64)
    rate = 10000 ** (-2 * (channel // 2) / width)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * rate
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


class T2TViTEmbeddings(MCTFViTEmbeddings):
    """T2T-ViT's embeddings, whose position embeddings are fixed."""

    def __init__(self, config: MCTFT2TViTConfig, use_mask_token: bool = False):
        super().__init__(config, use_mask_token, T2TPatchEmbeddings(config))
        self.position_embeddings.requires_grad_(False)


class MCTFT2TViTModel(MCTFViTModel):
    """T2T-ViT encoder with token fusion; see :class:`MCTFViTModel`."""

    config: MCTFT2TViTConfig
    config_class = MCTFT2TViTConfig
    _no_split_modules: ClassVar = ["T2TViTEmbeddings", "MCTFViTLayer"]

    def _make_embeddings(self, config: Any, use_mask_token: bool) -> nn.Module:
        return T2TViTEmbeddings(config, use_mask_token)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_fixed(module)


class MCTFT2TViTForImageClassification(MCTFViTForImageClassification):
    """T2T-ViT with token fusion and a linear head on the class token."""

    config: MCTFT2TViTConfig
    config_class = MCTFT2TViTConfig
    _no_split_modules: ClassVar = MCTFT2TViTModel._no_split_modules
    backbone_class: ClassVar[type[MCTFViTModel]] = MCTFT2TViTModel

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_fixed(module)


@torch.no_grad()
def _init_fixed(module: Any) -> None:
    """Initialise the parameters that are never trained: positions and random features."""
    if isinstance(module, T2TViTEmbeddings):
        positions = sinusoidal_positions(*module.position_embeddings.shape[1:])
        init.copy_(module.position_embeddings, positions)
    elif isinstance(module, TokenPerformer):
        features = torch.empty_like(module.features)
        nn.init.orthogonal_(features)
        init.copy_(module.features, features * math.sqrt(len(features)))

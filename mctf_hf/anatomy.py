"""Names that the vision encoders of transformers give to the parts of their layers.

Nearly all layers are the same: ``x += s(attention(norm(x)))``, then ``x += s(mlp(norm(x)))``. They
differ in the names of the parts and in the operations ``s`` on a branch before it is added.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


@dataclass(frozen=True)
class LayerNames:
    """Names of the parts of a pre-norm layer.

    Attributes:
        norm_attention, attention, norm_mlp, mlp: names of submodules.
        after_attention: names of what is applied to the attention output before it is added, in
            order: modules are called, parameters and numbers are multiplied.
        after_mlp: the same for the MLP output.
    """

    norm_attention: str
    attention: str
    norm_mlp: str
    mlp: str
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()


_VIT = ("layernorm_before", "attention", "layernorm_after", "mlp")
VIT = LayerNames(*_VIT, ("dropout",), ("dropout",))
BEIT = LayerNames(*_VIT, ("dropout", "lambda_1", "drop_path"), ("dropout", "lambda_2", "drop_path"))
INTERNVL = LayerNames(*_VIT, ("lambda_1",), ("dropout", "lambda_2"))
DINO = LayerNames(
    "norm1",
    "attention",
    "norm2",
    "mlp",
    ("layer_scale1", "drop_path"),
    ("layer_scale2", "drop_path"),
)
CLIP = LayerNames("layer_norm1", "self_attn", "layer_norm2", "mlp")
AIMV2 = LayerNames("rms_norm1", "attention", "rms_norm2", "ffn")


class AttentionNames(NamedTuple):
    """Names of the parts of a self-attention module; the last five may be missing."""

    query: str
    key: str
    value: str
    scaling: str
    heads: str
    dropout: str | None = None
    output: str | None = None
    output_dropout: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None


# Names in the classes of transformers, including releases before 5.18.
_SPELLINGS = {
    "query": ("q_proj", "query"),
    "key": ("k_proj", "key"),
    "value": ("v_proj", "value"),
    "scaling": ("scaling", "scale"),
    "heads": ("num_attention_heads", "num_heads"),
    "dropout": ("attention_dropout", "dropout_prob", "dropout"),
    "output": ("o_proj", "out_proj", "projection_layer"),
    "output_dropout": ("projection_dropout",),
    "query_norm": ("q_norm",),
    "key_norm": ("k_norm",),
}


def attention_names(attention: nn.Module) -> AttentionNames:
    """Find the names of the parts of a self-attention module.

    Raises:
        ValueError: if a part is not found; the message names the first one.
    """
    found: dict[str, Any] = {}
    for part, spellings in _SPELLINGS.items():
        name = next((name for name in spellings if hasattr(attention, name)), None)
        if name is None and part not in AttentionNames._field_defaults:
            raise ValueError(
                f"{type(attention).__name__} has no {part} that is understood: it is called "
                f"{' or '.join(spellings)} in the encoders that are"
            )
        found[part] = name
    return AttentionNames(**found)


def attention_core(attention: nn.Module) -> nn.Module:
    """The module that computes queries and keys: ``attention`` or its submodule ``attention``.

    Before transformers 5.18, the output projection of DINOv2 is outside of this submodule.
    """
    inner = getattr(attention, "attention", None)
    return inner if isinstance(inner, nn.Module) else attention


def check_layer(layer: nn.Module, names: LayerNames) -> None:
    """Raise ValueError if a layer lacks one of the named parts; the message names the part."""
    for part in (names.norm_attention, names.attention, names.norm_mlp, names.mlp):
        if not isinstance(getattr(layer, part, None), nn.Module):
            raise ValueError(
                f"{type(layer).__name__} has no {part}, by which its family is known: a release of "
                "transformers that writes it otherwise is not supported"
            )
    attention_names(attention_core(getattr(layer, names.attention)))

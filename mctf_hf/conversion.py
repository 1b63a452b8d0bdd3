"""Checkpoints of other libraries, renamed to this one's weights."""

import re
from collections.abc import Callable, Mapping

from torch import Tensor

# timm's names, which the official MCTF code shares: (pattern, replacement); a pattern that ends in
# "qkv" stands for one weight that becomes three.
_TIMM = (
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.norm1\.", r"vit.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"vit.layers.\1.attention.{}_proj."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vit.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.norm2\.", r"vit.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.mlp\.(fc[12])\.", r"vit.layers.\1.mlp.\2."),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
)


def _convert_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted = {}
    unknown = []
    for name, tensor in state_dict.items():
        for pattern, replacement in _TIMM:
            renamed, hits = re.subn(pattern, replacement, name)
            if hits:
                break
        else:
            unknown.append(name)
            continue
        if "{}" in renamed:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                converted[renamed.format(part)] = piece.clone()
        else:
            converted[renamed] = tensor
    if unknown:
        raise ValueError(f"the state dict has keys that source='timm' does not know: {unknown}")
    return converted


_SOURCES: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {"timm": _convert_timm}


def convert_state_dict(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename a checkpoint's weights to those of ``MCTFViTForImageClassification``.

    Args:
        state_dict: weights by name.
        source: whose names they are: ``"timm"``, for timm's ViT and DeiT and for the official MCTF
            code (github.com/mlvlab/MCTF), which names them alike.

    Returns:
        The weights by their new names; timm's joint ``qkv`` split into three.

    Raises:
        ValueError: for an unknown source, or keys that it does not have; they are all listed.
    """
    if source not in _SOURCES:
        raise ValueError(f"source={source!r} is not allowed: it is one of {', '.join(_SOURCES)}")
    return _SOURCES[source](state_dict)

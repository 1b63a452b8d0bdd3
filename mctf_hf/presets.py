"""Well-known models by name, with random weights."""

from dataclasses import fields
from typing import Any

from .registry import BACKBONES

# Width, heads, layers, MLP's width over the channels.
# DeiT (arXiv 2012.12877, table 1).
_DEIT = {"deit_t": (192, 3, 12, 4), "deit_s": (384, 6, 12, 4), "deit_b": (768, 12, 12, 4)}
# T2T-ViT (arXiv 2101.11986, table 1 and the authors' code), with performers in the front end; the
# names with a second t have transformers there.
_T2T_PERFORMER = {
    "t2t_vit_7": (256, 4, 7, 2),
    "t2t_vit_10": (256, 4, 10, 2),
    "t2t_vit_12": (256, 4, 12, 2),
    "t2t_vit_14": (384, 6, 14, 3),
    "t2t_vit_19": (448, 7, 19, 3),
    "t2t_vit_24": (512, 8, 24, 3),
}
_T2T_TRANSFORMER = {f"t2t_vit_t_{size}": _T2T_PERFORMER[f"t2t_vit_{size}"] for size in (14, 19, 24)}
# LV-ViT (arXiv 2104.10858, table 1 and the authors' code).
_LV = {
    "lv_vit_t": (240, 4, 12, 3),
    "lv_vit_s": (384, 6, 16, 3),
    "lv_vit_m": (512, 8, 20, 3),
    "lv_vit_l": (768, 12, 24, 3),
}
# DINOv2 (arXiv 2304.07193, table 17), CLIP (arXiv 2103.00020, table 20), SigLIP (arXiv 2303.15343)
# and DINOv3 (arXiv 2508.10104): Vision Transformers of the usual sizes (arXiv 2010.11929, table 1).
_S, _B, _L = (384, 6, 12, 4), (768, 12, 12, 4), (1024, 16, 24, 4)
_DINOV2 = {"dinov2_s": _S, "dinov2_b": _B, "dinov2_l": _L}
# Backbone, the sizes of its models, and what all of these have in common.
_FAMILIES: tuple[tuple[str, dict[str, tuple[int, int, int, int]], dict[str, Any]], ...] = (
    ("mctf_vit", _DEIT, {"layer_norm_eps": 1e-6}),
    (
        "mctf_vit",
        {f"{name}_distilled": size for name, size in _DEIT.items()},
        {"layer_norm_eps": 1e-6, "distillation_token": True, "distillation_head": True},
    ),
    ("mctf_t2t_vit", _T2T_PERFORMER, {"tokens_type": "performer"}),
    ("mctf_t2t_vit", _T2T_TRANSFORMER, {"tokens_type": "transformer"}),
    ("mctf_lv_vit", _LV, {}),
    ("mctf_dinov2", _DINOV2, {"patch_size": 14}),
    (
        "mctf_dinov2_with_registers",
        {f"{name}_reg": size for name, size in _DINOV2.items()},
        {"patch_size": 14, "num_register_tokens": 4},
    ),
    ("mctf_clip_vision", {"clip_b_32": _B, "clip_b_16": _B, "clip_l_14": _L}, {}),
    ("mctf_siglip_vision", {"siglip_b_16": _B, "siglip_l_16": _L}, {"patch_size": 16}),
    (
        "mctf_dinov3_vit",
        {"dinov3_s": _S, "dinov3_b": _B, "dinov3_l": _L},
        {"patch_size": 16, "num_register_tokens": 4},
    ),
)
# What a few have of their own.
_OWN: dict[str, dict[str, Any]] = {
    "lv_vit_t": {"skip_lambda": 1.0},
    "lv_vit_l": {"skip_lambda": 3.0, "stem_channels": 128},
    "clip_b_32": {"patch_size": 32, "projection_dim": 512},
    "clip_b_16": {"patch_size": 16, "projection_dim": 512},
    "clip_l_14": {"patch_size": 14, "projection_dim": 768},
}

PRESETS = tuple(name for _, sizes, _ in _FAMILIES for name in sizes)


def preset(name: str, **settings: Any) -> Any:
    """Configuration of a model for images of 224 x 224 pixels.

    Those of DeiT, T2T-ViT and LV-ViT are for the 1,000 classes of ImageNet-1k; the others are
    encoders.

    Args:
        name: one of ``PRESETS``.
        settings: fields of the configuration, such as ``r``, that replace the preset's.

    Raises:
        ValueError: for an unknown name.
    """
    model_type, size, common = _find(name)
    width, heads, layers, ratio = size
    config_class = BACKBONES[model_type].config
    chosen: dict[str, Any] = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "image_size": 224,
    }
    if "intermediate_size" in {one.name for one in fields(config_class)}:
        chosen["intermediate_size"] = ratio * width
    else:
        chosen["mlp_ratio"] = ratio
    if BACKBONES[model_type].classifies:
        chosen["num_labels"] = 1000
    return config_class(**chosen | common | _OWN.get(name, {}) | settings)


def preset_class(name: str) -> type[Any]:
    """The class of a preset: a classifier, or an encoder, with its projection if it has one."""
    entry = BACKBONES[_find(name)[0]]
    if entry.classifies:
        return entry.classifier
    return entry.further[0] if entry.further else entry.model


def _find(name: str) -> tuple[str, tuple[int, int, int, int], dict[str, Any]]:
    for model_type, sizes, common in _FAMILIES:
        if name in sizes:
            return model_type, sizes[name], common
    raise ValueError(f"preset {name!r} is not known: it is one of {', '.join(PRESETS)}")

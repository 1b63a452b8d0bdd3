"""Well-known models by name, with random weights."""

from typing import Any

from .modeling_mctf_lv_vit import MCTFLVViTConfig
from .modeling_mctf_t2t_vit import MCTFT2TViTConfig
from .modeling_mctf_vit import MCTFViTConfig

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
# Configuration, the sizes of its models, and what all of these have in common.
_FAMILIES: tuple[
    tuple[type[MCTFViTConfig], dict[str, tuple[int, int, int, int]], dict[str, Any]], ...
] = (
    (MCTFViTConfig, _DEIT, {"layer_norm_eps": 1e-6}),
    (
        MCTFViTConfig,
        {f"{name}_distilled": size for name, size in _DEIT.items()},
        {"layer_norm_eps": 1e-6, "distillation_token": True, "distillation_head": True},
    ),
    (MCTFT2TViTConfig, _T2T_PERFORMER, {"tokens_type": "performer"}),
    (MCTFT2TViTConfig, _T2T_TRANSFORMER, {"tokens_type": "transformer"}),
    (MCTFLVViTConfig, _LV, {}),
)
# What a few have of their own.
_OWN: dict[str, dict[str, Any]] = {
    "lv_vit_t": {"skip_lambda": 1.0},
    "lv_vit_l": {"skip_lambda": 3.0, "stem_channels": 128},
}

PRESETS = tuple(name for _, sizes, _ in _FAMILIES for name in sizes)


def preset(name: str, **settings: Any) -> MCTFViTConfig:
    """Configuration of a model for ImageNet-1k: 224 x 224 pixels, patches of 16, 1,000 classes.

    Args:
        name: one of ``PRESETS``.
        settings: fields of the configuration, such as ``r``, that replace the preset's.

    Raises:
        ValueError: for an unknown name.
    """
    for config_class, sizes, common in _FAMILIES:
        if name in sizes:
            width, heads, layers, ratio = sizes[name]
            fields: dict[str, Any] = {
                "hidden_size": width,
                "num_attention_heads": heads,
                "num_hidden_layers": layers,
                "intermediate_size": ratio * width,
                "num_labels": 1000,
            }
            return config_class(**fields | common | _OWN.get(name, {}) | settings)
    raise ValueError(f"preset {name!r} is not known: it is one of {', '.join(PRESETS)}")

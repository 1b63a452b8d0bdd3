"""Well-known models by name, with random weights."""

from typing import Any

from .configuration_mctf import MCTFViTConfig

# Width, heads, layers of DeiT (arXiv 2012.12877, table 1).
_DEIT = {"deit_t": (192, 3, 12), "deit_s": (384, 6, 12), "deit_b": (768, 12, 12)}

PRESETS = tuple(_DEIT)


def preset(name: str, **settings: Any) -> MCTFViTConfig:
    """Configuration of a model for ImageNet-1k: 224 x 224 pixels, patches of 16, 1,000 classes.

    Args:
        name: one of ``PRESETS``.
        settings: fields of the configuration, such as ``r``, that replace the preset's.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _DEIT:
        raise ValueError(f"preset {name!r} is not known: it is one of {', '.join(PRESETS)}")
    width, heads, layers = _DEIT[name]
    fields: dict[str, Any] = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * width,
        "num_labels": 1000,
        "layer_norm_eps": 1e-6,
    }
    return MCTFViTConfig(**fields | settings)

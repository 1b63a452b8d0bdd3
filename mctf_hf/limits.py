"""Limits of a model's settings, so that a wrong value cannot fill the memory.

The limits are far above the largest existing model, with 22 billion weights, 48 layers and 6,144
channels (arXiv 2302.05442).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers.activations import ACT2FN

WIDTH, PIXELS, LABELS = 65_536, 65_536, 1_000_000
# Largest number of tokens, and so of positions, of an image.
TOKENS = 1_048_576
# Smallest and largest value of each setting; for several numbers, of each number.
LIMITS: dict[str, tuple[float, float]] = {
    "num_hidden_layers": (1, 1_000),
    "hidden_size": (1, WIDTH),
    "intermediate_size": (1, 4 * WIDTH),
    "mlp_ratio": (1, 64),
    "num_attention_heads": (1, WIDTH),
    "num_labels": (0, LABELS),
    "num_channels": (1, 10_000),
    "num_register_tokens": (0, 10_000),
    "image_size": (1, PIXELS),
    "input_size": (1, PIXELS),
    "patch_size": (1, 4_096),
    "multi_scale": (2, 4_096),
    "encoder_stride": (1, PIXELS),
    "pooler_output_size": (1, WIDTH),
    "projection_dim": (1, WIDTH),
    "token_dim": (2, WIDTH),
    "stem_channels": (1, WIDTH),
    "chunk_size_feed_forward": (0, TOKENS),
    "layer_norm_eps": (1e-30, 1),
    "hidden_dropout_prob": (0, 1),
    "attention_probs_dropout_prob": (0, 1),
    "attention_dropout": (0, 1),
    "drop_path_rate": (0, 1),
    "initializer_range": (0, 1e6),
    "initializer_factor": (0, 1e6),
    "layerscale_value": (-1e6, 1e6),
    "rope_theta": (1e-6, 1e12),
    "pos_embed_shift": (0, 1e6),
    "pos_embed_jitter": (1, 1e6),
    "pos_embed_rescale": (1, 1e6),
    "skip_lambda": (1e-6, 1e6),
    "auxiliary_weight": (0, 1e6),
    "tau_sim": (0, 1e6),
    "tau_info": (0, 1e6),
    "tau_size": (0, 1e6),
}
PAIRS = ("image_size", "input_size", "patch_size")
ACTIVATIONS = ("hidden_act", "pooler_act")


def check_setting(name: str, value: Any) -> None:
    """Check a single setting, if it has limits.

    Raises:
        ValueError: for a number outside of its limits, a size that is not one or two numbers, class
            names that are not numbered from 0, or an unknown activation or dtype.
    """
    if name == "id2label" and value is not None:
        _check_labels(value)
    elif name == "num_labels" and (not isinstance(value, int) or isinstance(value, bool)):
        raise ValueError(f"num_labels={value!r} is not allowed: it must be a whole number")
    elif name in ACTIVATIONS and value not in ACT2FN:
        raise ValueError(f"{name}={value!r} is not allowed: it must be one of {', '.join(ACT2FN)}")
    elif name == "dtype" and value is not None:
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(
                f"dtype={value!r} is not allowed: it must be float32, bfloat16, float16 or float64"
            )
    elif name == "_attn_implementation":
        for part in value.values() if isinstance(value, Mapping) else [value]:
            if not (part is None or isinstance(part, str)):
                raise ValueError(f"attn_implementation={value!r} is not allowed: it must be a name")
    elif name == "quantization_config" and isinstance(value, (int, float, str, list)):
        raise ValueError(f"{name}={value!r} is not allowed: it must be settings by name")
    elif name in LIMITS:
        _check_numbers(name, value)


def _check_numbers(name: str, value: Any) -> None:
    several = isinstance(value, (list, tuple))
    if several and name in PAIRS and len(value) != 2:
        raise ValueError(
            f"{name}={value!r} is not allowed: it must be one number, or a height and a width"
        )
    least, most = LIMITS[name]
    for number in value if several else [value]:
        if isinstance(number, (int, float)) and not least <= number <= most:
            raise ValueError(
                f"{name}={value!r} is not allowed: it must be at least {least:,} and at most "
                f"{most:,}"
            )


def _check_labels(names: Mapping[Any, Any]) -> None:
    if len(names) > LABELS:
        raise ValueError(f"id2label names {len(names):,} classes: it names at most {LABELS:,}")
    numbers = {str(number) for number in names}
    missing = next((i for i in range(len(names)) if str(i) not in numbers), None)
    if missing is not None:
        raise ValueError(
            f"id2label names {len(names)} classes and none of the number {missing}: they are "
            "numbered from 0 on, without gaps"
        )


def check_extent(config: Any, grid: tuple[int, int]) -> None:
    """Check sizes of a model that depend on each other.

    Args:
        grid: rows and columns of patches.

    Raises:
        ValueError: for patches larger than the image, too many patches, or channels that the number
            of heads does not divide.
    """
    sizes = f"image_size={config.image_size!r} with patch_size={config.patch_size!r}"
    if not 1 <= math.prod(grid) <= TOKENS:
        raise ValueError(
            f"{sizes} is not allowed: it makes {math.prod(grid):,} patches, where there is at "
            f"least one and are at most {TOKENS:,}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size!r} is not allowed with num_attention_heads="
            f"{config.num_attention_heads!r}, which do not divide it"
        )

"""Conversion of other libraries' weights: new names, and configurations from their shapes."""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_weights
from .loading import complain
from .modeling_mctf_vit import MCTFViTConfig, MCTFViTForImageClassification
from .registry import build
from .sources import EMBEDDINGS, ours, refuse, table_of, theirs

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Weights whose shapes determine the architecture of the layers, and their numbers of axes.
_POSITIONS = f"{EMBEDDINGS}.position_embeddings"
_MLP = "vit.layers.0.mlp.fc1.weight"
_HEAD = "classifier.weight"
_TELLING = {_POSITIONS: 3, _MLP: 2, _HEAD: 2}


def convert_state_dict(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename a checkpoint's weights to those of ``MCTFViTForImageClassification``.

    Args:
        state_dict: weights by name.
        source: origin of the names: ``"timm"`` for timm's ViT and DeiT, ``"mctf"`` for the
            official MCTF code (github.com/mlvlab/MCTF), which uses the same names,
            ``"deit_distilled"``, ``"t2t_vit"`` (github.com/yitu-opensource/T2T-ViT) or
            ``"lv_vit"`` (github.com/zihangJiang/TokenLabeling).

    Returns:
        The weights by their new names, with each joint ``qkv`` split into three.

    Raises:
        ValueError: if the source or keys are unknown (all keys are listed), or a weight cannot be
            split.
    """
    table = table_of(source, state_dict)
    converted, unknown = {}, []
    for name, tensor in state_dict.items():
        new_names = ours(name, table)
        if not new_names:
            unknown.append(name)
        elif len(new_names) == 1:
            converted[new_names[0]] = tensor
        elif not tensor.ndim or len(tensor) % len(new_names):
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} of shape {shape} cannot be split into {len(new_names)}")
        else:
            pieces = tensor.chunk(len(new_names))
            converted |= {new: piece.clone() for new, piece in zip(new_names, pieces, strict=True)}
    if unknown:
        refuse(unknown, table)
        raise ValueError(f"the state dict has keys that source={source!r} does not know: {unknown}")
    return converted


def infer_config(
    state_dict: Mapping[str, Tensor], source: str, num_heads: int | None = None, **settings: Any
) -> MCTFViTConfig:
    """Infer the configuration from the shapes of a checkpoint's weights.

    Assumes square images, GELU activations and the source's own ``layer_norm_eps``.

    Args:
        state_dict: weights by their original names.
        source: see :func:`convert_state_dict`.
        num_heads: number of attention heads, which no shape shows. If unset, each head has 64
            channels, as in all ViT and DeiT with up to 1,024 channels.
        settings: further fields of the configuration, such as ``r``.

    Raises:
        ValueError: if the source is unknown, the architecture is another one, weights are missing
            or misshapen, or ``num_heads`` is needed or does not divide the channels.
        huggingface_hub.errors.StrictDataclassError: if settings are not allowed.
    """
    table = table_of(source, state_dict)
    refuse(state_dict, table)
    shapes = {
        new: tuple(state_dict[name].shape) for name in state_dict for new in ours(name, table)
    }
    telling = {**_TELLING, **table.telling}
    lacking = [name for name, axes in telling.items() if len(shapes.get(name, ())) != axes]
    if lacking:
        complain(
            unknown=[name for name in state_dict if not ours(name, table)],
            missing_or_misshapen=[theirs(name, table) for name in lacking],
        )
    positions, hidden_size = shapes[_POSITIONS][1:]
    own = table.infer(shapes)
    prefix = 1 + own.get("distillation_token", False)
    grid = _grid(positions, prefix, theirs(_POSITIONS, table))
    layers = {match[1] for name in shapes if (match := re.match(r"vit\.layers\.(\d+)\.", name))}
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "image_size": grid * own["patch_size"],
        "num_hidden_layers": len(layers),
        "intermediate_size": shapes[_MLP][0],
        "num_attention_heads": _num_heads(hidden_size, num_heads),
        "qkv_bias": "vit.layers.0.attention.q_proj.bias" in shapes,
        "num_labels": shapes[_HEAD][0],
        "layer_norm_eps": table.layer_norm_eps,
    }
    return table.config_class(**fields | own | settings)


def _grid(positions: int, prefix: int, name: str) -> int:
    """Number of patches along one edge of the image."""
    grid = math.isqrt(max(positions - prefix, 0))
    if grid and grid**2 == positions - prefix:
        return grid
    if math.isqrt(positions) ** 2 == positions:
        raise ValueError(f"{name} has no position for the class token, which is not supported")
    raise ValueError(
        f"{name} has {positions} positions: those beside the class token's make no square"
    )


def _num_heads(hidden_size: int, num_heads: int | None) -> int:
    if num_heads is None:
        if hidden_size % 64 or hidden_size > 1024:
            raise ValueError(
                f"num_heads is not set, and {hidden_size} channels do not determine it: set it "
                "to the number of attention heads"
            )
        return hidden_size // 64
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"num_heads={num_heads!r} is not allowed: it must divide the {hidden_size} channels"
        )
    return num_heads


def build_model(
    state_dict: Mapping[str, Tensor], source: str, config: MCTFViTConfig
) -> MCTFViTForImageClassification:
    """Build a classifier with a checkpoint's weights, in their highest precision.

    Args:
        state_dict: weights by their original names.
        source: see :func:`convert_state_dict`.
        config: see :func:`infer_config`.

    Raises:
        ValueError: if weights are unknown, missing, not finite, or of a wrong shape or type; the
            message lists all that do not fit.
    """
    table = table_of(source, state_dict)
    refuse(state_dict, table)
    with torch.device("meta"):
        model = build(config)
    shapes: dict[str, list[int]] = {}
    counts: set[str] = set()  # names of BatchNorms' counts of batches
    for name, weight in model.state_dict().items():
        their_name = theirs(name, table)
        if not weight.ndim:
            shapes[their_name] = []
            counts.add(their_name)
            continue
        joined = shapes.get(their_name, [0])[0]
        shapes[their_name] = [joined + weight.shape[0], *weight.shape[1:]]
    complain(
        unknown=[name for name in state_dict if name not in shapes],
        missing=[name for name in shapes if name not in state_dict],
        misshapen=[
            f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, "
            f"not {shapes[name]}"
            for name, tensor in state_dict.items()
            if name in shapes and not _fits(tensor, shapes[name], counts=name in counts)
        ],
    )
    check_weights(state_dict, "the checkpoint")
    dtypes = {w.dtype for w in state_dict.values() if w.is_floating_point()}
    dtype = functools.reduce(torch.promote_types, dtypes)
    model.to_empty(device="cpu")
    nn.Module.to(model, dtype)
    model.load_state_dict(convert_state_dict(state_dict, source))
    return model.eval()


def _fits(tensor: Tensor, shape: list[int], *, counts: bool) -> bool:
    dtypes = (torch.int64,) if counts else _DTYPES
    plain = tensor.dtype in dtypes and tensor.layout == torch.strided
    return plain and list(tensor.shape) == shape

"""Weights of other libraries: renamed, and understood from their shapes."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig
from transformers.utils import logging

from .checkpoints import UNREADABLE, reading
from .configuration_mctf import MCTFViTConfig
from .modeling_mctf_vit import MCTFViTForImageClassification

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PART = "(?P<part>weight|bias)"


@dataclass(frozen=True)
class Source:
    """How other code names its weights.

    Attributes:
        names: (their name, ours); ``{layer}`` is a number, ``{part}`` weight or bias. A name of
            theirs in several rows is one tensor that becomes several, cut along its first axis.
        refused: (pattern of their names, what such a name tells of the model), for models that are
            known not to be ours.
        layer_norm_eps: what their LayerNorms add to the variance, which no weight tells.
    """

    names: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]
    layer_norm_eps: float


_TIMM = Source(
    names=(
        ("cls_token", "vit.embeddings.cls_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"),
        ("patch_embed.proj.{part}", "vit.embeddings.patch_embeddings.projection.{part}"),
        ("blocks.{layer}.norm1.{part}", "vit.layers.{layer}.layernorm_before.{part}"),
        ("blocks.{layer}.attn.qkv.{part}", "vit.layers.{layer}.attention.q_proj.{part}"),
        ("blocks.{layer}.attn.qkv.{part}", "vit.layers.{layer}.attention.k_proj.{part}"),
        ("blocks.{layer}.attn.qkv.{part}", "vit.layers.{layer}.attention.v_proj.{part}"),
        ("blocks.{layer}.attn.proj.{part}", "vit.layers.{layer}.attention.o_proj.{part}"),
        ("blocks.{layer}.norm2.{part}", "vit.layers.{layer}.layernorm_after.{part}"),
        ("blocks.{layer}.mlp.fc1.{part}", "vit.layers.{layer}.mlp.fc1.{part}"),
        ("blocks.{layer}.mlp.fc2.{part}", "vit.layers.{layer}.mlp.fc2.{part}"),
        ("norm.{part}", "vit.layernorm.{part}"),
        ("head.{part}", "classifier.{part}"),
    ),
    refused=(
        (r"dist_token|head_dist\..+", "a distilled DeiT, not supported yet"),
        (r"tokens_to_token\..+", "a T2T-ViT, not supported yet"),
        (r"aux_head\..+|patch_embed\.(conv|bn)\d\..+", "an LV-ViT, not supported yet"),
        (r"pre_logits\..+", "a hidden layer before the head"),
        (r"fc_norm\..+", "a head on the mean of the tokens"),
        (r"attn_pool\..+", "a head on tokens pooled by attention"),
        (r"reg_token", "register tokens"),
        (r"norm_pre\..+", "a LayerNorm before the first layer"),
        (r"blocks\.\d+\.(ls\d\.gamma|gamma_\d)", "LayerScale"),
        (r"blocks\.\d+\.attn\.([qk]_norm|norm)\..+", "LayerNorms within the attention"),
        (r"blocks\.\d+\.mlp\.(w\d+|fc1_[gx]|norm)\..+", "a gated MLP"),
        (r".*(rel_pos|relative_position|rope).*|.+\.[qv]_bias", "relative positions"),
        (r"patch_embed\.(backbone|norm)\..+", "another patch embedding"),
        (
            r"(vit|embeddings|encoder|layers|layernorm|pooler|classifier)\..+",
            "names of transformers: convert the folder that holds its config.json",
        ),
    ),
    layer_norm_eps=1e-6,
)

# A further library is a further row here.
SOURCES: dict[str, Source] = {"timm": _TIMM, "mctf": _TIMM}

# The weights that tell the architecture, and how many axes they have.
_PATCHES = "vit.embeddings.patch_embeddings.projection.weight"
_POSITIONS = "vit.embeddings.position_embeddings"
_MLP = "vit.layers.0.mlp.fc1.weight"
_HEAD = "classifier.weight"
_TELLING = {_PATCHES: 4, _POSITIONS: 3, _MLP: 2, _HEAD: 2}


def convert_state_dict(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename a checkpoint's weights to those of ``MCTFViTForImageClassification``.

    Args:
        state_dict: weights by name.
        source: whose names they are: ``"timm"`` for timm's ViT and DeiT, ``"mctf"`` for the
            official MCTF code (github.com/mlvlab/MCTF), which names them alike.

    Returns:
        The weights by their new names; timm's joint ``qkv`` split into three.

    Raises:
        ValueError: for an unknown source, or keys that it does not have; they are all listed.
    """
    table = _table(source)
    converted, unknown = {}, []
    for name, tensor in state_dict.items():
        ours = _translate(name, table.names)
        if not ours:
            unknown.append(name)
        elif len(ours) == 1:
            converted[ours[0]] = tensor
        elif not tensor.ndim or len(tensor) % len(ours):
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} of shape {shape} cannot be split into {len(ours)}")
        else:
            pieces = tensor.chunk(len(ours))
            converted |= {new: piece.clone() for new, piece in zip(ours, pieces, strict=True)}
    if unknown:
        _refuse(unknown, table)
        raise ValueError(f"the state dict has keys that source={source!r} does not know: {unknown}")
    return converted


def infer_config(
    state_dict: Mapping[str, Tensor], source: str, num_heads: int | None = None, **settings: Any
) -> MCTFViTConfig:
    """The configuration that a checkpoint's weights have the shapes of.

    Images are square; activations are GELU; ``layer_norm_eps`` is the source's own.

    Args:
        state_dict: weights by their own names.
        source: see :func:`convert_state_dict`.
        num_heads: attention heads, which no shape tells. Unset: 64 channels each, as in all ViT
            and DeiT of up to 1,024 channels.
        settings: further fields of the configuration, such as ``r``.

    Raises:
        ValueError: for an unknown source, another architecture, weights that tell too little, or
            if ``num_heads`` is needed, or does not divide the channels.
        huggingface_hub.errors.StrictDataclassError: for settings that are not allowed.
    """
    table = _table(source)
    _refuse(state_dict, table)
    shapes = {new: state_dict[name].shape for name in state_dict for new in _ours(name, table)}
    lacking = [name for name, axes in _TELLING.items() if len(shapes.get(name, ())) != axes]
    if lacking:
        _complain(
            unknown=[name for name in state_dict if not _ours(name, table)],
            missing_or_misshapen=[_theirs(name, table) for name in lacking],
        )
    hidden_size, channels, patch_size, patch_width = shapes[_PATCHES]
    if patch_size != patch_width:
        raise ValueError(f"patches of {patch_size} x {patch_width} pixels are not supported")
    grid = _grid(shapes[_POSITIONS][1], _theirs(_POSITIONS, table))
    layers = {match[1] for name in shapes if (match := re.match(r"vit\.layers\.(\d+)\.", name))}
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": grid * patch_size,
        "num_hidden_layers": len(layers),
        "intermediate_size": shapes[_MLP][0],
        "num_attention_heads": _num_heads(hidden_size, num_heads),
        "qkv_bias": "vit.layers.0.attention.q_proj.bias" in shapes,
        "num_labels": shapes[_HEAD][0],
        "layer_norm_eps": table.layer_norm_eps,
    }
    return MCTFViTConfig(**fields | settings)


def _grid(positions: int, name: str) -> int:
    """Patches along one edge of the image."""
    grid = math.isqrt(max(positions - 1, 0))
    if grid and grid**2 == positions - 1:
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
                f"num_heads is not set, and {hidden_size} channels do not tell it: set it to the "
                "number of attention heads"
            )
        return hidden_size // 64
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"num_heads={num_heads!r} is not allowed: it divides the {hidden_size} channels"
        )
    return num_heads


def build_model(
    state_dict: Mapping[str, Tensor], source: str, config: MCTFViTConfig
) -> MCTFViTForImageClassification:
    """A classifier with a checkpoint's weights, in their precision (the highest, if several).

    Args:
        state_dict: weights by their own names.
        source: see :func:`convert_state_dict`.
        config: see :func:`infer_config`.

    Raises:
        ValueError: unless the weights are exactly those of the model; all that are unknown, missing
            or of another shape or type are listed.
    """
    table = _table(source)
    _refuse(state_dict, table)
    with torch.device("meta"):
        model = MCTFViTForImageClassification(config)
    shapes: dict[str, list[int]] = {}
    for name, weight in model.state_dict().items():
        theirs = _theirs(name, table)
        joined = shapes.get(theirs, [0])[0]
        shapes[theirs] = [joined + weight.shape[0], *weight.shape[1:]]
    _complain(
        unknown=[name for name in state_dict if name not in shapes],
        missing=[name for name in shapes if name not in state_dict],
        misshapen=[
            f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, "
            f"not {shapes[name]}"
            for name, tensor in state_dict.items()
            if name in shapes and not _fits(tensor, shapes[name])
        ],
    )
    dtype = functools.reduce(torch.promote_types, {w.dtype for w in state_dict.values()})
    model.to_empty(device="cpu")
    nn.Module.to(model, dtype)
    model.load_state_dict(convert_state_dict(state_dict, source))
    return model.eval()


def _fits(tensor: Tensor, shape: list[int]) -> bool:
    plain = tensor.dtype in _DTYPES and tensor.layout == torch.strided
    return plain and list(tensor.shape) == shape


def load_pretrained(name: str, **settings: Any) -> MCTFViTForImageClassification:
    """A classifier from a folder of transformers or of this library, with all of its weights.

    Args:
        name: local folder, or id on the Hub.
        settings: fields of the configuration, such as ``r``, that replace the checkpoint's.

    Raises:
        OSError: if there is no such model.
        ValueError: for another architecture, files that cannot be read, or unless the weights are
            exactly those of the model; all that are unknown, missing or misshapen are listed.
    """
    stored, _ = ViTConfig.get_config_dict(name)
    if "model_type" not in stored:
        raise ValueError(
            f"{name} holds no model of transformers, for its config.json has no model_type: if it "
            "is timm's, convert the model.safetensors that lies there"
        )
    MCTFViTConfig.from_pretrained(name, **settings)  # says what it has to say of another model
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # all that loading reports is reported below
    try:
        with reading(name, UNREADABLE):
            model, report = MCTFViTForImageClassification.from_pretrained(
                name, **settings, ignore_mismatched_sizes=True, output_loading_info=True
            )
    finally:
        logging.set_verbosity(verbosity)
    _complain(
        unknown=sorted(report["unexpected_keys"]),
        missing=sorted(report["missing_keys"]),
        misshapen=sorted(
            f"{key} {list(found)}, not {list(wanted)}"
            for key, found, wanted in report["mismatched_keys"]
        ),
    )
    return model.eval()


def _table(source: str) -> Source:
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is not allowed: it is one of {', '.join(SOURCES)}")
    return SOURCES[source]


def _translate(name: str, rows: tuple[tuple[str, str], ...]) -> list[str]:
    """The names in the right column of the rows whose left column a name matches."""
    found = []
    for left, right in rows:
        pattern = left.replace(".", r"\.").format(layer=r"(?P<layer>\d+)", part=_PART)
        match = re.fullmatch(pattern, name)
        if match:
            found.append(right.format(**match.groupdict()))
    return found


def _ours(name: str, table: Source) -> list[str]:
    return _translate(name, table.names)


def _theirs(name: str, table: Source) -> str:
    return _translate(name, tuple((ours, theirs) for theirs, ours in table.names))[0]


def _refuse(names: Any, table: Source) -> None:
    """Raise ValueError if names tell of an architecture that is known not to be ours."""
    telling = []
    for pattern, meaning in table.refused:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            telling.append(f"{meaning} {found}")
    if telling:
        raise ValueError(f"weights of a model that is not supported: {'; '.join(telling)}")


def _complain(**problems: list[str]) -> None:
    found = [f"{kind.replace('_', ' ')}: {names}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"the weights do not fit a ViT: {'; '.join(found)}")

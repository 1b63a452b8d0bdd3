"""Names that other code gives to the weights of models that this library also has."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .modeling_mctf_lv_vit import MCTFLVViTConfig
from .modeling_mctf_t2t_vit import MCTFT2TViTConfig
from .modeling_mctf_vit import MCTFViTConfig

Shapes = Mapping[str, tuple[int, ...]]

EMBEDDINGS = "vit.embeddings"
PATCHES = f"{EMBEDDINGS}.patch_embeddings"

_PART = "(?P<part>weight|bias)"


@dataclass(frozen=True)
class Source:
    """The weight names of other code, and what follows from them for the model.

    Attributes:
        names: (their name, our name); ``{layer}`` is a number, ``{part}`` weight or bias. A name of
            theirs in several rows is one tensor that is split along its first axis.
        refused: (pattern of their names, feature that such a name shows), for models that this
            library does not support.
        infer: function from the shapes of weights, by our names, to the configuration's fields for
            the front end and the heads, including ``patch_size`` and ``num_channels``.
        telling: our names of the weights that ``infer`` reads, and their numbers of axes.
        layer_norm_eps: epsilon of their LayerNorms, which cannot be inferred from weights.
        config_class: class of the model's configuration.
    """

    names: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]
    infer: Callable[[Shapes], dict[str, Any]]
    telling: Mapping[str, int]
    layer_norm_eps: float
    config_class: type[MCTFViTConfig]


# Names of timm, and of code that follows timm's pattern.
_LAYERS = (
    ("cls_token", f"{EMBEDDINGS}.cls_token"),
    ("pos_embed", f"{EMBEDDINGS}.position_embeddings"),
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
)
_DISTILLED = (
    ("dist_token", f"{EMBEDDINGS}.distillation_token"),
    ("head_dist.{part}", "distillation_classifier.{part}"),
)
_OTHERS = (
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
)
_IS_DISTILLED = (r"dist_token|head_dist\..+", "a distilled DeiT: source='deit_distilled'")
_IS_T2T = (r"tokens_to_token\..+", "a T2T-ViT: source='t2t_vit'")
_IS_LV = (r"aux_head\..+|patch_embed\.(conv|bn)\d\..+", "an LV-ViT: source='lv_vit'")


def _vit(shapes: Shapes) -> dict[str, Any]:
    _, channels, patch_size, patch_width = shapes[f"{PATCHES}.projection.weight"]
    if patch_size != patch_width:
        raise ValueError(f"patches of {patch_size} x {patch_width} pixels are not supported")
    return {"num_channels": channels, "patch_size": patch_size}


_TIMM = Source(
    names=(
        *_LAYERS,
        ("patch_embed.proj.{part}", f"{PATCHES}.projection.{{part}}"),
    ),
    refused=(_IS_DISTILLED, _IS_T2T, _IS_LV, *_OTHERS),
    infer=_vit,
    telling={f"{PATCHES}.projection.weight": 4},
    layer_norm_eps=1e-6,
    config_class=MCTFViTConfig,
)


def _distilled(shapes: Shapes) -> dict[str, Any]:
    return _vit(shapes) | {
        "distillation_token": True,
        "distillation_head": "distillation_classifier.weight" in shapes,
    }


_DEIT_DISTILLED = Source(
    names=(*_TIMM.names, *_DISTILLED),
    refused=(_IS_T2T, _IS_LV, *_OTHERS),
    infer=_distilled,
    telling={**_TIMM.telling, f"{EMBEDDINGS}.distillation_token": 3},
    layer_norm_eps=1e-6,
    config_class=MCTFViTConfig,
)


def _t2t(shapes: Shapes) -> dict[str, Any]:
    windows = shapes[f"{PATCHES}.token_transformers.0.layernorm_before.weight"][0]
    performer = f"{PATCHES}.token_transformers.0.features" in shapes
    return {
        "num_channels": windows // 49,
        "patch_size": 16,
        "token_dim": shapes[f"{PATCHES}.token_transformers.0.o_proj.weight"][0],
        "tokens_type": "performer" if performer else "transformer",
        "attention_scale": "hidden_size",  # as the published weights were trained
    }


def _t2t_source(own: tuple[tuple[str, str], ...]) -> Source:
    rows = [
        ("norm1.{part}", "layernorm_before.{part}"),
        ("norm2.{part}", "layernorm_after.{part}"),
        *own,
    ]
    front_end = tuple(
        (f"tokens_to_token.attention{i + 1}.{left}", f"{PATCHES}.token_transformers.{i}.{right}")
        for i in range(2)
        for left, right in rows
    )
    project = ("tokens_to_token.project.{part}", f"{PATCHES}.projection.{{part}}")
    return Source(
        names=(*_LAYERS, *front_end, project),
        refused=(_IS_DISTILLED, _IS_LV, *_OTHERS),
        infer=_t2t,
        telling={
            f"{PATCHES}.token_transformers.0.layernorm_before.weight": 1,
            f"{PATCHES}.token_transformers.0.o_proj.weight": 2,
        },
        layer_norm_eps=1e-5,
        config_class=MCTFT2TViTConfig,
    )


_T2T_TRANSFORMER = _t2t_source(
    (
        ("attn.qkv.{part}", "qkv_proj.{part}"),
        ("attn.proj.{part}", "o_proj.{part}"),
        ("mlp.fc1.{part}", "mlp.0.{part}"),
        ("mlp.fc2.{part}", "mlp.2.{part}"),
    )
)
_T2T_PERFORMER = _t2t_source(
    (
        ("kqv.{part}", "qkv_proj.{part}"),
        ("proj.{part}", "o_proj.{part}"),
        ("mlp.0.{part}", "mlp.0.{part}"),
        ("mlp.2.{part}", "mlp.2.{part}"),
        ("w", "features"),
    )
)


def _lv(shapes: Shapes) -> dict[str, Any]:
    channels, entering = shapes[f"{PATCHES}.stem.0.weight"][:2]
    layers = len(
        {name for name in shapes if re.fullmatch(r"vit\.layers\.\d+\.mlp\.fc1\.weight", name)}
    )
    return {
        "num_channels": entering,
        "patch_size": 2 * shapes[f"{PATCHES}.projection.weight"][2],
        "stem_channels": channels,
        "skip_lambda": {12: 1.0, 24: 3.0}.get(layers, 2.0),  # LV-ViT-T, -L; -S and -M
        "auxiliary_weight": 0.5 if "auxiliary_classifier.weight" in shapes else 0.0,
    }


_LV_VIT = Source(
    names=(
        *_LAYERS,
        *((f"patch_embed.conv{i + 1}.weight", f"{PATCHES}.stem.{3 * i}.weight") for i in range(3)),
        *(
            (f"patch_embed.bn{i + 1}.{name}", f"{PATCHES}.stem.{3 * i + 1}.{name}")
            for i in range(3)
            for name in ("{part}", "running_mean", "running_var", "num_batches_tracked")
        ),
        ("patch_embed.proj.{part}", f"{PATCHES}.projection.{{part}}"),
        ("aux_head.{part}", "auxiliary_classifier.{part}"),
    ),
    refused=(_IS_DISTILLED, _IS_T2T, *_OTHERS),
    infer=_lv,
    telling={f"{PATCHES}.stem.0.weight": 4, f"{PATCHES}.projection.weight": 4},
    layer_norm_eps=1e-5,
    config_class=MCTFLVViTConfig,
)

# Sources by name; for a T2T-ViT, the weights show the attention of its front end.
SOURCES: dict[str, Source] = {
    "timm": _TIMM,
    "mctf": _TIMM,
    "deit_distilled": _DEIT_DISTILLED,
    "t2t_vit": _T2T_TRANSFORMER,
    "lv_vit": _LV_VIT,
}


def detect_source(names: Iterable[str]) -> str:
    """The source that uses these names; ``"timm"`` if none of the others does."""
    names = list(names)
    for source, (pattern, _) in (
        ("t2t_vit", _IS_T2T),
        ("lv_vit", _IS_LV),
        ("deit_distilled", _IS_DISTILLED),
    ):
        if any(re.fullmatch(pattern, name) for name in names):
            return source
    return "timm"


def table_of(source: str, names: Iterable[str]) -> Source:
    if source not in SOURCES:
        raise ValueError(
            f"source={source!r} is not allowed: it must be one of {', '.join(SOURCES)}"
        )
    if source == "t2t_vit" and any(".kqv." in name for name in names):
        return _T2T_PERFORMER
    return SOURCES[source]


def translate(name: str, rows: tuple[tuple[str, str], ...]) -> list[str]:
    """The names in the right column, for the rows whose left column matches a name."""
    found = []
    for left, right in rows:
        pattern = left.replace(".", r"\.").format(layer=r"(?P<layer>\d+)", part=_PART)
        match = re.fullmatch(pattern, name)
        if match:
            found.append(right.format(**match.groupdict()))
    return found


def ours(name: str, table: Source) -> list[str]:
    return translate(name, table.names)


def theirs(name: str, table: Source) -> str:
    """The original name of a weight; its own name if the other code has no such weight."""
    found = translate(name, tuple((ours, theirs) for theirs, ours in table.names))
    return found[0] if found else name


def refuse(names: Iterable[str], table: Source) -> None:
    """Raise ValueError if names show an architecture that this library does not support."""
    telling = []
    for pattern, meaning in table.refused:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            telling.append(f"{meaning} {found}")
    if telling:
        raise ValueError(f"weights of a model that is not supported: {'; '.join(telling)}")

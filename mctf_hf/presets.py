"""Configurations of well-known models, by name."""

from dataclasses import fields
from typing import Any

from .registry import BACKBONES

# Width, heads, layers, ratio of MLP width to width.
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
# Backbone, sizes of its models, and settings that all of these share.
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
# Settings of single models.
_OWN: dict[str, dict[str, Any]] = {
    "lv_vit_t": {"skip_lambda": 1.0},
    "lv_vit_l": {"skip_lambda": 3.0, "stem_channels": 128},
    "clip_b_32": {"patch_size": 32, "projection_dim": 512},
    "clip_b_16": {"patch_size": 16, "projection_dim": 512},
    "clip_l_14": {"patch_size": 14, "projection_dim": 768},
}

# Tokens left after dropping and after merging in each layer, by cost in 1e9 multiply-accumulates:
# schedules of DiffRate (arXiv 2305.17997) for DeiT and the finetuned MAE (arXiv 2111.06377), from
# compression_rate.json of the authors' code (github.com/OpenGVLab/DiffRate).
_DIFFRATE: dict[str, dict[float, tuple[str, str]]] = {
    "deit_t": {
        0.6: (
            "197 196 180 157 130 107 86 73 63 51 40 3",
            "197 187 167 139 114 90 76 66 57 45 37 3",
        ),
        0.7: (
            "197 196 194 180 150 123 98 82 68 60 52 3",
            "197 196 192 158 133 103 88 72 64 58 49 3",
        ),
        0.8: (
            "197 197 196 186 166 147 117 103 92 80 74 3",
            "197 196 190 172 154 125 107 96 84 78 70 3",
        ),
        0.9: (
            "197 197 196 190 182 166 141 125 113 105 99 3",
            "197 196 194 188 172 147 129 115 107 103 96 3",
        ),
        1.0: (
            "197 197 196 194 188 184 178 164 156 137 129 21",
            "197 197 196 190 186 154 148 156 145 135 125 21",
        ),
    },
    "deit_s": {
        2.3: (
            "197 192 168 143 121 105 92 74 62 45 33 3",
            "197 180 156 127 109 98 80 66 52 37 31 3",
        ),
        2.5: (
            "197 192 174 156 131 115 111 99 76 50 39 3",
            "197 186 160 133 119 107 96 82 66 43 37 3",
        ),
        2.7: (
            "197 196 182 160 141 127 115 105 88 66 49 3",
            "197 188 170 147 131 119 109 96 76 54 45 3",
        ),
        2.9: (
            "197 196 190 168 150 139 129 117 99 78 58 3",
            "197 194 176 156 141 133 121 107 88 64 56 3",
        ),
        3.1: (
            "197 197 194 180 160 147 137 129 115 92 76 3",
            "197 196 186 164 150 141 133 121 103 78 68 3",
        ),
    },
    "deit_b": {
        8.7: (
            "197 192 172 156 131 107 90 72 56 33 17 3",
            "197 178 162 141 115 96 78 60 47 21 13 3",
        ),
        10.0: (
            "197 194 182 168 148 129 113 101 82 49 25 3",
            "197 186 174 156 137 117 105 90 66 31 19 3",
        ),
        10.4: (
            "197 196 188 174 156 141 121 103 90 58 25 3",
            "197 190 184 164 145 131 107 94 74 31 21 3",
        ),
        11.5: (
            "197 197 197 188 170 154 139 123 107 72 43 3",
            "197 197 192 178 158 145 127 111 94 50 35 3",
        ),
        12.5: (
            "197 197 196 192 184 170 154 139 129 94 58 3",
            "197 196 194 190 176 160 145 131 115 68 47 3",
        ),
    },
    "mae_b": {
        8.7: (
            "197 192 166 143 119 103 86 72 54 43 37 23",
            "197 176 150 127 107 92 76 58 47 41 23 23",
        ),
        10.0: (
            "197 194 173 154 135 120 108 92 76 64 52 40",
            "197 181 160 141 122 116 95 80 67 60 40 40",
        ),
        10.4: (
            "197 195 179 159 140 122 105 100 89 71 56 45",
            "197 187 166 145 125 109 102 97 75 64 45 45",
        ),
        11.5: (
            "197 196 182 172 162 147 131 109 101 94 70 49",
            "197 192 178 164 150 133 115 101 96 82 49 49",
        ),
    },
    "mae_l": {
        31.0: (
            "197 195 188 179 168 157 146 143 131 121 111 102 93 85 76 70 61 53 47 35 31 26 21 14",
            "197 191 184 172 161 151 145 135 125 117 106 96 89 80 72 64 54 50 40 27 27 23 14 14",
        ),
        34.7: (
            "197 195 192 189 181 170 161 160 149 140 128 118 109 95 91 82 73 68 58 54 43 38 29 18",
            "197 193 190 185 173 164 159 154 142 137 121 111 103 97 82 76 67 61 58 48 35 32 18 18",
        ),
        38.5: (
            "197 197 195 190 187 183 179 171 164 159 151 143 137 114 106 89 88 85 76 57 47 53 "
            "32 24",
            "197 196 193 189 183 180 175 167 161 158 152 134 120 110 97 91 87 83 65 47 54 34 24 24",
        ),
        42.3: (
            "197 197 197 195 194 193 191 187 182 180 173 149 142 134 125 121 111 106 91 87 77 "
            "39 38 32",
            "197 197 196 194 193 192 187 183 181 173 154 146 137 127 123 114 105 98 87 75 43 "
            "45 32 32",
        ),
        46.1: (
            "197 197 197 196 194 192 191 188 185 181 170 157 154 146 143 139 128 125 111 100 "
            "92 83 69 60",
            "197 197 196 195 193 191 189 187 183 176 162 155 148 145 139 133 127 118 104 95 "
            "86 71 60 60",
        ),
    },
    "mae_h": {
        83.7: (
            "257 255 246 227 200 178 168 159 155 145 140 139 128 119 114 109 107 100 101 102 "
            "117 104 103 97 97 102 95 90 82 83 74 56",
            "257 252 240 212 186 172 160 163 148 142 138 132 118 114 111 108 103 102 105 106 "
            "109 105 108 99 96 96 95 86 79 77 56 56",
        ),
        93.2: (
            "257 257 257 257 248 250 240 239 229 209 160 159 149 111 109 106 104 106 101 104 "
            "85 96 88 93 94 88 88 91 81 78 76 75",
            "257 257 257 249 242 241 239 229 209 203 159 150 124 107 107 101 100 101 104 89 "
            "101 88 89 88 91 86 86 83 78 78 75 75",
        ),
        103.4: (
            "257 256 255 251 245 235 204 197 194 189 185 177 169 160 152 144 146 139 139 136 "
            "135 133 131 128 126 126 124 121 114 96 82 53",
            "257 256 253 247 238 211 201 195 193 185 179 171 162 154 150 145 141 138 137 135 "
            "134 133 130 127 125 125 122 114 101 90 53 53",
        ),
        124.5: (
            "257 256 252 248 238 237 220 214 198 186 189 191 191 185 188 186 186 183 183 182 "
            "182 183 183 181 186 182 182 180 178 180 161 136",
            "257 254 251 244 238 223 221 203 194 192 191 190 188 184 188 185 184 183 185 183 "
            "183 185 183 183 185 183 179 167 177 133 136 136",
        ),
    },
}

# Presets with a DiffRate schedule have names such as deit_s_diffrate_2.9.
_SCHEDULED = {
    f"{model}_diffrate_{gmacs}": (model, gmacs)
    for model, schedules in _DIFFRATE.items()
    for gmacs in schedules
    if model in _DEIT
}
PRESETS = (*(name for _, sizes, _ in _FAMILIES for name in sizes), *_SCHEDULED)


def preset(name: str, **settings: Any) -> Any:
    """Configuration of a model for images of 224 x 224 pixels.

    DeiT, T2T-ViT and LV-ViT classify the 1,000 classes of ImageNet-1k; the others are encoders.

    Args:
        name: one of ``PRESETS``.
        settings: fields of the configuration, such as ``r``, that replace the preset's.

    Raises:
        ValueError: for an unknown name.
    """
    if name in _SCHEDULED:
        model, gmacs = _SCHEDULED[name]
        return preset(model, **diffrate_schedule(model, gmacs) | settings)
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
    """Model class of a preset: a classifier, or an encoder, with projection if there is one."""
    entry = BACKBONES[_find(name)[0]]
    if entry.classifies:
        return entry.classifier
    return entry.further[0] if entry.further else entry.model


def _find(name: str) -> tuple[str, tuple[int, int, int, int], dict[str, Any]]:
    name, _ = _SCHEDULED.get(name, (name, None))
    for model_type, sizes, common in _FAMILIES:
        if name in sizes:
            return model_type, sizes[name], common
    raise ValueError(f"preset {name!r} is not known: it must be one of {', '.join(PRESETS)}")


def diffrate_schedule(model: str, gmacs: float) -> dict[str, Any]:
    """A schedule that DiffRate's authors published, as fusion settings.

    DiffRate (arXiv 2305.17997), for images of 224 x 224 pixels; patches have 16 x 16 pixels, those
    of ``mae_h`` 14 x 14.

    Args:
        model: ``deit_t``, ``deit_s``, ``deit_b``, ``mae_b``, ``mae_l`` or ``mae_h``.
        gmacs: cost of the model with the schedule, in 1e9 multiply-accumulates (authors' count).

    Raises:
        ValueError: for a model or a cost without a published schedule.
    """
    if model not in _DIFFRATE or gmacs not in _DIFFRATE[model]:
        known = "; ".join(
            f"{name} at {', '.join(map(str, costs))}" for name, costs in _DIFFRATE.items()
        )
        raise ValueError(f"no schedule of DiffRate for {model} at {gmacs!r} is known, only {known}")
    after_dropping, after_merging = (list(map(int, s.split())) for s in _DIFFRATE[model][gmacs])
    r, dropped, tokens = [], [], after_dropping[0]
    for staying, left in zip(after_dropping, after_merging, strict=True):
        before = tokens
        staying = min(staying, before)
        tokens = min(left, staying)
        r.append(before - tokens)
        dropped.append(before - staying)
    return {
        "reduction": "diffrate",
        "r": r,
        "dropped": dropped,
        "min_tokens": 1,
        "restore": False,
    }

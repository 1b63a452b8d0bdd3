"""Tiny random models: of transformers, each with a vision encoder that can fuse, and our own."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, PreTrainedModel, PreTrainedTokenizerFast

from mctf_hf import (
    MCTFLVViTConfig,
    MCTFT2TViTConfig,
    MCTFViTConfig,
    MCTFViTForImageClassification,
    registry,
)

SIZE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 6,
}
DINO = {name: SIZE[name] for name in SIZE if name != "intermediate_size"} | {"mlp_ratio": 2}
BEIT = {**SIZE, "use_absolute_position_embeddings": True, "layer_scale_init_value": 0.7}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 57,
}
IMAGE_TOKEN = 59
GRID = ["stage1", "stage2", "stage3", "stage4"]


def pictures(height: int = 48, width: int = 48, count: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(count, 3, height, width, generator=generator)}


def sounds() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 48, 36, generator=torch.Generator().manual_seed(1))}


def pictures_and_noise() -> dict[str, Tensor]:
    noise = torch.rand(2, 64, generator=torch.Generator().manual_seed(2))
    return {**pictures(), "noise": noise}


def pictures_and_texts() -> dict[str, Tensor]:
    texts = torch.randint(2, 57, (2, 16), generator=torch.Generator().manual_seed(2))
    texts[:, -1] = 57
    return {**pictures(), "input_ids": texts}


def pictures_among_words(image_tokens: int) -> dict[str, Any]:
    words = torch.randint(2, 57, (2, 6), generator=torch.Generator().manual_seed(2))
    places = torch.full((2, image_tokens), IMAGE_TOKEN)
    words = torch.cat([words[:, :2], places, words[:, 2:]], 1)
    return {**pictures(), "input_ids": words, "use_cache": False}


def several_pictures_among_words() -> dict[str, Any]:
    inputs = pictures_among_words(16)
    return {**inputs, "pixel_values": inputs["pixel_values"][:, None]}


class Tiny(NamedTuple):
    """How a model is made.

    Attributes:
        name: of its class, after that of its module if transformers does not export it.
        config: settings of its configuration.
        inputs: what it is called with.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]] = pictures


def config_of(name: str, **settings: Any) -> Any:
    """Configuration of a class of transformers; those of its parts are made when it is."""
    parts = {
        key: config_of(value.name, **value.config)
        for key, value in settings.items()
        if isinstance(value, Tiny)
    }
    return class_of(name).config_class(**{**settings, **parts})


def class_of(name: str) -> Any:
    module, _, name = f"transformers.{name}".rpartition(".")
    return getattr(importlib.import_module(module), name)


REGISTERS = {**DINO, "num_register_tokens": 4}
ROTARY = {**SIZE, "num_register_tokens": 4, "layerscale_value": 0.7}
AUDIO = {**SIZE, "max_length": 48, "num_mel_bins": 36}
AUDIO |= {"frequency_stride": 6, "time_stride": 6}
INTERN = {**SIZE, "image_size": [48, 48], "patch_size": [6, 6], "layer_scale_init_value": 0.7}
MASKED = {**SIZE, "mask_ratio": 0.25}
MASKED |= {"decoder_hidden_size": 12, "decoder_intermediate_size": 24}
MASKED |= {"decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
DINO_GRID = {**DINO, "out_features": GRID, "layerscale_value": 0.7}

# The encoders of mctf_hf.supported().
ENCODERS = {
    "dinov2": Tiny("Dinov2Model", {**DINO, "layerscale_value": 0.7}),
    "dinov2 gated": Tiny("Dinov2Model", {**DINO, "use_swiglu_ffn": True}),
    "dinov2 backbone": Tiny("Dinov2Backbone", DINO_GRID),
    "dinov2 registers": Tiny("Dinov2WithRegistersModel", REGISTERS),
    "dinov2 registers backbone": Tiny(
        "Dinov2WithRegistersBackbone", {**REGISTERS, "out_features": GRID}
    ),
    "clip": Tiny("CLIPVisionModel", SIZE),
    "metaclip2": Tiny("MetaClip2VisionModel", SIZE),
    "siglip": Tiny("SiglipVisionModel", SIZE),
    "dinov3": Tiny("DINOv3ViTModel", ROTARY),
    "dinov3 gated": Tiny("DINOv3ViTModel", {**ROTARY, "use_gated_mlp": True}),
    "dinov3 backbone": Tiny("DINOv3ViTBackbone", {**ROTARY, "out_features": GRID}),
    "vit": Tiny("ViTModel", SIZE),
    "deit": Tiny("DeiTModel", SIZE),
    "mae": Tiny("ViTMAEModel", MASKED, pictures_and_noise),
    "ijepa": Tiny("IJepaModel", SIZE),
    "aimv2": Tiny("Aimv2VisionModel", SIZE),
    "aimv2 native": Tiny("Aimv2VisionModel", {**SIZE, "is_native": True, "use_head": False}),
    "beit": Tiny("BeitModel", BEIT),
    "beit class": Tiny("BeitModel", {**BEIT, "use_mean_pooling": False}),
    "beit unscaled": Tiny("BeitModel", {**BEIT, "layer_scale_init_value": 0.0}),
    "ast": Tiny("ASTModel", AUDIO, sounds),
    "internvl": Tiny("InternVLVisionModel", INTERN),
    "internvl norms": Tiny(
        "InternVLVisionModel", {**INTERN, "use_qk_norm": True, "norm_type": "rms_norm"}
    ),
    "idefics3": Tiny("Idefics3VisionTransformer", SIZE),
    "smolvlm": Tiny("SmolVLMVisionTransformer", SIZE),
}

_CLIP = {"vision_config": SIZE, "text_config": TEXT, "projection_dim": 8}
_CLIP_PART = Tiny("CLIPVisionModel", SIZE)
_LLAMA = Tiny("LlamaModel", TEXT)
_DINO_GRID = Tiny("Dinov2Backbone", DINO_GRID)
_DINO_ROWS = Tiny("Dinov2Backbone", {**DINO_GRID, "reshape_hidden_states": False})
_BEIT_GRID = Tiny("BeitBackbone", {**BEIT, "out_features": GRID})
_UPER = {"hidden_size": 12, "auxiliary_channels": 8, "auxiliary_in_channels": 24, "num_labels": 3}
_DEPTH = {
    "patch_size": 6,
    "reassemble_hidden_size": 24,
    "neck_hidden_sizes": [8, 8, 12, 12],
    "fusion_hidden_size": 8,
    "head_hidden_size": 4,
}

# Models with such an encoder in them.
COMPOSITES = {
    "CLIP": Tiny("CLIPModel", _CLIP, pictures_and_texts),
    "CLIP projection": Tiny("CLIPVisionModelWithProjection", {**SIZE, "projection_dim": 8}),
    "CLIP classifier": Tiny("CLIPForImageClassification", _CLIP),
    "SigLIP": Tiny(
        "SiglipModel",
        {"vision_config": SIZE, "text_config": {**TEXT, "hidden_size": 24, "projection_size": 24}},
        pictures_and_texts,
    ),
    "SigLIP classifier": Tiny(
        "SiglipForImageClassification", {"vision_config": SIZE, "text_config": TEXT}
    ),
    "LLaVA": Tiny(
        "LlavaForConditionalGeneration",
        {"vision_config": _CLIP_PART, "text_config": _LLAMA, "image_token_id": IMAGE_TOKEN},
        functools.partial(pictures_among_words, 64),
    ),
    "InternVL": Tiny(
        "InternVLForConditionalGeneration",
        {
            "vision_config": Tiny("InternVLVisionModel", INTERN),
            "text_config": _LLAMA,
            "image_token_id": IMAGE_TOKEN,
        },
        functools.partial(pictures_among_words, 16),
    ),
    "Idefics3": Tiny(
        "Idefics3ForConditionalGeneration",
        {
            "vision_config": SIZE,
            "text_config": _LLAMA,
            "image_token_id": IMAGE_TOKEN,
            "scale_factor": 2,
        },
        several_pictures_among_words,
    ),
    "Depth Anything": Tiny(
        "DepthAnythingForDepthEstimation", {**_DEPTH, "backbone_config": _DINO_ROWS}
    ),
    "DPT": Tiny(
        "DPTForDepthEstimation",
        {
            "backbone_config": _DINO_ROWS,
            "is_hybrid": False,
            "neck_hidden_sizes": [8, 8, 12, 12],
            "fusion_hidden_size": 8,
            "readout_type": "project",
            "hidden_size": 24,
        },
    ),
    "UperNet DINOv2": Tiny(
        "UperNetForSemanticSegmentation", {**_UPER, "backbone_config": _DINO_GRID}
    ),
    "UperNet BEiT": Tiny(
        "UperNetForSemanticSegmentation", {**_UPER, "backbone_config": _BEIT_GRID}
    ),
    "BEiT backbone": _BEIT_GRID,
    "DINOv2 classifier": Tiny("Dinov2ForImageClassification", DINO),
    "DINOv2 registers classifier": Tiny("Dinov2WithRegistersForImageClassification", REGISTERS),
    "ViT classifier": Tiny("ViTForImageClassification", SIZE),
    "DeiT classifier": Tiny("DeiTForImageClassification", SIZE),
    "DeiT two heads": Tiny("DeiTForImageClassificationWithTeacher", SIZE),
    "AST classifier": Tiny("ASTForAudioClassification", AUDIO, sounds),
    "MAE pretraining": Tiny("ViTMAEForPreTraining", MASKED, pictures_and_noise),
    "I-JEPA classifier": Tiny("IJepaForImageClassification", SIZE),
    "BEiT classifier": Tiny("BeitForImageClassification", BEIT),
}
MODELS = {**ENCODERS, **COMPOSITES}


def build(name: str, **config: Any) -> PreTrainedModel:
    """A model of a class of transformers, with weights that let its tokens differ."""
    torch.manual_seed(0)
    model = class_of(name)(config_of(name, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # of norms, biases, scales
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model


def tiny(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of the tables above, and what it is called with."""
    made = MODELS[name]
    return build(made.name, **made.config), made.inputs()


def save_with_words(name: str, folder: Path) -> Path:
    """Save a CLIP or a SigLIP of the tables above with a tokenizer that knows a few words."""
    known = ["[PAD]", "[BOS]", "a", "photo", "of", "cat", "dog", *(f"w{i}" for i in range(50))]
    known += ["[EOS]", "[UNK]"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 57)]
    )
    tiny(name)[0].save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder)
    size = {"height": 48, "width": 48}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    return folder


SMALL_BACKBONE = {"hidden_size": 24, "intermediate_size": 72, "num_hidden_layers": 4}
SMALL_BACKBONE |= {"num_attention_heads": 2, "num_labels": 10}
# Small models of all backbones, for images of 96 pixels.
BACKBONES: dict[str, tuple[type[MCTFViTConfig], dict[str, Any]]] = {
    "vit": (MCTFViTConfig, {}),
    "t2t transformer": (MCTFT2TViTConfig, {"token_dim": 16}),
    "t2t performer": (MCTFT2TViTConfig, {"token_dim": 16, "tokens_type": "performer"}),
    "lv": (MCTFLVViTConfig, {"patch_size": 16, "stem_channels": 8}),
    "distilled": (MCTFViTConfig, {"distillation_token": True, "distillation_head": True}),
    "registers": (MCTFViTConfig, {"num_register_tokens": 4}),
}


def small_backbone(kind: str, **more: Any) -> MCTFViTForImageClassification:
    """One of them, with statistics and tokens that show where they are left out."""
    config_class, own = BACKBONES[kind]
    torch.manual_seed(0)
    settings = {**SMALL_BACKBONE, "image_size": 96, "r": 4, **own, **more}
    model = registry.build(config_class(**settings)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    for name, parameter in model.named_parameters():
        if name.endswith(("_token", "_tokens")):
            nn.init.normal_(parameter)
    return model


def pixels(count: int = 2, size: int = 96) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))

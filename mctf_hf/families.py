"""The supported vision encoders of transformers, and functions that find them in a model."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from .anatomy import AIMV2, BEIT, CLIP, DINO, INTERNVL, VIT, LayerNames, check_layer
from .configuration_mctf import as_pair
from .fused_encoder import FusedLayerList


def _registers(config: Any) -> int:
    return 1 + config.num_register_tokens


def _relative_positions(config: Any) -> str | None:
    if config.use_relative_position_bias or config.use_shared_relative_position_bias:
        return "relative position biases belong to pairs of places, which fused tokens have not"
    return None


@dataclass(frozen=True)
class Family:
    """Encoders with the same structure.

    Attributes:
        name: common name of the family.
        owners: classes of transformers that embed images and run the layers.
        layers_path: path of the list of layers in the owner.
        layer_names: names of the parts of a layer.
        prefix: number of tokens before the patches, or a function of the configuration.
        rotary: path of the module that computes rotary positions, if there is one.
        spectrogram: whether the input is a spectrogram instead of images.
        hindrance: function that returns why a configuration cannot fuse, or ``None`` if it can.
    """

    name: str
    owners: tuple[str, ...]
    layers_path: str
    layer_names: LayerNames
    prefix: int | Callable[[Any], int] = 1
    rotary: str | None = None
    spectrogram: bool = False
    hindrance: Callable[[Any], str | None] = lambda config: None

    def example(
        self, owner: nn.Module, image_size: int | tuple[int, int] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """An uninitialised input for an owner, and options of the call.

        Args:
            image_size: height and width in pixels; by default those of the configuration.

        Raises:
            ValueError: if ``image_size`` is given for an encoder of spectrograms.
        """
        config: Any = owner.config
        if self.spectrogram:
            if image_size is not None:
                raise ValueError(f"image_size={image_size!r} is not allowed with {self.name}")
            return torch.empty(1, config.max_length, config.num_mel_bins), {}
        size = as_pair(config.image_size if image_size is None else image_size)
        options = {}
        known = inspect.signature(owner.forward).parameters
        if size != as_pair(config.image_size) and "interpolate_pos_encoding" in known:
            options["interpolate_pos_encoding"] = True
        return torch.empty(1, config.num_channels, *size), options

    def num_prefix_tokens(self, config: Any) -> int:
        """Number of tokens before the patches."""
        return self.prefix if isinstance(self.prefix, int) else self.prefix(config)


FAMILIES = (
    Family("DINOv2", ("Dinov2Model", "Dinov2Backbone"), "encoder.layer", DINO),
    Family(
        "DINOv2 with registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        "encoder.layer",
        DINO,
        _registers,
    ),
    Family("CLIP", ("CLIPVisionModel",), "encoder.layers", CLIP),
    Family("MetaCLIP 2", ("MetaClip2VisionModel",), "encoder.layers", CLIP),
    Family("SigLIP, SigLIP 2 of fixed size", ("SiglipVisionModel",), "encoder.layers", CLIP, 0),
    Family(
        "DINOv3 ViT",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        "model.layer",
        DINO,
        _registers,
        rotary="rope_embeddings",
    ),
    Family("ViT", ("ViTModel",), "layers", VIT),
    Family("DeiT", ("DeiTModel",), "layers", VIT, 2),
    Family("ViT-MAE", ("ViTMAEModel",), "layers", VIT),
    Family("I-JEPA", ("IJepaModel",), "layers", VIT, 0),
    Family("AIMv2", ("Aimv2VisionModel",), "encoder.layers", AIMV2, 0),
    Family(
        "BEiT without relative positions",
        ("BeitModel",),
        "layers",
        BEIT,
        hindrance=_relative_positions,
    ),
    Family("Audio Spectrogram Transformer", ("ASTModel",), "layers", VIT, 2, spectrogram=True),
    Family("InternVL", ("InternVLVisionModel",), "encoder.layer", INTERNVL),
    Family("Idefics3", ("Idefics3VisionTransformer",), "encoder.layers", CLIP, 0),
    Family("SmolVLM", ("SmolVLMVisionTransformer",), "encoder.layers", CLIP, 0),
)

# Number of prefix tokens that each class reads to pool or classify; it reads no other tokens.
PREFIX_TOKENS_READ = {
    **dict.fromkeys(("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"), 1),
    **dict.fromkeys(("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"), 1),
    **dict.fromkeys(("MetaClip2VisionModel", "MetaClip2VisionModelWithProjection"), 1),
    **dict.fromkeys(("MetaClip2Model", "ViTModel", "ViTForImageClassification"), 1),
    **dict.fromkeys(("DeiTModel", "DeiTForImageClassification"), 1),
    **dict.fromkeys(("DeiTForImageClassificationWithTeacher", "ASTModel"), 2),
    "ASTForAudioClassification": 2,
}

# Known encoders that are not supported yet, and the reasons.
UNSUPPORTED = {
    "Siglip2VisionModel": "SigLIP 2 NaFlex pads its images to one length",
    "VideoMAEModel": "VideoMAE's tokens are of videos",
    "VJEPA2Model": "V-JEPA 2's tokens are of videos, with positions in three axes",
    "PixtralVisionModel": "Pixtral packs images of many sizes into one sequence",
    "Qwen2VisionTransformerPretrainedModel": "Qwen2-VL packs images into one sequence",
    "Qwen2_5_VisionTransformerPretrainedModel": "Qwen2.5-VL packs images, and has windows",
    "Qwen3VLVisionModel": "Qwen3-VL packs images into one sequence",
    "SamVisionEncoder": "SAM attends in windows",
    "EomtForUniversalSegmentation": "EoMT adds queries to its tokens between layers",
    "EomtDinov3ForUniversalSegmentation": "EoMT adds queries to its tokens between layers",
    "TimmWrapperModel": "timm's layers have queries, keys and values in one projection",
    "TimmBackbone": "timm's layers have queries, keys and values in one projection",
}


class Encoder(NamedTuple):
    """A vision encoder in a model.

    Attributes:
        path: path of the owner in the model, empty for the model itself.
        owner: module that embeds images and runs the layers.
        family: family of the encoder.
        layers: list of its layers.
        runner: module that iterates over the layers.
        grid_class: class name of the backbone, with grids as outputs, that contains or is the
            owner; ``None`` if there is no backbone.
    """

    path: str
    owner: PreTrainedModel
    family: Family
    layers: nn.ModuleList
    runner: nn.Module
    grid_class: str | None


def find_encoders(model: nn.Module) -> list[Encoder]:
    """Find the vision encoders in a model, or the model itself if it is one."""
    found = []
    for path, module in model.named_modules():
        family = family_of(module)
        if family is not None:
            assert isinstance(module, PreTrainedModel)
            layers = module.get_submodule(family.layers_path)
            assert isinstance(layers, nn.ModuleList)
            runner = module.get_submodule(family.layers_path.rpartition(".")[0])
            grid_class = _grid_class(model, path)
            found.append(Encoder(path, module, family, layers, runner, grid_class))
    return found


def _grid_class(model: nn.Module, path: str) -> str | None:
    """Name of the class of the first backbone on the path from the model to a module."""
    parts = path.split(".") if path else []
    way = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]
    return next((type(one).__name__ for one in way if isinstance(one, BackboneMixin)), None)


def family_of(module: nn.Module) -> Family | None:
    """The family whose layers a module runs; ``None`` for any other module."""
    names = _names(module)
    return next((family for family in FAMILIES if names & set(family.owners)), None)


def _names(module: nn.Module) -> set[str]:
    """Names of a module's class and base classes that transformers defines."""
    classes = type(module).__mro__
    return {one.__name__ for one in classes if one.__module__.startswith("transformers.models.")}


def num_read_tokens(model: nn.Module) -> int | None:
    """Number of prefix tokens that a model reads from its encoder; ``None`` if it reads others."""
    return next(
        (PREFIX_TOKENS_READ[name] for name in _names(model) if name in PREFIX_TOKENS_READ), None
    )


def supported() -> dict[str, tuple[str, ...]]:
    """Supported families of encoders, with the classes of transformers that run their layers.

    Models that contain such an encoder (``CLIPModel``, ``LlavaForConditionalGeneration``,
    ``DepthAnythingForDepthEstimation``, …) are supported too.
    """
    return {family.name: family.owners for family in FAMILIES}


def explain(model: nn.Module) -> str:
    """The reason why the tokens of a model cannot be fused."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        inside = [f"{type(one.owner).__name__} at {one.path!r}" for one in find_encoders(model)]
        return f"{name} is no model of transformers" + (
            f": fuse the tokens of the {' and the '.join(inside)} in it" if inside else ""
        )
    for module in model.modules():
        for known in sorted(_names(module) & set(UNSUPPORTED)):
            return f"{name}: {UNSUPPORTED[known]} ({known}), which is not supported yet"
    families = f"known are {', '.join(family.name for family in FAMILIES)}"
    layers = max(_stacks(model), key=len, default=None)
    if layers is None:
        return f"{name} has no vision encoder: it has no list of layers at all; {families}"
    layer, reasons = layers[0], []
    for names in dict.fromkeys(family.layer_names for family in FAMILIES):
        try:
            check_layer(layer, names)
        except ValueError as error:
            reasons.append(str(error).split(",")[0])
    reason = "they are of no known encoder for images"
    if len(reasons) == len({family.layer_names for family in FAMILIES}):
        # No family's names fit: report the shortest reason.
        reason = min(reasons, key=len)
    return (
        f"{name} has no vision encoder that is known, only layers of "
        f"{type(layer).__name__}: {reason}; {families}"
    )


def _stacks(model: nn.Module) -> Iterator[nn.ModuleList]:
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or isinstance(module, FusedLayerList):
            continue
        if len({type(layer) for layer in module.children()}) == 1:
            yield module

"""``mctf convert``: turns a checkpoint of other code into a folder that loads anywhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from lightning_modules.amounts import fusion_text
from lightning_modules.processors import settle_size
from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification
from mctf_hf.classes import give_names
from mctf_hf.configuration_mctf import as_pair
from mctf_hf.conversion import build_model, infer_config
from mctf_hf.cost import describe
from mctf_hf.hub import HUB_ID, check_folder, load_image_processor, save
from mctf_hf.loading import load_pretrained
from mctf_hf.registry import backbone_of, only_if_asked, output_of, settings_for
from mctf_hf.sources import SOURCES, detect_source
from mctf_hf.weight_files import SUFFIXES, read_checkpoint

from .models import parse, resolve
from .options import parser_of, read

BICUBIC = 3
# Settings of T2T-ViT and LV-ViT that cannot be inferred from the weights.
OWN = ("attention_scale", "skip_lambda")
Lines = dict[str, str]


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`convert`."""
    checkpoint = {
        "help": "NAME[,setting=value…]: a file of weights of timm, the official MCTF, T2T-ViT or "
        f"LV-ViT ({', '.join(SUFFIXES)}), or a folder or Hub id of a ViT or DeiT of transformers "
        "or of this library. Settings are those of fusion (r=16, r=auto:0.56, …) and, for what "
        "weights do not show, attention_scale and skip_lambda.",
    }
    settings, _ = read(parser_of("convert", convert, checkpoint=checkpoint), args)
    convert(**settings)


def convert(
    checkpoint: str,
    output: str,
    source: str | None = None,
    num_heads: int | None = None,
    entry: str | None = None,
    labels: str | None = None,
    processor: str | None = None,
) -> None:
    """Convert a checkpoint of other code to a model folder of this library.

    The folder contains the configuration, code, weights, image processor and class names.

    Args:
        checkpoint: the checkpoint, as :func:`main` describes it.
        output: folder to write.
        source: origin of the checkpoint: timm, mctf, deit_distilled, t2t_vit, lv_vit or hf. If
            unset, hf for a folder or a Hub id; for a file, inferred from the names of the weights.
        num_heads: number of attention heads, for a file. If unset, 64 channels per head.
        entry: entry of a file that contains the weights, such as model_ema. If unset, "model" or a
            similar entry, or else the whole file.
        labels: file with the class names: one per line (.txt), or a list or {"0": name, …} (.json).
        processor: folder or Hub id of the image processor. If unset, the checkpoint's own; for a
            file, DeiT's evaluation: bicubic, centre crop of 87.5% (no crop up to 64 pixels),
            ImageNet's mean and standard deviation.
    """
    check_folder(output)
    name, settings = parse(checkpoint, OWN)
    source = _source(name, source)
    if source == "hf":
        for option, value in {"num_heads": num_heads, "entry": entry}.items():
            if value is not None:
                raise ValueError(f"{option}={value!r} is for files of weights, and {name} is none")
        model, lines = _from_folder(name, settings, processor)
    else:
        model, lines = _from_file(name, source, num_heads, entry, settings)
    config = model.config
    config.check_effect(settings)
    if labels is not None:
        if output_of(model) != "logits":
            raise ValueError(
                f"labels={labels!r} is not allowed with {name}, which has no head for classes"
            )
        give_names(config, read_labels(labels, config.num_labels))
    origin = processor or (name if source == "hf" else None)
    image_processor = evaluation_processor(config) if origin is None else _taken(origin, config)
    folder = save(model, image_processor, output)
    lines |= _summary(model, origin or "DeiT's evaluation on ImageNet, since no other was given")
    for heading, text in {**lines, "written": folder}.items():
        print(f"{heading:<18}{text}")


def _source(name: str, source: str | None) -> str | None:
    path = Path(name)
    if source is None:
        is_id = HUB_ID.fullmatch(name) and path.suffix not in SUFFIXES
        return "hf" if path.is_dir() or (is_id and not path.exists()) else None
    if source not in (*SOURCES, "hf"):
        raise ValueError(
            f"source={source!r} is not allowed: it must be one of {', '.join((*SOURCES, 'hf'))}"
        )
    if source == "hf" and path.is_file():
        raise ValueError(f"source='hf' reads a folder or a Hub id, and {name} is a file")
    return source


def _from_folder(name: str, settings: dict[str, Any], processor: str | None) -> tuple[Any, Lines]:
    config = backbone_of(name).config.from_pretrained(name)
    size = settle_size(config, _processor(processor or name))
    settings = resolve(config, settings_for(name, settings))
    model = load_pretrained(name, **settings, **size)
    return model, {"read": f"{len(model.state_dict())} weights of {name}"}


def _from_file(
    name: str,
    source: str | None,
    num_heads: int | None,
    entry: str | None,
    settings: dict[str, Any],
) -> tuple[MCTFViTForImageClassification, Lines]:
    found = read_checkpoint(name, entry)
    source = source or detect_source(found.weights)
    try:
        config = infer_config(found.weights, source, num_heads)
        settings = resolve(config, only_if_asked(settings))
        config = infer_config(found.weights, source, num_heads, **settings)
        model = build_model(found.weights, source, config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    where = "" if found.entry is None else f", entry {found.entry!r}"
    lines = {"read": f"{len(found.weights)} weights of {name}{where}"}
    if found.left_out:
        lines["left out"] = ", ".join(map(repr, found.left_out))
    if num_heads is None:
        lines["heads"] = f"{config.num_attention_heads}, taken to have 64 channels each"
    return model, lines


def read_labels(file: str, num_labels: int) -> list[str]:
    """Read the class names, in order, from a text or JSON file.

    Raises:
        ValueError: if the file contains something else, or a different number of names.
        OSError: if the file cannot be read.
    """
    if Path(file).suffix not in (".txt", ".json"):
        raise ValueError(f"labels={file!r} is not allowed: the file's name ends in .txt or .json")
    try:
        text = Path(file).read_text(encoding="utf-8")
        names = json.loads(text) if file.endswith(".json") else text.rstrip().splitlines()
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"labels={file!r} cannot be read: {error}") from error
    if isinstance(names, dict) and set(names) == {str(i) for i in range(len(names))}:
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise ValueError(
            f"labels={file!r} is not allowed: it must hold a name per line, or a JSON list of "
            'names or names by their numbers ({"0": name, …}), none of them empty'
        )
    if len(names) != num_labels:
        raise ValueError(f"labels={file!r} holds {len(names)} names, the model has {num_labels}")
    return [name.strip() for name in names]


def _processor(origin: str) -> Any:
    """Load the image processor of a folder or Hub id."""
    try:
        return load_image_processor(origin)
    except OSError as error:
        raise OSError(
            f"{origin} has no image processor that could be read: set processor to a folder "
            "or Hub id that has one"
        ) from error


def _taken(origin: str, config: MCTFViTConfig) -> Any:
    """Load the image processor of a folder or Hub id, and check that it fits the model."""
    processor = _processor(origin)
    height, width = config.usual_size
    image = np.zeros((config.num_channels, 2 * height, 3 * width), np.uint8)
    options = {"input_data_format": "channels_first", "return_tensors": "np"}
    made = processor(image, **options)["pixel_values"].shape[1:]
    if made != (config.num_channels, height, width):
        raise ValueError(
            f"the image processor of {origin} makes images of {_by(made)}, the model takes "
            f"{_by((config.num_channels, height, width))}: set processor to one that fits"
        )
    return processor


def evaluation_processor(config: MCTFViTConfig) -> ViTImageProcessorPil:
    """The image processor of DeiT's evaluation.

    Raises:
        ValueError: if the model's images do not have three channels.
    """
    if config.num_channels != 3:
        raise ValueError(
            f"images of {config.num_channels} channels have no usual image processor: set "
            "processor to a folder or Hub id that has one"
        )
    size = config.image_size
    normalization = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    whole = {"height": size, "width": size}
    if size <= 64:
        return ViTImageProcessorPil(size=whole, resample=BICUBIC, **normalization)
    return ViTImageProcessorPil(
        size={"shortest_edge": int(size / 0.875)},
        resample=BICUBIC,
        do_center_crop=True,
        crop_size=whole,
        **normalization,
    )


def _summary(model: Any, processor: str) -> Lines:
    config, described = model.config, describe(model)
    height, width = config.usual_size
    read = output_of(model)
    short = config.shortfall(config.num_tokens())
    return {
        "architecture": f"{config.hidden_size} wide, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads, MLP {described.layer.mlp_width}, "
        + (f"{config.num_labels} labels" if read == "logits" else read),
        "images": f"{_by((config.num_channels, height, width))}, patches of "
        f"{_by(as_pair(config.patch_size))}",
        "fusion": fusion_text(config, described),
        **({} if short is None else {"warning": short}),
        "image processor": processor,
    }


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)

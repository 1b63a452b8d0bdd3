"""Loading or creating the model to finetune, with its image processor."""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.processors import fit_shape, settle_size
from lightning_modules.resizing import resize
from mctf_hf import MCTFViTConfig
from mctf_hf.checks import check_weights
from mctf_hf.classes import give_names
from mctf_hf.hub import load_image_processor
from mctf_hf.images import usual_processor
from mctf_hf.loading import load_reported
from mctf_hf.problems import REGRESSION, SINGLE, problem_type
from mctf_hf.registry import (
    BACKBONES,
    FUSION_SETTINGS,
    backbone_of,
    build,
    only_if_asked,
    settings_for,
)


def load_or_make(
    pretrained: str | None,
    config: dict[str, Any] | None,
    num_labels: int | None,
    fusion: dict[str, Any],
    *,
    problem: str | None = None,
    image_size: int | list[int] | None = None,
) -> tuple[Any, Any]:
    """Load or create a classifier with the given fusion settings, and its image processor.

    Args:
        pretrained: id of a model on the Hub or a local folder, or None for a model from scratch.
        config: settings of ``MCTFViTConfig`` for a model from scratch, or those of another
            configuration of this library with its ``model_type``, or None.
        num_labels: number of outputs of a new head; None keeps the head of the model.
        fusion: fusion settings by name, which replace those of the model. Without any, a plain
            checkpoint and a model from scratch fuse nothing.
        problem: ``problem_type`` of the labels. None keeps that of the checkpoint if its head is
            kept; a new head gets regression for one output, otherwise one label per image.
        image_size: image size, if it is not the checkpoint's; positions are interpolated.

    Raises:
        ValueError: for unknown settings, a head without outputs, or weights that do not fit or are
            not finite; the message names them.
    """
    model, processor = _loaded_or_made(pretrained, config, num_labels, fusion, problem)
    if not model.config.num_labels:
        raise ValueError(
            f"num_labels=0 of {pretrained or 'config'} is not allowed: set num_labels for a head"
        )
    model.config.problem_type = problem_type(model.config)
    if image_size is not None:
        if pretrained is None:
            raise ValueError(
                f"image_size={image_size!r} is not allowed beside config: set it there"
            )
        model = resize(model, processor, image_size)
    elif fit_shape(processor):
        rank_zero_info(
            "The image processor keeps the aspect ratio: from here on it crops the middle, "
            f"{dict(processor.crop_size)}"
        )
    return model, processor


def _loaded_or_made(
    pretrained: str | None,
    config: dict[str, Any] | None,
    num_labels: int | None,
    fusion: dict[str, Any],
    problem: str | None,
) -> tuple[Any, Any]:
    if (pretrained is None) == (config is None):
        raise ValueError(
            f"pretrained={pretrained!r} and config={config!r}: set one of them, a checkpoint to "
            "start from or the settings of a model to train from scratch"
        )
    _check_names("fusion", fusion, FUSION_SETTINGS)
    labels: dict[str, Any] = {} if problem is None else {"problem_type": problem}
    if num_labels is not None:
        usual = REGRESSION if num_labels == 1 else SINGLE
        labels = {"num_labels": num_labels, "problem_type": problem or usual}
    if config is not None:
        config = dict(config)
        model_type = config.pop("model_type", MCTFViTConfig.model_type)
        if model_type not in BACKBONES:
            raise ValueError(
                f"config: model_type={model_type!r} is not allowed: it must be one of "
                f"{', '.join(BACKBONES)}"
            )
        config_class = BACKBONES[model_type].config
        names = [field.name for field in dataclasses.fields(config_class)]
        _check_names("config", config, (*names, "num_labels"))
        if num_labels is None and not {"num_labels", "id2label"} & config.keys():
            raise ValueError(
                f"config={config!r} states no number of classes: set num_labels, there or beside it"
            )
        model_config = config_class(**only_if_asked({**config, **labels, **fusion}))
        return build(model_config), usual_processor(model_config)

    assert pretrained is not None
    backbone = backbone_of(pretrained)
    processor = load_image_processor(pretrained)
    known = {field.name for field in dataclasses.fields(backbone.config)}
    if "drop_path_rate" not in known and not fusion.get("drop_path_rate"):
        fusion = {name: value for name, value in fusion.items() if name != "drop_path_rate"}
    _check_names(f"fusion with {pretrained}", fusion, known)
    fusion = settings_for(pretrained, fusion)
    size = settle_size(backbone.config.from_pretrained(pretrained), processor)
    model, misfits = load_reported(
        backbone.classifier,
        pretrained,
        **labels,
        **fusion,
        **size,
        dtype=torch.float32,  # for any dtype of the file; trainer.precision sets the precision
    )
    stored = getattr(model.config_class.from_pretrained(pretrained), "multi_scale", None) or []
    wanted = getattr(model.config, "multi_scale", None) or []
    if wanted[: len(stored)] != stored:
        raise ValueError(
            f"multi_scale={model.config.multi_scale!r} is not allowed: {pretrained} has the scales "
            f"{stored}, which come first"
        )
    added = tuple(  # these are initialised to have no effect
        f".coarse_patch_embeddings.{i}." for i in range(len(stored), len(wanted))
    )
    missing = {name for name in misfits.missing if not any(scale in name for scale in added)}
    wrong = sorted(missing | misfits.misshapen.keys())
    if num_labels is not None:
        wrong = [name for name in wrong if "classifier." not in name]
        for name, head in model.named_children():
            if name.endswith("classifier"):
                head.reset_parameters()
        give_names(model.config, [f"LABEL_{i}" for i in range(num_labels)])
    if wrong:
        headless = all("classifier." in name for name in wrong)
        raise ValueError(
            f"{pretrained} does not fit this model: weights missing or of another shape: {wrong}"
            + (" (set num_labels for a new head)" if headless else "")
        )
    check_weights(model, pretrained)
    return model, processor


def _check_names(setting: str, given: dict[str, Any], known: Collection[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{setting}={given!r} is not allowed: there are no settings {unknown}")

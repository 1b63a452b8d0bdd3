"""Settings that determine the result of a run, and a check of them when the run is resumed."""

import json
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from mctf_hf.configuration_mctf import FusionConfigMixin
from mctf_hf.model_card import public_name

# Settings that determine the images of each step and the progress of a run.
_POSITION = (
    "data.dataset",
    "data.name",
    "data.revision",
    "data.train_split",
    "data.val_fraction",
    "data.image_column",
    "data.label_column",
    "data.repeated_augmentation",
    "data.streaming",
    "data.shuffle_buffer",
    "data.seed",
    "images to train on",
    "images per batch, over all processes",
    "processes and workers that read the stream",
    "trainer.accumulate_grad_batches",
    "trainer.limit_train_batches",
    "model.seed",
)
# Settings that a resumed run takes from the optimizer's state.
_OPTIMIZER = (
    "model.learning_rate",
    "model.reference_batch_size",
    "model.weight_decay",
    "model.layer_decay",
)
_AVERAGE = "ema.decay"  # if it is set, the weights of a checkpoint are the average
_NO_MATTER = ("attn_implementation", "compile", "reduction", "r", "keep_rate", "fusion_layers")
# Settings of the data module that change the images of a training.
AUGMENTATION = ("crop", "flip", "rand_augment", "random_erasing", "mixup", "cutmix")

Settings = dict[str, Any]


def ema_decay(trainer: L.Trainer) -> float | None:
    """Decay of the averaged weights; None without averaging."""
    averages = (call for call in trainer.callbacks if isinstance(call, EMAWeightAveraging))
    return next((getattr(average, "decay", None) for average in averages), None)


def training_settings_of(trainer: L.Trainer, pl_module: L.LightningModule) -> Settings:
    """Settings that determine the result of a training, by their command line names, if any."""
    data = trainer.datamodule
    names = [name.removeprefix("data.") for name in _POSITION if name.startswith("data.")]
    found: Settings = {
        f"data.{name}": getattr(data, name, None) for name in (*names, *AUGMENTATION, "val_split")
    }
    found["data.dataset"] = public_name(found["data.dataset"])  # its folder may have moved
    batch_size = getattr(data, "batch_size", None)
    if batch_size is not None:
        found["images per batch, over all processes"] = batch_size * trainer.world_size
    found["images to train on"] = getattr(data, "num_train_images", None)
    if found["data.streaming"]:
        readers = [trainer.world_size, data.num_workers]
        found["processes and workers that read the stream"] = readers
    for name, value in pl_module.hparams.items():
        if name not in (*_NO_MATTER, "fusion") and name[0] != "_":
            found[f"model.{name}"] = value
    config = getattr(getattr(pl_module, "model", None), "config", None)
    if isinstance(config, FusionConfigMixin):
        found |= {f"model.{name}": value for name, value in config.fusion_settings().items()}
        found["model.r_max"] = getattr(pl_module, "r_max", None)
    found |= {
        f"trainer.{name}": getattr(trainer, name)
        for name in (
            "accumulate_grad_batches",
            "limit_train_batches",
            "max_epochs",
            "max_steps",
            "gradient_clip_val",
        )
    }
    found["trainer.precision"] = str(trainer.precision)
    found[_AVERAGE] = ema_decay(trainer)
    return json.loads(json.dumps(found, default=str))


def check_resumable(before: Settings, now: Settings, checkpoint: Any) -> None:
    """Warn about settings that differ from those of the checkpoint's run, one per line.

    Raises:
        ValueError: if the result would match neither run, because a changed setting would change
            the checkpoint's position among the images, or would have no effect.
    """
    changed = {
        name: (before[name], value)
        for name, value in now.items()
        if name in before and before[name] != value
    }
    refused = {
        name: pair
        for name, pair in changed.items()
        if name in (*_POSITION, *_OPTIMIZER) or (name == _AVERAGE and None in pair)
    }
    if refused:
        raise ValueError(
            f"{checkpoint} can't be resumed with other settings than its run had in\n"
            f"{_lines(refused)}\n"
            "for the result would be that of neither run: set them back, or begin a new run with "
            "the weights of this one (--model.pretrained, the folder that it exported)"
        )
    if changed:
        rank_zero_warn(
            f"{checkpoint} is resumed with other settings than its run had:\n{_lines(changed)}"
        )


def _lines(changed: dict[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {name}: {old} → {new}" for name, (old, new) in changed.items())

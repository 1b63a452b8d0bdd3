"""Export of a trained model to a Hugging Face folder, with a record of the training."""

import json
import os
from functools import partial
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from lightning_modules.checkpoint_files import SafeCheckpointIO
from lightning_modules.checkpoints import by_the_first, is_there
from lightning_modules.locks import FolderLock
from lightning_modules.run_settings import AUGMENTATION, ema_decay
from mctf_hf.hub import check_folder, save
from mctf_hf.model_card import public_name
from mctf_hf.model_folder import TRAINING
from mctf_hf.registry import build
from mctf_hf.teacher import r_max_of


class HuggingFaceFolder(Callback):
    """Writes the best model as a Hugging Face folder when training ends.

    The module holds these weights from then on.

    Args:
        folder: output folder. Unset: ``huggingface`` in the trainer's log directory.
        best: use the weights of the best checkpoint, if there is one; otherwise the last weights.
    """

    def __init__(self, folder: str | None = None, best: bool = True):
        self.folder = folder
        self.best = best
        self._gathered: dict[str, Any] | None = None
        self._lock: FolderLock | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and self.folder is not None:
            by_the_first(trainer, self._take_folder)  # fail now, not after hours of training

    def _take_folder(self) -> None:
        assert self.folder is not None
        folder = check_folder(self.folder)
        if folder.exists() and not os.access(folder, os.W_OK):
            raise PermissionError(
                f"export.folder={self.folder!r} is not allowed: it can't be written to"
            )
        self._lock = FolderLock(folder, "export.folder", beside=True)
        self._lock.acquire()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        if self._lock is not None:
            self._lock.release()

    def on_exception(self, *args: Any) -> None:
        self.teardown()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, FSDPModule):  # here, all processes still hold their shards
            options = StateDictOptions(full_state_dict=True)
            self._gathered = get_model_state_dict(pl_module, options=options)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.fast_dev_run or trainer.interrupted:
            return
        log_dir = trainer.log_dir or trainer.default_root_dir  # all processes must read log_dir
        weights = self._best_checkpoint(trainer)
        state = self._gathered
        in_shards = isinstance(pl_module, FSDPModule)
        if not weights and in_shards and state is None:  # a finished run was resumed
            weights = str(trainer.ckpt_path)
        if weights:
            # Other nodes may not see the disk of the first process.
            load = partial(
                SafeCheckpointIO().load_checkpoint, map_location="cpu", weights_only=True
            )
            state = by_the_first(trainer, lambda: load(weights)["state_dict"])
        if in_shards:
            pl_module.model = build(pl_module.model.config)
        if state is not None:
            own = {name[6:]: value for name, value in state.items() if name.startswith("model.")}
            pl_module.model.load_state_dict(own)
        if trainer.is_global_zero:
            folder = self.folder or os.path.join(log_dir, "huggingface")
            record = json.dumps(training_record(trainer, pl_module), indent=2) + "\n"
            try:
                save(pl_module.model, pl_module.image_processor, folder, files={TRAINING: record})
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"{folder} was not written, and its files are unchanged. Resume the run from "
                    "its last checkpoint when there is room, which writes the folder without "
                    f"training again ({error.__cause__ or error})"
                ) from error
            rank_zero_info(f"Hugging Face model ({weights or 'last weights'}): {folder}")

    def _best_checkpoint(self, trainer: L.Trainer) -> str | None:
        if not self.best:
            return None
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor:
                path = callback.best_model_path
                if path and not is_there(trainer, path):
                    rank_zero_warn(f"The best checkpoint, {path}, is gone: the last weights count")
                    return None
                return path or None
        return None


def training_record(trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
    """Settings that are needed to repeat a training, by name.

    The record may be published, so it contains only the last name of local folders.
    """
    data = trainer.datamodule
    names = ("dataset", "name", "revision", "train_split", "batch_size", "repeated_augmentation")
    record = {name: getattr(data, name, None) for name in (*names, *AUGMENTATION)}
    record |= {name: value for name, value in pl_module.hparams.items() if name[0] != "_"}
    record |= {
        "problem_type": pl_module.problem_type,
        "label_smoothing": pl_module.loss.label_smoothing,
        "r_max": r_max_of(pl_module.model.config, pl_module.r_max),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "processes": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": str(trainer.precision),
        "ema_decay": ema_decay(trainer),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": L.__version__,
    }
    for name in ("pretrained", "dataset", "distill_from"):
        record[name] = public_name(record[name])
    if record["distill_from"] is None:
        for name in ("distillation", "distillation_weight", "distillation_temperature"):
            del record[name]
    if not pl_module.r_max:  # without a teacher, these have no effect
        for name in ("teacher_weight", "consistency_weight", "confidence_threshold"):
            del record[name]
    return {name: value for name, value in record.items() if value is not None}

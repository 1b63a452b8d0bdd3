"""What happens around training: the Hugging Face folder at its end, predictions to a file."""

import csv
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from mctf_hf.hub import save


class HuggingFaceFolder(Callback):
    """Write the best model as a Hugging Face folder when training ends.

    Args:
        folder: where to. Unset: ``huggingface`` in the trainer's log directory.
        best: take the weights of the best checkpoint, if one was kept; otherwise the last ones.
    """

    def __init__(self, folder: str | None = None, best: bool = True):
        self.folder = folder
        self.best = best

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run or trainer.interrupted:
            return
        weights = self._best_checkpoint(trainer)
        if weights:
            state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
            pl_module.load_state_dict(state)
        folder = self.folder or os.path.join(
            trainer.log_dir or trainer.default_root_dir, "huggingface"
        )
        save(pl_module.model, pl_module.image_processor, folder)
        rank_zero_info(f"Hugging Face model ({weights or 'last weights'}): {folder}")

    def _best_checkpoint(self, trainer: L.Trainer) -> str | None:
        if not self.best:
            return None
        kept = [
            c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor
        ]
        return next((c.best_model_path for c in kept if c.best_model_path), None)


class PredictionFile(BasePredictionWriter):
    """Write predictions to a CSV or JSON Lines file, which appears when all of them are there.

    Args:
        path: of the file; it ends in ``.csv`` or ``.jsonl``.
    """

    def __init__(self, path: str = "predictions.csv"):
        super().__init__(write_interval="epoch")
        if Path(path).suffix not in (".csv", ".jsonl"):
            raise ValueError(f"path={path!r} is not allowed: it ends in .csv or .jsonl")
        self.path = Path(path)

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        rows = [row for batch in predictions for row in batch]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w",
            dir=self.path.parent,
            prefix=f".{self.path.name}.",
            delete=False,
            newline="",
            encoding="utf-8",
        ) as draft:
            if self.path.suffix == ".csv":
                writer = csv.DictWriter(draft, fieldnames=["file", "label", "score"])
                writer.writeheader()
                writer.writerows(rows)
            else:
                draft.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(draft.name, self.path)
        rank_zero_info(f"{len(rows)} predictions: {self.path}")

"""A callback that writes predictions to a file."""

import json
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.checkpoints import by_the_first
from mctf_hf.checks import check_range
from mctf_hf.files import draft, write_csv


class PredictionFile(BasePredictionWriter):
    """Writes predictions to a CSV or JSON Lines file, which appears when it is complete.

    The columns are ``file``, ``label`` and ``score``; if unreadable images are skipped, ``error``
    contains the reason. In CSV, ``'`` precedes texts that a spreadsheet would treat as formulas.
    Bytes of a file name that are not UTF-8 are written as ``\\udc80`` to ``\\udcff``.

    Args:
        path: output file, which ends in ``.csv`` or ``.jsonl``.
        top_k: number of labels per image, each in its own row, highest score first. In regression,
            all values are written.
    """

    def __init__(self, path: str = "predictions.csv", top_k: int = 1):
        super().__init__(write_interval="epoch")
        if Path(path).suffix not in (".csv", ".jsonl"):
            raise ValueError(f"path={path!r} is not allowed: it must end in .csv or .jsonl")
        check_range(1, top_k=top_k)
        self.path = Path(path)
        self.top_k = top_k

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.top_k = self.top_k
        if stage == "predict":  # raise errors before the work, not after it
            by_the_first(trainer, self._check_path)

    def _check_path(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"predictions.path={str(self.path)!r} cannot be written: its folder cannot be made "
                f"({error.strerror})"
            ) from error
        if self.path.is_dir():
            raise IsADirectoryError(f"predictions.path={str(self.path)!r} is a folder")
        if not os.access(self.path.parent, os.W_OK):
            raise PermissionError(f"predictions.path={str(self.path)!r} cannot be written there")

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        rows = [row for batch in predictions for row in batch]
        if trainer.world_size > 1:  # each process has a share, which padding may repeat
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, rows)
            by_file = {
                file: list(group)
                for share in shares
                for file, group in groupby(share, key=lambda row: row["file"])
            }
            rows = [row for file in sorted(by_file, key=Path) for row in by_file[file]]
        if trainer.is_global_zero:
            self._write(rows)
            skipped = sum(bool(row.get("error")) for row in rows)
            images = len({row["file"] for row in rows}) - skipped
            unread = f", and {skipped} that can't be read" if skipped else ""
            rank_zero_info(f"Predictions of {images:,} images{unread}: {self.path}")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (
            draft(self.path) as path,
            path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            if self.path.suffix == ".csv":
                columns = list(rows[0]) if rows else ["file", "label", "score"]
                write_csv(file, columns, rows)
            else:
                lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
                file.writelines(f"{line}\n" for line in lines)

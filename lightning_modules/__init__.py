"""Finetuning with Lightning: the training logic, the data and what surrounds them."""

from .callbacks import BestCheckpoint, HuggingFaceFolder, LastCheckpoint, PredictionFile
from .data import HFImageDataModule
from .finetuning import MCTFFinetuner

__all__ = [
    "BestCheckpoint",
    "HFImageDataModule",
    "HuggingFaceFolder",
    "LastCheckpoint",
    "MCTFFinetuner",
    "PredictionFile",
]

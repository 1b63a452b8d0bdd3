"""Finetuning with Lightning: the training logic, the data and what surrounds them."""

from .callbacks import HuggingFaceFolder, PredictionFile
from .data import HFImageDataModule
from .finetuning import MCTFFinetuner

__all__ = ["HFImageDataModule", "HuggingFaceFolder", "MCTFFinetuner", "PredictionFile"]

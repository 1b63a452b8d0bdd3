"""Public names of ``lightning_modules``."""

from .checkpoints import AveragedWeights, BestCheckpoint, LastCheckpoint
from .data import HFImageDataModule
from .finetuning import MCTFFinetuner
from .image_task import ImageTask
from .model_export import HuggingFaceFolder
from .predictions import PredictionFile
from .watching import FusedTokensPicture, ProgressLines, Summary, Watch, make_loggers

__all__ = [
    "AveragedWeights",
    "BestCheckpoint",
    "FusedTokensPicture",
    "HFImageDataModule",
    "HuggingFaceFolder",
    "ImageTask",
    "LastCheckpoint",
    "MCTFFinetuner",
    "PredictionFile",
    "ProgressLines",
    "Summary",
    "Watch",
    "make_loggers",
]

"""What ``lightning_modules`` offers by name."""

from .callbacks import HuggingFaceFolder, PredictionFile
from .checkpoints import AveragedWeights, BestCheckpoint, LastCheckpoint
from .data import HFImageDataModule
from .finetuning import MCTFFinetuner
from .watching import FusedTokensPicture, ProgressLines, Summary, Watch, make_loggers

__all__ = [
    "AveragedWeights",
    "BestCheckpoint",
    "FusedTokensPicture",
    "HFImageDataModule",
    "HuggingFaceFolder",
    "LastCheckpoint",
    "MCTFFinetuner",
    "PredictionFile",
    "ProgressLines",
    "Summary",
    "Watch",
    "make_loggers",
]

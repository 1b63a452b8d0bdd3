"""All commands, and suggestions for mistyped words."""

import difflib
from collections.abc import Sequence

# Commands and what they do. Those of Lightning's command line share one module; each other command
# has a module of its own name. A module is imported only when its command runs.
FINETUNING = {
    "fit": "finetune a model for the fusion of its tokens, or train one",
    "validate": "measure a model on the split that finetuning validates on",
    "test": "measure a model on a test split",
    "predict": "write what a model makes of images to a file",
}
COMMANDS = FINETUNING | {
    "demo": "train, fuse, finetune and compare small models of handwritten digits",
    "benchmark": "time models side by side: cost, speed, memory, accuracy",
    "benchmark-data": "time the input pipeline by itself",
    "convert": "make a folder that loads anywhere from a checkpoint of other code",
    "embed": "turn a collection of images into vectors, on as many machines as there are",
    "export": "write a model as ONNX or as a program of torch.export",
    "neighbours": "find the images of a collection that are nearest to one, or to a text",
    "push": "put a model on the Hub, with its card",
    "sweep": "compare methods of fusion at several budgets on real images",
    "tune": "find the setting of fusion that loses least at a budget, without training",
    "visualize": "draw which tokens a model has fused",
    "web": "show in the browser what fusion makes of images, or write a Space of it",
    "completion": "print what lets a shell complete commands and options",
}

MISUSED = 2  # argparse's exit status for wrong arguments


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that is closest to a mistyped one; ``None`` if no word is close."""
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)

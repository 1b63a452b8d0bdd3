"""What a model needs of images and labels: all that a dataset knows of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mctf_hf.classes import names_of
from mctf_hf.problems import SINGLE, problem_type


@dataclass(frozen=True)
class ImageTask:
    """The pixels and labels that a model takes.

    Attributes:
        processor: the image processor, which makes the pixels.
        num_labels: outputs of the model's head.
        problem_type: what labels are, as ``config.problem_type`` has it.
        num_channels: of the pixels.
        class_names: the model's, in its order; empty if its classes have none.
    """

    processor: Any
    num_labels: int
    problem_type: str = SINGLE
    num_channels: int = 3
    class_names: Sequence[str] = ()

    @classmethod
    def of(cls, config: Any, processor: Any) -> "ImageTask":
        """That of a classifier of transformers, by its configuration."""
        return cls(
            processor,
            config.num_labels,
            problem_type(config),
            config.num_channels,
            tuple(names_of(config)),
        )

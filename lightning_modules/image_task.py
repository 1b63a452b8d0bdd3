"""The pixels and labels that a model takes. Datasets need no other information about the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mctf_hf.classes import names_of
from mctf_hf.problems import SINGLE, problem_type


@dataclass(frozen=True)
class ImageTask:
    """The pixels and labels that a model takes.

    Attributes:
        processor: image processor, which computes the pixels.
        num_labels: number of outputs of the model's head.
        problem_type: kind of labels, as in ``config.problem_type``.
        num_channels: number of image channels.
        class_names: names of the model's classes, in its order; empty if they have no names.
    """

    processor: Any
    num_labels: int
    problem_type: str = SINGLE
    num_channels: int = 3
    class_names: Sequence[str] = ()

    @classmethod
    def of(cls, config: Any, processor: Any) -> "ImageTask":
        """Task of a transformers classifier, from its configuration."""
        return cls(
            processor,
            config.num_labels,
            problem_type(config),
            config.num_channels,
            tuple(names_of(config)),
        )

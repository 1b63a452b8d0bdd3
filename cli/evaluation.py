"""Cost, speed and accuracy of a model, with its own and with other amounts of fusion."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.amounts import Amount, add_up, amount_text, as_counts, sweep
from lightning_modules.image_task import ImageTask
from lightning_modules.labelled_images import LabelledImages, PixelReader
from lightning_modules.opening import NamedDataset
from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification
from mctf_hf.classes import check_classes
from mctf_hf.cost import describe
from mctf_hf.model_card import Evaluation, Measurement
from mctf_hf.problems import quality
from mctf_hf.registry import NO_FUSION, plain_class, plain_config

from .measuring import images_per_second, machine_name
from .paths import evenly_spaced


def open_labelled(
    data: NamedDataset,
    split: str,
    max_images: int | None,
    model: Any,
    processor: Any,
    image_column: str | None = None,
    label_column: str | None = None,
) -> LabelledImages:
    """Open a split of a dataset, or evenly spaced rows of it, for a model.

    Args:
        image_column, label_column: see :func:`.find_columns`.

    Raises:
        ValueError: if the split or a column is missing, the labels do not match the model's, or the
            model has no head for them.
    """
    if not hasattr(model, "classifier"):
        raise ValueError(
            f"accuracy on {data.dataset} is not allowed with {type(model).__name__}, which has no "
            "head for classes: finetune it with num_labels first"
        )
    task = ImageTask.of(model.config, processor)
    rows = data.rows(split, task, image_column=image_column, label_column=label_column)
    if rows.label_names is not None:
        check_classes(model.config, rows.label_names, "the model", data.dataset)
    indices = np.array(evenly_spaced(len(rows), max_images))
    reader = PixelReader(processor, model.config.num_channels)
    return LabelledImages(rows, reader, indices=indices)


@torch.inference_mode()
def evaluate(
    model: MCTFViTForImageClassification,
    images: LabelledImages | None,
    *,
    batch_size: int,
    rounds: int = 10,
) -> Evaluation:
    """Measure a model and the same weights without fusion, as a plain model if there is one.

    Args:
        images: images for accuracy and speed; ``None`` measures only speed, on random numbers.
        batch_size: number of images per call, for the speed.
        rounds: number of timings of each setting; the median is used.
    """
    config = model.config
    settings, described = _named_sweep(config), describe(model)
    pixel_values = _pixel_values(config, images, batch_size)
    plain = plain_model(model)
    unfused = partial(model, r=0) if plain is None else plain
    runs: list[Callable[[], object]] = [partial(unfused, pixel_values)]
    amounts = [as_counts(config, pixel_values, amount) for amount in settings.values()]
    runs += [partial(model, pixel_values, **amount) for amount in amounts]
    speeds = images_per_second(runs, len(pixel_values), rounds=rounds)
    accuracies = [None] * len(runs) if images is None else _accuracies(model, images, settings)

    named = {"no fusion" if plain is None else "no fusion (plain model)": NO_FUSION, **settings}
    costs = [described.of(config, **amount) for amount in named.values()]
    if plain is not None:
        costs[0] = described.unfused
    measured = [
        Measurement(
            name=name,
            **amount,
            gmacs=cost / 1e9,
            images_per_second=speed,
            ratio=speed / speeds[0],
            accuracy=accuracy,
        )
        for (name, amount), cost, speed, accuracy in zip(
            named.items(), costs, speeds, accuracies, strict=True
        )
    ]
    return Evaluation(
        plain=measured[0],
        own=measured[1],
        others=measured[2:],
        batch_size=len(pixel_values),
        machine=f"{machine_name()}, {torch.get_num_threads()} threads, "
        f"{str(model.dtype).removeprefix('torch.')}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        num_images=0 if images is None else len(images),
        metric=quality(config).name,
    )


def plain_model(model: Any) -> Any:
    """The model of transformers with the same weights; ``None`` if transformers has none."""
    own, config = type(model), model.config
    plain = plain_class(own, config)
    if plain is None:
        return None
    made = plain(plain_config(own, config))
    made.load_state_dict(model.state_dict())
    return made.to(model.dtype).eval()


def _named_sweep(config: MCTFViTConfig) -> dict[str, Amount]:
    """The configured amount of fusion, and amounts that meet a few budgets, by name."""
    own, *others = sweep(config)
    return {
        f"**{amount_text(own)}, as configured**": own,
        **{amount_text(amount): amount for amount in others},
    }


def _pixel_values(config: MCTFViTConfig, images: LabelledImages | None, batch_size: int) -> Tensor:
    if images is None:
        height, width = config.usual_size
        return torch.randn(batch_size, config.num_channels, height, width)
    count = min(batch_size, len(images))
    return torch.stack([images[i]["pixel_values"] for i in range(count)])


def _accuracies(
    model: MCTFViTForImageClassification,
    images: LabelledImages,
    settings: dict[str, Amount],
) -> list[float]:
    """Mean :class:`.Quality` of the images, without fusion and with each setting."""
    batches = DataLoader(images, batch_size=64, num_workers=2)
    sums, total = add_up(model, batches, [NO_FUSION, *settings.values()])
    return (sums / total).tolist()

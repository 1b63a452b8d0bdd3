"""Loading models from folders and the Hub, with a report of the weights that do not fit."""

from typing import Any, NamedTuple

from transformers.utils import logging

from .checks import check_weights
from .modeling_mctf_vit import MCTFViTForImageClassification, MCTFViTModel
from .registry import class_of, stored_config
from .weight_files import UNREADABLE, reading


class Misfits(NamedTuple):
    """Differences between the weights of a checkpoint and of a model.

    Attributes:
        unknown: names that only the checkpoint has.
        missing: names that only the model has; these weights are newly initialised.
        misshapen: text with both shapes, by name of the weights whose shapes differ; these weights
            are newly initialised too.
    """

    unknown: list[str]
    missing: list[str]
    misshapen: dict[str, str]


def load_reported(model_class: Any, name: Any, **options: Any) -> tuple[Any, Misfits]:
    """Load a model even if weights do not fit, and return it with its :class:`Misfits`.

    Args:
        name: folder, or id on the Hub.
        options: keyword arguments of ``from_pretrained``.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report replaces the warnings
    try:
        model, report = model_class.from_pretrained(
            name, **options, ignore_mismatched_sizes=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    misshapen = {
        key: f"{key} {list(found)}, not {list(wanted)}"
        for key, found, wanted in report["mismatched_keys"]
    }
    unknown, missing = sorted(report["unexpected_keys"]), sorted(report["missing_keys"])
    return model, Misfits(unknown, missing, misshapen)


def load_pretrained(
    name: str, model_class: type[Any] | None = None, **settings: Any
) -> MCTFViTForImageClassification:
    """Load a checkpoint of transformers or of this library, whose weights all have to fit.

    Args:
        name: local folder, or id on the Hub.
        model_class: class of this library; unset, the result of :func:`.class_of`. A ViT encoder is
            loaded without the pooler that transformers adds to it.
        settings: fields of the configuration, such as ``r``, that replace the checkpoint's.

    Raises:
        OSError: if the model does not exist.
        ValueError: for another architecture, files that cannot be read, weights that are not
            finite, or weights that are unknown, missing or misshapen; the message lists these.
    """
    if "model_type" not in stored_config(name):
        raise ValueError(
            f"{name} holds no model of transformers, for its config.json has no model_type: if it "
            "is timm's, convert its model.safetensors"
        )
    model_class = class_of(name) if model_class is None else model_class
    model_class.config_class.from_pretrained(name, **settings)  # checks the architecture
    bare = issubclass(model_class, MCTFViTModel)
    own = {"add_pooling_layer": False} if bare else {}
    with reading(name, UNREADABLE):
        model, misfits = load_reported(model_class, name, **settings, **own)
    unknown = [key for key in misfits.unknown if not (bare and key.startswith("pooler."))]
    complain(unknown=unknown, missing=misfits.missing, misshapen=sorted(misfits.misshapen.values()))
    check_weights(model, name)
    return model.eval()


def complain(**problems: list[str]) -> None:
    """Raise ValueError if there are weights with problems, and list them by kind of problem."""
    found = [f"{kind.replace('_', ' ')}: {names}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"the weights do not fit a ViT: {'; '.join(found)}")

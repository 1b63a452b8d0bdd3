"""Models from folders and the Hub, with a report of the weights that do not fit."""

from typing import Any, NamedTuple

from transformers.utils import logging

from .checks import check_weights
from .modeling_mctf_vit import MCTFViTForImageClassification, MCTFViTModel
from .registry import class_of, stored_config
from .weight_files import UNREADABLE, reading


class Misfits(NamedTuple):
    """Weights that a checkpoint and a model do not share.

    Attributes:
        unknown: names that the model does not have.
        missing: names that the checkpoint does not have; they are as new.
        misshapen: names of weights of another shape, which are as new, too, with a text of both.
    """

    unknown: list[str]
    missing: list[str]
    misshapen: dict[str, str]


def load_reported(model_class: Any, name: Any, **options: Any) -> tuple[Any, Misfits]:
    """``from_pretrained`` of a class, whatever does not fit, and what that is.

    Args:
        name: folder, or id on the Hub.
        options: of ``from_pretrained``.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report says all
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
    """A model from a folder of transformers or of this library, with all of its weights.

    Args:
        name: local folder, or id on the Hub.
        model_class: of this library; unset, that of :func:`.class_of`. A ViT's encoder comes
            without the pooler that transformers puts on it.
        settings: fields of the configuration, such as ``r``, that replace the checkpoint's.

    Raises:
        OSError: if there is no such model.
        ValueError: for another architecture, files that cannot be read, or unless the weights are
            exactly those of the model, and finite; all that are unknown, missing or misshapen are
            listed.
    """
    if "model_type" not in stored_config(name):
        raise ValueError(
            f"{name} holds no model of transformers, for its config.json has no model_type: if it "
            "is timm's, convert the model.safetensors that lies there"
        )
    model_class = class_of(name) if model_class is None else model_class
    model_class.config_class.from_pretrained(name, **settings)  # says what it has to of another
    bare = issubclass(model_class, MCTFViTModel)
    own = {"add_pooling_layer": False} if bare else {}
    with reading(name, UNREADABLE):
        model, misfits = load_reported(model_class, name, **settings, **own)
    unknown = [key for key in misfits.unknown if not (bare and key.startswith("pooler."))]
    complain(unknown=unknown, missing=misfits.missing, misshapen=sorted(misfits.misshapen.values()))
    check_weights(model, name)
    return model.eval()


def complain(**problems: list[str]) -> None:
    """Raise ValueError for weights, by what is wrong with them, if there are any."""
    found = [f"{kind.replace('_', ' ')}: {names}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"the weights do not fit a ViT: {'; '.join(found)}")

"""The settings of token fusion, and the mixins that all encoder configurations share."""

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.utils import logging

from .limits import check_extent, check_setting
from .reducers import REDUCERS, Reducer, build_reducer
from .schedule import (
    ScheduleMixin,
    check_dropped,
    check_inflection,
    check_keep_rate,
    check_tokens_fused,
    is_number,
)

logger = logging.get_logger(__name__)

# The better value for the class token with the default method, see docs/encoders.md.
ROPE_POSITIONS = "kept"

# The amounts with which no tokens are reduced.
_NOTHING: dict[str | None, int] = {"r": 0, "keep_rate": 1}


def _check_reduction(value: str) -> None:
    if value != "none" and value not in REDUCERS:
        raise ValueError(
            f"reduction={value!r} is not allowed: it must be one of {', '.join(REDUCERS)}, none. "
            "Import the module of your own method first. A saved model with its own method loads "
            "with trust_remote_code=True where this library is not imported."
        )


def _check_layers(value: list[int] | None) -> None:
    if value is not None and len(set(value)) != len(value):
        raise ValueError(f"fusion_layers={value!r} is not allowed: it names a layer twice")


def one_of(name: str, *allowed: str | None) -> Any:
    """Metadata of a field that allows only the values ``allowed``."""

    def check(value: str | None) -> None:
        if value not in allowed:
            named = ", ".join(map(str, filter(None, allowed)))
            raise ValueError(f"{name}={value!r} is not allowed: it must be one of {named}")

    return {"validator": check}


def number(name: str, low: float, high: float = math.inf, *, below: bool = False) -> Any:
    """Metadata of a field for numbers of at least ``low`` and at most, or below, ``high``."""

    def check(value: float) -> None:
        if not is_number(value) or value < low or value > high or (below and value == high):
            limit = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
            raise ValueError(
                f"{name}={value!r} is not allowed: it must be a number of at least {low:g}{limit}"
            )

    return {"validator": check}


@dataclass(kw_only=True)
class FusionConfigMixin(ScheduleMixin):
    """Settings of token fusion, shared by the configurations of all backbones.

    Args:
        reduction: method that reduces the tokens: ``"mctf"``, ``"tome"`` (Token Merging, arXiv
            2210.09461), ``"pitome"`` (arXiv 2405.16148), ``"diffrate"`` (arXiv 2305.17997),
            ``"evit"`` (arXiv 2202.07800), ``"token_mergence"`` (arXiv 2306.04897), a method
            registered with :func:`.reducers.register`, or ``"none"`` for the plain model.
        inflection: change of ``r`` over the layers, as in ToMe, with a mean of ``r``: 1 rises
            linearly from 0 to ``2 r``, -1 falls linearly from ``2 r`` to 0, 0 is constant.
            ``r=(8, -1)`` sets both.
        r: number of tokens that each fusing layer removes: a count (1, 2, …), a fraction in (0, 1)
            of the patch tokens that enter the layer, 0 for none, or a list of these with one entry
            per layer. ``"evit"`` and ``"token_mergence"`` use ``keep_rate`` instead.
        keep_rate: fraction in (0, 1] of the patch tokens that each fusing layer keeps, or a list
            of these with one entry per layer.
        fuse_token: whether ``"evit"`` sums the tokens that it does not keep into one more token;
            otherwise it drops them.
        fusion_layers: zero-based indices of the layers that fuse. ``None`` selects the method's
            default (all but the first for ``"mctf"``, the 4th, 7th and 10th of 12 for ``"evit"``
            and ``"token_mergence"``, all for the others), or the layers in which a list in ``r`` or
            ``keep_rate`` fuses.
        tau_sim: temperature of the similarity criterion; 0 switches it off. This setting and those
            down to ``class_share`` belong to ``"mctf"``.
        tau_info: temperature of the informativeness criterion; 0 switches it off.
        tau_size: temperature of the size criterion; 0 switches it off.
        bidirectional: whether to fuse half of the tokens forward and half backward; otherwise all
            are fused forward.
        one_step_ahead: attention that measures informativeness: ``"approximate"`` (the layer's
            own, reused for the fused tokens), ``"precise"`` (the layer's own, computed again after
            fusion), ``"present"`` (the attention just applied, to fuse between attention and MLP)
            or ``"past"`` (the attention that the layer used, to fuse after the layer).
        pooling: weight of a token in its pool: ``"attention_size"`` (attention received times
            size), ``"size"``, ``"mean"`` (equal weights), or ``"max"`` (elementwise maximum).
        key_share: weight of the keys in the similarity of ``"mctf"``, a geometric mean: from 0
            (tokens only) to 1 (keys only).
        class_share: weight of the attention from the class token in the informativeness of
            ``"mctf"``, a geometric mean with the attention received from all tokens.
        margin: cosine above which ``"pitome"`` treats tokens as similar in the first layer; it
            decreases linearly with depth, to 0 after the last layer.
        dropped: number of a layer's removed tokens that ``"diffrate"`` drops instead of merging: a
            count, a fraction in (0, 1) of them, or a list of these with one entry per layer.
        proportional_attention: whether to add the logarithm of each token's size to its attention
            scores; has no effect on ``"evit"`` and ``"pitome"``.
        min_tokens: smallest number of tokens that a layer leaves, prefix tokens included.
        restore: whether each original position gets the row of its token after the last layer, so
            that the number of tokens is as without fusion; otherwise the model outputs the tokens
            left. Dropped tokens cannot be restored.
        skip_unread: whether the last layer computes only the class tokens. Unset, classifiers that
            read no other tokens do so. With ``True``, encoders do so too, and their
            ``last_hidden_state`` has only that row. ``False`` switches it off. It is off in calls
            that ask for fusion outputs, attentions or hidden states, and if hooks see the tokens.

    Raises:
        huggingface_hub.errors.StrictDataclassError: if a value is not allowed; the message
            contains the setting, the value and the allowed values.
    """

    further_settings: ClassVar[tuple[str, ...]] = ()

    reduction: str = field(default="mctf", metadata={"validator": _check_reduction})
    inflection: float | int = field(default=0.0, metadata={"validator": check_inflection})
    # After inflection, because r=(r, inflection) sets that field too.
    r: int | float | list[int | float] | tuple[int | float, int | float] = field(
        default=16, metadata={"validator": check_tokens_fused}
    )
    keep_rate: float | int | list[int | float] = field(
        default=0.7, metadata={"validator": check_keep_rate}
    )
    fuse_token: bool = True
    fusion_layers: list[int] | None = field(default=None, metadata={"validator": _check_layers})
    tau_sim: float | int = field(default=1.0, metadata=number("tau_sim", 0))
    tau_info: float | int = field(default=20.0, metadata=number("tau_info", 0))
    tau_size: float | int = field(default=40.0, metadata=number("tau_size", 0))
    bidirectional: bool = True
    one_step_ahead: str = field(
        default="approximate",
        metadata=one_of("one_step_ahead", "approximate", "precise", "present", "past"),
    )
    pooling: str = field(
        default="attention_size",
        metadata=one_of("pooling", "attention_size", "size", "mean", "max"),
    )
    key_share: float | int = field(default=0.0, metadata=number("key_share", 0, 1))
    class_share: float | int = field(default=0.0, metadata=number("class_share", 0, 1))
    margin: float | int = field(default=0.75, metadata=number("margin", -1, 1))
    dropped: int | float | list[int | float] = field(
        default=0, metadata={"validator": check_dropped}
    )
    proportional_attention: bool = True
    min_tokens: int = field(default=10, metadata=number("min_tokens", 1))
    restore: bool = True
    skip_unread: bool | None = None

    if TYPE_CHECKING:
        class_token: bool

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "r" and isinstance(value, tuple) and len(value) == 2:
            value, self.inflection = value
        super().__setattr__(name, value)

    @property
    def reducer_class(self) -> type[Reducer] | None:
        """The class of the reduction method; ``None`` for ``reduction="none"``."""
        return None if self.reduction == "none" else REDUCERS[self.reduction]

    def check_effect(self, given: Mapping[str, Any]) -> None:
        """Check that the settings the user chose have an effect with this method.

        Raises:
            ValueError: if the method does not use the given ``r`` or ``keep_rate``, an
                ``inflection`` has no single ``r``, or a setting belongs to another method.
        """
        amount = None if self.reducer_class is None else self.reducer_class.amount
        for name, value in given.items():
            if name not in _NOTHING or value is None or name == amount:
                continue
            if amount is None and value == _NOTHING[name]:
                continue
            advice = f"choose another reduction, or leave {name} unset"
            if value == _NOTHING[name]:
                advice = f"set {amount}={_NOTHING[amount]} to reduce nothing"
            raise ValueError(
                f"{name}={value!r} has no effect with reduction={self.reduction!r}, "
                + ("which reduces nothing" if amount is None else f"which goes by {amount}")
                + f": {advice}"
            )
        if given.get("inflection") and (amount != "r" or isinstance(self.r, list)):
            raise ValueError(
                f"inflection={given['inflection']!r} has no effect with "
                f"reduction={self.reduction!r}, r={self.r!r}: it bends a single r"
            )
        own = () if self.reducer_class is None else self.reducer_class.settings
        others = {name: key for key, method in REDUCERS.items() for name in method.settings}
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name, value in given.items():
            if name in others and name not in own and value != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} has no effect with reduction={self.reduction!r}: it is a "
                    f"setting of {others[name]}"
                )

    def fusion_settings(self) -> dict[str, Any]:
        """All settings of fusion by name, and those of ``further_settings``."""
        names = (*(setting.name for setting in fields(FusionConfigMixin)), *self.further_settings)
        return {name: getattr(self, name) for name in names}

    def own_amount(self) -> dict[str, Any]:
        """The amount of reduction as an argument of the model: ``r`` or ``keep_rate``."""
        if self.reducer_class is None:
            return {"r": 0}
        return {self.reducer_class.amount: getattr(self, self.reducer_class.amount)}

    def validate_restore(self) -> None:
        """Check that ``restore`` is off if the method drops tokens."""
        reducer = build_reducer(self)
        if self.restore and reducer is not None and reducer.drops_tokens:
            raise ValueError(
                f"restore={self.restore!r} is not allowed with reduction={self.reduction!r}, which "
                "drops tokens with these settings: set restore to False"
            )

    def validate_skip_unread(self) -> None:
        """Check that the model has a class token if ``skip_unread`` is set."""
        if self.skip_unread and not self.class_token:
            raise ValueError(
                f"skip_unread={self.skip_unread!r} is not allowed in a model without class token, "
                "where all tokens are read"
            )

    def validate_dropped(self) -> None:
        """Check that a list in ``dropped`` has one entry per layer."""
        if isinstance(self.dropped, list) and len(self.dropped) != self.num_hidden_layers:
            raise ValueError(
                f"dropped={self.dropped!r} has {len(self.dropped)} entries: a list has one for "
                f"each of the {self.num_hidden_layers} layers"
            )

    def validate_fusion_layers(self) -> None:
        """Check ``fusion_layers``, and the amounts per layer that depend on it."""
        wrong = [i for i in self.fusion_layers or () if not 0 <= i < self.num_hidden_layers]
        if wrong:
            raise ValueError(
                f"fusion_layers={self.fusion_layers!r} is not allowed: {wrong} are not among the "
                f"layers 0 to {self.num_hidden_layers - 1}"
            )
        if self.reducer_class is not None and self.reducer_class.amount == "keep_rate":
            self.kept_by_layer()
        else:
            self._wanted_by_layer(self.r)


@strict
@dataclass(kw_only=True)
class TokenFusion(FusionConfigMixin):
    """Settings of fusion for an encoder that has no configuration of this library.

    Args:
        num_hidden_layers: number of layers of the encoder.
        num_prefix_tokens: number of tokens before the patches, which are never fused.
        class_token: whether the first token represents the whole image.
        rope_positions: see :class:`RotaryConfigMixin`.
        num_read_tokens: number of prefix tokens read after the last layer; ``None`` for all tokens.
    """

    further_settings: ClassVar = ("rope_positions",)

    num_hidden_layers: int
    num_prefix_tokens: int
    class_token: bool
    rope_positions: str | None = field(
        default=None, metadata=one_of("rope_positions", "mean", "kept", None)
    )
    num_read_tokens: int | None = None


def as_pair(value: Any) -> tuple[int, int]:
    """Height and width of a size given as one number or as two."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


# Names that transformers writes to a config.json, or accepts, besides the configuration's fields.
_NOT_FIELDS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "out_features",
    "out_indices",
    "output_attentions",
    "quantization_config",
    "stage_names",
    "torch_dtype",
    "use_cache",
}


def check_exists(name: str | os.PathLike) -> None:
    """Check that a name that looks like a path, not like a Hub id, exists.

    Raises:
        FileNotFoundError: if it does not exist.
    """
    text = os.fspath(name)
    is_path = text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1
    if (is_path or isinstance(name, os.PathLike)) and not os.path.exists(name):
        raise FileNotFoundError(f"{text}: there is no such folder")


@contextmanager
def reading_config(name: str | os.PathLike) -> Iterator[None]:
    """Raise a one-line error if the config.json of a folder or Hub id cannot be read in the block.

    Raises:
        FileNotFoundError: if the folder or its config.json does not exist.
        ValueError: if the config.json does not contain settings by name.
    """
    check_exists(name)
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("**/config.json")):
        raise FileNotFoundError(f"{name} has no config.json: it is no folder of a model")
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{name}: its config.json holds no settings of a model by name ({error})"
        ) from error


class EncoderConfigMixin(FusionConfigMixin):
    """Mixin for the configuration class of transformers of each of this library's models.

    Attributes:
        auto_classes: classes of the family, by the ``Auto`` class that loads them.
        plain_types: names of the plain models whose checkpoints this class loads, by model type.
        plain_parts: keys of the configurations of such models in larger ones, by the larger type.
        any_size: whether the model accepts images of any size without an option.
    """

    auto_classes: ClassVar[dict[str, str]]
    plain_types: ClassVar[dict[str, str]] = {}
    plain_parts: ClassVar[dict[str, str]] = {}
    any_size: ClassVar[bool] = False
    _auto_class = "AutoConfig"

    if TYPE_CHECKING:
        model_type: ClassVar[str]
        image_size: Any
        patch_size: Any

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_known(name for name in kwargs if not name.startswith("_"))
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            check_setting(name, value)
        except ValueError as error:
            raise StrictDataclassFieldValidationError(field=name, cause=error) from error
        super().__setattr__(name, value)

    @classmethod
    def known(cls) -> set[str]:
        """Names of all settings."""
        return {field.name for field in fields(cls)} | _NOT_FIELDS

    @classmethod
    def check_known(cls, names: Iterable[str]) -> None:
        """Raise ValueError if names are not settings of this configuration."""
        unknown = sorted(set(names) - cls.known())
        if unknown:
            near = difflib.get_close_matches(unknown[0], cls.known(), n=1)
            raise ValueError(
                f"{cls.__name__} has no settings {unknown}"
                + (f": did you mean {near[0]!r}?" if near else "")
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's configuration, and convert that of a plain model.

        Raises:
            FileNotFoundError: if the folder has no config.json.
            ValueError: if the checkpoint has another architecture, or config.json does not contain
                settings by name.
        """
        with reading_config(pretrained_model_name_or_path):
            settings, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            settings = dict(settings.items())
        model_type = settings.get("model_type", next(iter(cls.plain_types), None))
        if model_type not in (*cls.plain_types, *cls.plain_parts, cls.model_type):
            plain = "".join(f"{name!r} ({meaning}), " for name, meaning in cls.plain_types.items())
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {model_type!r}: "
                f"{cls.__name__} loads the types {plain}{cls.model_type!r}"
            )
        if model_type in cls.plain_parts:
            whole = settings
            with reading_config(pretrained_model_name_or_path):
                settings = dict(settings[cls.plain_parts[model_type]].items())
            of_all = ("id2label", "label2id", "problem_type", "projection_dim")
            settings |= {name: whole[name] for name in of_all if name in whole}
        if model_type != cls.model_type:
            with reading_config(pretrained_model_name_or_path):
                settings = cls.of_plain(model_type, settings)
            known = cls.known()  # older releases wrote further settings
            settings = {name: settings[name] for name in settings if name in known}
        return {**settings, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from the content of a config.json, without unknown settings.

        Raises:
            ValueError: if a value has a wrong type, or ``kwargs`` contains a setting that is fixed
                in this architecture.
        """
        known = cls.known()
        unknown = sorted(name for name in set(config_dict) - known if not name.startswith("_"))
        if unknown:
            logger.warning_once(
                f"A config.json of type {cls.model_type!r} has settings that this version does not "
                f"know and that have no effect: {', '.join(unknown)}. Perhaps a newer one wrote it"
            )
        fixed = [name for name in kwargs if name not in known and hasattr(cls, name)]
        cls.check_known(fixed)
        settings = {name: config_dict[name] for name in config_dict if name in known}
        try:
            return super().from_dict(settings, **kwargs)
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise ValueError(
                f"A config.json of type {cls.model_type!r} has a setting of another kind than it "
                f"takes: {error}"
            ) from error

    @classmethod
    def of_plain(cls, model_type: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Convert the settings of a plain model to those of this configuration."""
        return settings

    def validate_extent(self) -> None:
        """Check the sizes that limit each other, for ``image_size`` and the usual image size."""
        for size in (self.image_size, self.usual_size):
            check_extent(self, self.grid(size))

    @property
    def usual_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images that the model is used with."""
        return as_pair(getattr(self, "input_size", None) or self.image_size)

    def num_tokens(self, image_size: int | tuple[int, int] | None = None) -> int:
        """Number of tokens of an image, prefix tokens included; by default of the usual size."""
        rows, columns = self.grid(image_size)
        return rows * columns + self.num_prefix_tokens

    def grid(self, image_size: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """Numbers of rows and columns of patches of an image; by default of the usual size."""
        height, width = self.usual_size if image_size is None else as_pair(image_size)
        patch_height, patch_width = as_pair(self.patch_size)
        return height // patch_height, width // patch_width


@dataclass(kw_only=True)
class AnySizeConfigMixin:
    """Settings of encoders that accept images of any size.

    Args:
        input_size: height and width, in pixels, of the images that the model is used with, if
            different from ``image_size``. Costs and budgets refer to these images.
    """

    any_size: ClassVar[bool] = True
    input_size: int | list[int] | tuple[int, int] | None = None


@dataclass(kw_only=True)
class RotaryConfigMixin:
    """Settings of encoders that rotate queries and keys by their positions (RoPE).

    Args:
        rope_positions: position of a fused token in the next layers: the ``"mean"`` of its members'
            positions, weighted as in the pool (unweighted for maximum pooling), or the position of
            the old token that it started from (``"kept"``).
    """

    rope_positions: str = field(
        default=ROPE_POSITIONS, metadata=one_of("rope_positions", "mean", "kept")
    )

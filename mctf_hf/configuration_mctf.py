"""The settings of token fusion, and what the configurations of all encoders share."""

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

# The better of the two for the class token with the default method, by docs/encoders.md.
ROPE_POSITIONS = "kept"


def _check_reduction(value: str) -> None:
    if value != "none" and value not in REDUCERS:
        raise ValueError(
            f"reduction={value!r} is not allowed: it is one of {', '.join(REDUCERS)}, none. (One "
            "of your own is known once its module is imported; a model that brings one along loads "
            "with trust_remote_code=True where this library is not imported.)"
        )


def _check_layers(value: list[int] | None) -> None:
    if value is not None and len(set(value)) != len(value):
        raise ValueError(f"fusion_layers={value!r} is not allowed: it names a layer twice")


def one_of(name: str, *allowed: str | None) -> Any:
    """Metadata of a field that has one of some values."""

    def check(value: str | None) -> None:
        if value not in allowed:
            named = ", ".join(map(str, filter(None, allowed)))
            raise ValueError(f"{name}={value!r} is not allowed: it is one of {named}")

    return {"validator": check}


def number(name: str, low: float, high: float = math.inf, *, below: bool = False) -> Any:
    """Metadata of a field that is a number of at least ``low`` and at most, or below, ``high``."""

    def check(value: float) -> None:
        if not is_number(value) or value < low or value > high or (below and value == high):
            limit = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
            raise ValueError(
                f"{name}={value!r} is not allowed: it is a number of at least {low:g}{limit}"
            )

    return {"validator": check}


@dataclass(kw_only=True)
class FusionConfigMixin(ScheduleMixin):
    """Settings of token fusion, shared by the configurations of all backbones.

    Args:
        reduction: which method reduces the tokens: ``"mctf"``, ``"tome"`` (Token Merging, arXiv
            2210.09461), ``"pitome"`` (arXiv 2405.16148), ``"diffrate"`` (arXiv 2305.17997),
            ``"evit"`` (arXiv 2202.07800), ``"token_mergence"`` (arXiv 2306.04897), one that
            :func:`.reducers.register` made known, or ``"none"`` for the plain model.
        inflection: how ``r`` changes from layer to layer, as in ToMe: linearly about a mean of
            ``r``, from 0 up to twice as much (1), down to 0 (-1), or not at all (0).
            ``r=(8, -1)`` sets both.
        r: how many tokens a fusing layer fuses away: a count (1, 2, …), a fraction in (0, 1) of
            the patch tokens that reach the layer, 0 for none, or a list of these with one entry
            per layer. Not of ``"evit"`` and ``"token_mergence"``, which go by ``keep_rate``.
        keep_rate: part of the patch tokens that a layer keeps, or a list with one such number per
            layer.
        fuse_token: ``"evit"`` sums up the tokens that are not kept in one more token; or it drops
            them.
        fusion_layers: zero-based indices of the layers that fuse. ``None``: the method's own (all
            but the first for ``"mctf"``, the 4th, 7th and 10th of 12 for ``"evit"`` and
            ``"token_mergence"``, all for the others), or those that an ``r`` or ``keep_rate`` with
            one entry per layer says.
        tau_sim: temperature of the similarity criterion; 0 switches it off. This and the settings
            down to ``class_share`` are those of ``"mctf"``.
        tau_info: temperature of the informativeness criterion; 0 switches it off.
        tau_size: temperature of the size criterion; 0 switches it off.
        bidirectional: fuse half of the tokens forward and half backward, or all forward.
        one_step_ahead: the attention that informativeness is judged by: ``"approximate"`` (the
            layer's own, reused for the fused tokens), ``"precise"`` (the layer's own, computed
            again after fusion), ``"present"`` (fuse between attention and MLP, by the attention
            just applied) or ``"past"`` (fuse after the layer, by the attention it used).
        pooling: weight of a token in its pool: ``"attention_size"`` (attention received times
            size), ``"size"``, ``"mean"`` (all the same), or ``"max"`` (elementwise maximum).
        key_share: weight of the keys in the similarity of ``"mctf"``, from 0 (only the tokens
            count) to 1, in a geometric mean.
        class_share: weight of the attention from the class token in the informativeness of
            ``"mctf"``, likewise; the rest is the attention received from all.
        margin: cosine above which ``"pitome"`` holds tokens for alike, in the first layer; it falls
            to 0 behind the last.
        dropped: how many of the tokens that a layer loses ``"diffrate"`` drops, where it merges the
            rest: a count, a fraction in (0, 1) of them, or a list with one of these per layer.
        proportional_attention: add the logarithm of each token's size to its attention scores;
            ``"evit"`` never does.
        min_tokens: no layer leaves fewer tokens than this, prefix tokens included.
        restore: give each original position its token's row back where the layers end, so that
            what reads the tokens finds as many as it would without fusion; or hand out the tokens
            that are left. Dropped tokens cannot be restored.
        skip_unread: let the last layer compute only the tokens that are read behind it: class
            tokens. Unset, so do classifiers that read no others; ``True`` lets encoders do it,
            too, whose ``last_hidden_state`` then has that one row; ``False`` switches it off. It
            is off in a call that asks for the fusion, for attentions or hidden states, or where
            somebody has hooked on to what it concerns.

    Raises:
        huggingface_hub.errors.StrictDataclassError: for a value outside of what is allowed; the
            message names the setting, the value and the values allowed.
    """

    reduction: str = field(default="mctf", metadata={"validator": _check_reduction})
    inflection: float | int = field(default=0.0, metadata={"validator": check_inflection})
    # After inflection, which (r, inflection) replaces.
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
        """The method of reduction; ``None`` for none."""
        return None if self.reduction == "none" else REDUCERS[self.reduction]

    def check_effect(self, given: Mapping[str, Any]) -> None:
        """Check that settings which somebody chose are those of this method.

        Raises:
            ValueError: for an ``r`` or a ``keep_rate`` that it does not go by, an ``inflection``
                without a single ``r``, or a setting of another method.
        """
        amount = None if self.reducer_class is None else self.reducer_class.amount
        for name, nothing in (("r", 0), ("keep_rate", 1)):
            if given.get(name) not in (None, nothing) and name != amount:
                raise ValueError(
                    f"{name}={given[name]!r} has no effect with reduction={self.reduction!r}, "
                    + ("which reduces nothing" if amount is None else f"which goes by {amount}")
                    + f": choose another reduction, or leave {name} unset"
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

    def own_amount(self) -> dict[str, Any]:
        """How much is reduced, as an argument of the model: its ``r`` or its ``keep_rate``."""
        if self.reducer_class is None:
            return {"r": 0}
        return {self.reducer_class.amount: getattr(self, self.reducer_class.amount)}

    def validate_restore(self) -> None:
        """Check that nothing is restored of which no token is left."""
        reducer = build_reducer(self)
        if self.restore and reducer is not None and reducer.drops_tokens:
            raise ValueError(
                f"restore={self.restore!r} is not allowed with reduction={self.reduction!r}, which "
                "drops tokens with these settings: set restore to False"
            )

    def validate_skip_unread(self) -> None:
        """Check that there is a token which alone can be read."""
        if self.skip_unread and not self.class_token:
            raise ValueError(
                f"skip_unread={self.skip_unread!r} is not allowed in a model without class token, "
                "where all tokens are read"
            )

    def validate_dropped(self) -> None:
        """Check that there are as many entries as layers."""
        if isinstance(self.dropped, list) and len(self.dropped) != self.num_hidden_layers:
            raise ValueError(
                f"dropped={self.dropped!r} has {len(self.dropped)} entries: a list has one for "
                f"each of the {self.num_hidden_layers} layers"
            )

    def validate_fusion_layers(self) -> None:
        """Check what concerns several settings at once."""
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
    """Fusion in the layers of one encoder that has no configuration of this library.

    Args:
        num_hidden_layers: of the encoder.
        num_prefix_tokens: tokens that come before the patches and take no part.
        class_token: whether the first token stands for the whole image.
        rope_positions: see :class:`RotaryConfigMixin`.
        num_read_tokens: how many tokens are read behind the layers; ``None`` for all.
    """

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


# What transformers writes to a config.json, or takes, beside the fields of the configuration.
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
    """Refuse what can only be a folder, and is none: no id on the Hub reads like that.

    Raises:
        FileNotFoundError: for it.
    """
    text = os.fspath(name)
    is_path = text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1
    if (is_path or isinstance(name, os.PathLike)) and not os.path.exists(name):
        raise FileNotFoundError(f"{text}: there is no such folder")


@contextmanager
def reading_config(name: str | os.PathLike) -> Iterator[None]:
    """Tell in a line why the config.json of a folder or Hub id cannot be read.

    Raises:
        FileNotFoundError: for a folder without one, or that does not exist.
        ValueError: for one that holds no settings by name.
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
    """What the configurations of this library's own models share; before one of transformers.

    Attributes:
        auto_classes: the family's classes by the ``Auto`` class that loads them.
        plain_types: types of plain models whose checkpoints this one loads, and their names.
        plain_parts: types of plain models that contain such a one, and where its configuration is.
        further_settings: fields of the configuration that can be set like those of fusion.
        any_size: whether the model takes images of any size as it is.
    """

    auto_classes: ClassVar[dict[str, str]]
    plain_types: ClassVar[dict[str, str]] = {}
    plain_parts: ClassVar[dict[str, str]] = {}
    further_settings: ClassVar[tuple[str, ...]] = ()
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
        """Names of all that can be set."""
        return {field.name for field in fields(cls)} | _NOT_FIELDS

    @classmethod
    def check_known(cls, names: Iterable[str]) -> None:
        """Raise ValueError for names that are no settings of this configuration."""
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
        """Read a checkpoint's configuration; a plain model's counts as this one's.

        Raises:
            FileNotFoundError: for a folder without config.json.
            ValueError: for the checkpoint of another architecture, or a config.json that holds
                something else.
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
            known = cls.known()  # beside what older releases left there
            settings = {name: settings[name] for name in settings if name in known}
        return {**settings, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of what a config.json holds; what is unknown there is left out.

        Raises:
            ValueError: for values that no such configuration has, or a setting in ``kwargs`` that
                this architecture has no choice of.
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
        """The settings of a plain model, as this configuration has them."""
        return settings

    def validate_extent(self) -> None:
        """Check the sizes that limit each other."""
        for size in (self.image_size, self.usual_size):
            check_extent(self, self.grid(size))

    @property
    def usual_size(self) -> tuple[int, int]:
        """Height and width of the images that the model is used with, in pixels."""
        return as_pair(getattr(self, "input_size", None) or self.image_size)

    def num_tokens(self, image_size: int | tuple[int, int] | None = None) -> int:
        """Tokens of an image, prefix tokens included; of the usual size unless given."""
        rows, columns = self.grid(image_size)
        return rows * columns + self.num_prefix_tokens

    def grid(self, image_size: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of patches of an image; of the usual size unless given."""
        height, width = self.usual_size if image_size is None else as_pair(image_size)
        patch_height, patch_width = as_pair(self.patch_size)
        return height // patch_height, width // patch_width


@dataclass(kw_only=True)
class AnySizeConfigMixin:
    """Settings of encoders that take images of any size.

    Args:
        input_size: height and width, in pixels, of the images that the model is used with, if it
            is not ``image_size``; costs and budgets are those of such images.
    """

    any_size: ClassVar[bool] = True
    input_size: int | list[int] | tuple[int, int] | None = None


@dataclass(kw_only=True)
class RotaryConfigMixin:
    """Settings of encoders whose queries and keys are rotated by their positions (RoPE).

    Args:
        rope_positions: where a fused token lies for the layers that follow: at the ``"mean"`` of
            its members' places, with their weights in the pool (without weights for maximum
            pooling), or where the token was that it started from (``"kept"``).
    """

    rope_positions: str = field(
        default=ROPE_POSITIONS, metadata=one_of("rope_positions", "mean", "kept")
    )

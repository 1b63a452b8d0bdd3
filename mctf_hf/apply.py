"""Functions that add token fusion to a loaded model of transformers, and remove it again.

The model stays the same object, with the same weights and weight names. The model, the module that
runs its layers, the layers and their attention modules get new classes that can fuse.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import cached_file

from .anatomy import check_layer
from .configuration_mctf import ROPE_POSITIONS, FusionConfigMixin, TokenFusion
from .families import Encoder, explain, find_encoders, num_read_tokens, supported
from .files import read_object
from .fused_encoder import FusedLayerList, exchange_class, fuse_layers, fused_class
from .fused_layer import Tokens
from .fused_models import FILE, FusedModel, FusedRunner
from .fused_outputs import tracked
from .hosted_layers import (
    SETTINGS,
    Call,
    HostedLayerList,
    enter_calls,
    leave_calls,
    show_to_compiled,
)
from .modeling_mctf_dinov3_vit import FusedRotaryEmbedding
from .registry import BACKBONES


def fuse_tokens(model: Any, **settings: Any) -> Any:
    """Make the vision encoder of a model fuse tokens, in place.

    With ``restore=True``, the default, outputs keep their classes, fields and shapes: at the end of
    the encoder, each original position gets the row of its token. ``model(…, r=8)`` changes the
    amount for one call. ``model(…, output_fusion=True)`` adds three fields to the output:
    ``token_sizes`` (b, m), ``assignment`` (b, n) and ``assignments``, one (b, n) per layer.

    Args:
        model: model of transformers that is or contains an encoder listed by :func:`supported`.
        settings: fields of :class:`.configuration_mctf.FusionConfigMixin`, such as ``r`` and
            ``reduction``, and ``rope_positions`` for encoders with rotary positions.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no supported vision encoder or already fuses tokens, or if
            settings are unknown, have no effect or do not fit. The model is then unchanged.
        huggingface_hub.errors.StrictDataclassError: if a value is not allowed.
    """
    return _fuse(model, settings, settings)


def _fuse(model: Any, settings: dict[str, Any], given: dict[str, Any]) -> Any:
    """See :func:`fuse_tokens`; ``given`` holds the settings that the user chose explicitly."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ValueError(f"fuse_tokens needs a model of PyTorch, and {model!r} is none")
    inside = [path for path, module in model.named_modules() if isinstance(module, FusedModel)]
    if inside and inside != [""]:
        raise ValueError(
            f"{name} contains a model that fuses tokens already, {inside[0]!r}: call unfuse_tokens "
            "with that first"
        )
    if any(isinstance(module, FusedLayerList) for module in model.modules()):
        own = isinstance(getattr(model, "config", None), FusionConfigMixin)
        advice = (
            "change its configuration, or load it with other settings"
            if own
            else "call unfuse_tokens first, or use fusion_of for other settings for a while"
        )
        raise ValueError(f"{name} fuses tokens already: {advice}")
    encoders = find_encoders(model)
    if not isinstance(model, PreTrainedModel) or not encoders:
        raise ValueError(explain(model))
    chosen = [_settings(encoder, settings, given) for encoder in encoders]
    _settle_readers(model, encoders, chosen)
    for encoder, its in zip(encoders, chosen, strict=True):
        fuse_layers(encoder.layers, encoder.family.layer_names, its, HostedLayerList)
        if encoder.family.rotary is not None:
            rotary = encoder.owner.get_submodule(encoder.family.rotary)
            exchange_class(rotary, fused_class(FusedRotaryEmbedding, type(rotary)))
        if encoder.runner is not model:
            exchange_class(encoder.runner, fused_class(FusedRunner, type(encoder.runner)))
            encoder.runner.__dict__["hosted_layers"] = encoder.layers
    exchange_class(model, fused_class(FusedModel, type(model)))
    # Set in __dict__: a second submodule would give its weights a second name.
    model.__dict__["fused_layers"] = [encoder.layers for encoder in encoders]
    return model


def _settle_readers(model: Any, encoders: Sequence[Encoder], chosen: Sequence[TokenFusion]) -> None:
    """Set the number of tokens that the model reads from its encoders.

    Raises:
        ValueError: if ``restore`` or ``skip_unread`` does not suit what the model reads.
    """
    name = type(model).__name__
    owner = encoders[0].owner is model
    pools = "Classification" in name or "WithProjection" in name or hasattr(model, "text_model")
    if not all(one.restore for one in chosen) and not (owner or pools):
        raise ValueError(
            f"restore=False is not allowed with {name}, which has a place for each token: fuse the "
            f"tokens of its {type(encoders[0].owner).__name__} alone, or leave restore as it is"
        )
    read = num_read_tokens(model)
    for one in chosen:
        if not one.skip_unread:
            continue
        if read is None or not one.restore:
            reason = "reads all tokens" if read is None else "hands out all with restore=False"
            raise ValueError(f"skip_unread=True is not allowed with {name}, which {reason}")
        one.num_read_tokens = read


def _settings(encoder: Encoder, settings: dict[str, Any], given: dict[str, Any]) -> TokenFusion:
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ValueError(f"settings {unknown} are not known: they are among {', '.join(SETTINGS)}")
    family, config = encoder.family, encoder.owner.config
    name, reason = type(encoder.owner).__name__, family.hindrance(config)
    if reason is not None:
        raise ValueError(f"tokens of this {name} cannot be fused: {reason}")
    for layer in encoder.layers.children():
        check_layer(layer, family.layer_names)
    if family.rotary is not None:
        settings = {"rope_positions": ROPE_POSITIONS, **settings}
    elif settings.get("rope_positions") is not None:
        raise ValueError(
            f"rope_positions={settings['rope_positions']!r} has no effect on {name}, which has no "
            "rotary positions"
        )
    prefix = family.num_prefix_tokens(config)
    made = TokenFusion(
        num_hidden_layers=len(encoder.layers),
        num_prefix_tokens=prefix,
        class_token=prefix > 0,
        **settings,
    )
    made.check_effect(given)
    if not made.restore and encoder.grid_class is not None:
        raise ValueError(
            f"restore={made.restore!r} is not allowed with {encoder.grid_class}, which makes grids "
            "of its tokens"
        )
    return made


def unfuse_tokens(model: Any) -> Any:
    """Undo :func:`fuse_tokens` on a model, in place.

    Returns:
        The same model.

    Raises:
        ValueError: if :func:`fuse_tokens` was not applied to the model.
    """
    _check_fused(model)
    for layers in model.__dict__.pop("fused_layers"):
        for name in ("settings", "widest", "names", "takes_options", "call", "running"):
            layers.__dict__.pop(name, None)
        layers.__class__ = nn.ModuleList
    for module in model.modules():
        host = type(module).__dict__.get("host")
        if host is not None:
            module.__dict__.pop("hosted_layers", None)
            exchange_class(module, host)
    return model


def _check_fused(model: Any) -> None:
    if not isinstance(model, FusedModel):
        raise ValueError(
            f"{type(model).__name__} was not given fusion by fuse_tokens"
            + (
                ": its own configuration says how it fuses"
                if isinstance(getattr(model, "config", None), FusionConfigMixin)
                else ""
            )
        )


class FusionRecord:
    """The tokens of the model's last call in a block of :func:`fusion_of`.

    Attributes:
        settings: settings of fusion in the block.
    """

    def __init__(self, calls: Sequence[Call]):
        self._calls = calls
        self.settings = calls[0].settings

    def _tokens(self) -> Tokens:
        tokens = self._calls[0].tokens
        if tokens is None:
            raise ValueError("the model has not been called in this block of fusion_of")
        return tracked(tokens, self._calls[0])

    @property
    def token_sizes(self) -> Tensor | None:
        """(b, m), number of embedded tokens that each final token represents."""
        return self._tokens().sizes

    @property
    def assignment(self) -> Tensor | None:
        """(b, n) int64, index of the final token that contains each embedded token, or -1."""
        return self._tokens().assignment()

    @property
    def assignments(self) -> tuple[Tensor, ...] | None:
        """One (b, n) per layer, the assignment of embedded tokens to the layer's output tokens."""
        return self._tokens().assignments


@contextmanager
def fusion_of(model: Any, **settings: Any) -> Iterator[FusionRecord]:
    """Change the settings of fusion within a block, in this thread only.

    Compiled code uses the block that was entered last, in any thread.

    Args:
        model: model that :func:`fuse_tokens` was applied to.
        settings: settings of :func:`fuse_tokens` to change; the others keep their values.

    Yields:
        A record of the tokens of the last call.

    Raises:
        ValueError, huggingface_hub.errors.StrictDataclassError: as :func:`fuse_tokens`.
    """
    _check_fused(model)
    calls = []
    for encoder in find_encoders(model):
        layers = encoder.layers
        assert isinstance(layers, HostedLayerList)
        own = {name: getattr(layers.active().settings, name) for name in SETTINGS}
        chosen = _settings(encoder, _defined(own) | settings, settings)
        calls.append(Call(chosen, history=True))
    _settle_readers(model, find_encoders(model), [call.settings for call in calls])
    before = enter_calls(model.fused_layers, calls)
    show_to_compiled(model.fused_layers, calls, inside=True)
    try:
        yield FusionRecord(calls)
    finally:
        show_to_compiled(model.fused_layers, calls, inside=False)
        leave_calls(model.fused_layers, before)


def _defined(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def from_pretrained(name: str | os.PathLike, **kwargs: Any) -> Any:
    """Load any vision model, with the settings of fusion that were saved or are given.

    Args:
        name: folder or Hub id of a model of this library or of transformers, with or without saved
            settings of fusion.
        kwargs: settings of fusion, which replace the saved ones; all other arguments go to
            ``from_pretrained`` of the model class that the configuration names.

    Raises:
        OSError: if there is no such model.
        ValueError: if the model is to fuse tokens and has no supported vision encoder.
    """
    given = {key: kwargs.pop(key) for key in SETTINGS if key in kwargs}
    of_hub = {name: kwargs[name] for name in _OF_HUB if name in kwargs}
    trust = {k: kwargs[k] for k in ("trust_remote_code",) if k in kwargs}
    config = AutoConfig.from_pretrained(name, **of_hub, **trust)
    if isinstance(config, FusionConfigMixin):
        config.check_effect(given)
        return _class_of(config).from_pretrained(name, **given, **kwargs)
    loaded = _class_of(config).from_pretrained(name, **kwargs)
    model, *report = loaded if isinstance(loaded, tuple) else (loaded,)
    file = cached_file(name, FILE, _raise_exceptions_for_missing_entries=False, **of_hub)
    if file is not None or given:
        saved = {} if file is None else _read(file)
        _fuse(model, _defined(saved) | given, given)
    return (model, *report) if report else model


# Arguments of from_pretrained that select the source of the files.
_OF_HUB = (
    "revision",
    "cache_dir",
    "token",
    "subfolder",
    "local_files_only",
    "force_download",
    "proxies",
)


def _class_of(config: Any) -> Any:
    """The class of transformers, or of this library, that a configuration names."""
    backbone = BACKBONES.get(config.model_type)
    own = () if backbone is None else (backbone.model, backbone.classifier, *backbone.further)
    for architecture in config.architectures or ():
        for known in own:
            if known.__name__ == architecture:
                return known
        if backbone is None and hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    return AutoModel


def _read(file: str) -> dict[str, Any]:
    try:
        return read_object(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: it holds no settings of fusion") from error


__all__ = ["from_pretrained", "fuse_tokens", "fusion_of", "supported", "unfuse_tokens"]

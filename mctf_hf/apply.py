"""Fusion for any vision encoder of transformers: given to a loaded model, and taken away again.

The model stays the object that it was, with its weights and their names. Its layers, and the
modules between them and the model, are told to be of classes that can fuse.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
from transformers.utils import ModelOutput, cached_file

from .anatomy import check_layer
from .configuration_mctf import ROPE_POSITIONS, FusionConfigMixin, TokenFusion
from .families import Encoder, explain, find_encoders, num_read_tokens, supported
from .files import drop_links, read_object, write_text
from .fused_encoder import FusedLayers, check_mask, exchange_class, fuse_layers, fused_class
from .fused_layer import Tokens
from .modeling_mctf_dinov3_vit import FusedRotaryEmbedding
from .reducers import build_reducer
from .registry import BACKBONES
from .schedule import KeepRate, TokensFused

FILE = "token_fusion.json"
# What a user sets; the rest of TokenFusion is the encoder's.
SETTINGS = (*(field.name for field in dataclasses.fields(FusionConfigMixin)), "rope_positions")


@dataclasses.dataclass(eq=False)
class Call:
    """How tokens are fused in some calls, and what became of them.

    Attributes:
        settings: of the fusion.
        r, keep_rate: of these calls, or None.
        unmasked: nobody gave a mask, so that what transformers makes of none for a program that is
            exported masks nothing.
        history: the tokens tell what each layer has made of them, too.
        tokens: of the last of these calls.
    """

    settings: TokenFusion
    r: TokensFused | None = None
    keep_rate: KeepRate | None = None
    unmasked: bool = False
    history: bool = False
    tokens: Tokens | None = None


# By the id of the layers. What is compiled cannot look here and finds it in the layers instead.
_CALLS: ContextVar[dict[int, Call]] = ContextVar("calls")


# The ids of layers that a module of transformers runs here and now.
_RUNNING: ContextVar[frozenset[int]] = ContextVar("running", default=frozenset())


class HostedLayers(FusedLayers):
    """Layers in a model of transformers, which iterates over them to run them one by one.

    While it runs, it finds a single one that runs all; whoever else looks finds each.
    """

    settings: TokenFusion
    call: Call | None = None  # for what is compiled
    running: bool = False
    __repr__ = nn.Module.__repr__  # that of lists does not say how tokens are fused

    def __iter__(self) -> Iterator[nn.Module]:
        runs = self.running
        if not torch.compiler.is_compiling():
            runs = id(self) in _RUNNING.get()
        return iter((self,)) if runs else super().__iter__()

    def extra_repr(self) -> str:
        return f"fusion: {self.settings.reduction}, {self.settings.own_amount()}"

    def _replicate_for_data_parallel(self) -> Any:
        raise ValueError(
            "nn.DataParallel is not supported by models that fuse_tokens was called with: use "
            "DistributedDataParallel, one process for each device"
        )

    def active(self) -> Call:
        """How tokens are fused here and now."""
        call = self.call
        if not torch.compiler.is_compiling():
            call = _CALLS.get({}).get(id(self))
        return Call(self.settings) if call is None else call

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run all layers: (b, n, d) -> (b, n, d), or fewer tokens where some are dropped."""
        call = self.active()
        if kwargs.keys() & {"r", "keep_rate"}:  # of a call that went past the model's own
            call = Call(call.settings, kwargs.pop("r", None), kwargs.pop("keep_rate", None))
        _refuse(kwargs)
        settings, rotary = call.settings, kwargs.pop("position_embeddings", None)
        counts = settings.tokens_fused(hidden_states.shape[1], call.r, call.keep_rate)
        read = settings.num_read_tokens
        if not (any(counts) or read):
            if rotary is not None:
                kwargs["position_embeddings"] = tuple(rotary.rotation)
            call.tokens = Tokens(hidden_states)
            for layer in self.children():
                hidden_states = layer(hidden_states, *args, **kwargs)
            return hidden_states
        reducer = build_reducer(settings)
        drops = reducer is not None and reducer.drops_tokens
        if args:
            mask, args = args[0], (None, *args[1:])
        else:
            mask = kwargs.get("attention_mask")
            kwargs |= {"attention_mask": None} if mask is not None else {}
        if not call.unmasked and any(counts):
            check_mask(mask)
        tokens = self.encode(
            hidden_states,
            *args,
            settings=settings,
            r=call.r,
            keep_rate=call.keep_rate,
            track=not read,
            history=call.history,
            rotary=rotary,
            whole=not drops,
            num_read=read,
            **kwargs,
        )
        call.tokens = tokens
        return tokens.hidden_states if drops else tokens.restored()


def _refuse(options: dict[str, Any]) -> None:
    """Raise ValueError for settings of fusion that a call does not take."""
    wrong = sorted(options.keys() & {*SETTINGS, "output_fusion"})
    if wrong:
        raise ValueError(
            f"{wrong} are not allowed in this call: use fusion_of for a while, and output_fusion "
            "in the call of the model that fuse_tokens was called with"
        )


class FusedRunner:
    """What runs layers with fusion; before its class, of transformers or torch."""

    hosted_layers: HostedLayers

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        host = cls.__dict__.get("host")
        if host is None:  # a class that others make of this one, such as FSDP2
            return

        @functools.wraps(host.forward)
        def forward(self: FusedRunner, *args: Any, **kwargs: Any) -> Any:
            return _run([self.hosted_layers], host.forward, self, *args, **kwargs)

        cls.forward = forward  # type: ignore[attr-defined]


def _run(
    layers: Sequence[HostedLayers], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a forward that iterates over layers to run them."""
    if torch.compiler.is_compiling():
        for one in layers:
            one.running = True
        try:
            return forward(*args, **kwargs)
        finally:
            for one in layers:
                one.running = False
    token = _RUNNING.set(_RUNNING.get() | {id(one) for one in layers})
    try:
        return forward(*args, **kwargs)
    finally:
        _RUNNING.reset(token)


class FusedModel:
    """The model that fusion was given to; before its class of transformers.

    Its calls take ``r``, ``keep_rate`` and ``output_fusion`` beside all else, as the models of this
    library do. Saving writes the settings of fusion beside the checkpoint, which is unchanged.
    """

    fused_layers: list[HostedLayers]
    host: ClassVar[Any]
    config: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new model has no fusion, whatever the one had whose class was called."""
        return cls.host(*args, **kwargs) if args or kwargs else object.__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "host" in cls.__dict__:  # not of a class that others make of this one, such as FSDP2
            cls.forward = _forward_of(cls.host)  # type: ignore[attr-defined]

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the checkpoint as transformers does, and the settings of fusion beside it.

        Raises:
            ValueError: for ``push_to_hub=True``, which would leave the settings behind.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub=True is not allowed in save_pretrained of a model with fusion: use "
                "its push_to_hub(), which takes the settings of fusion along"
            )
        if is_main_process:
            drop_links(save_directory, {FILE})
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if is_main_process:
            settings = self.fused_layers[0].settings
            told = {name: getattr(settings, name) for name in SETTINGS}
            write_text(Path(save_directory, FILE), json.dumps(told, indent=2) + "\n")


def _forward_of(host: type[PreTrainedModel]) -> Callable[..., Any]:
    """The forward of a class of transformers, with settings of fusion for one call."""

    @functools.wraps(host.forward)
    def forward(
        self: FusedModel,
        *args: Any,
        r: TokensFused | None = None,
        keep_rate: KeepRate | None = None,
        output_fusion: bool = False,
        **kwargs: Any,
    ) -> Any:
        _refuse(kwargs)
        calls = [layers.active() for layers in self.fused_layers]
        fewer = not all(call.settings.restore for call in calls)
        exported = torch.compiler.is_exporting()
        if len(calls) > 1 and (output_fusion or fewer):
            raise ValueError(
                f"{'output_fusion=True' if output_fusion else 'restore=False'} is not allowed with "
                f"{type(self).__name__}, which has {len(calls)} vision encoders"
            )
        if (r, keep_rate) == (None, None) and not (output_fusion or fewer or exported):
            return _run(self.fused_layers, host.forward, self, *args, **kwargs)
        active = calls
        if (r, keep_rate) != (None, None):
            calls = [Call(call.settings, r, keep_rate) for call in calls]
        if output_fusion:
            calls = [dataclasses.replace(call, history=True) for call in calls]
        if exported:
            masks = [value for name, value in kwargs.items() if "attention_mask" in name]
            unmasked = all(mask is None for mask in masks)
            calls = [dataclasses.replace(call, unmasked=unmasked) for call in calls]
        as_tuple = kwargs.get("return_dict") is False or (
            kwargs.get("return_dict") is None and not self.config.return_dict
        )
        named = {**kwargs, "return_dict": True} if as_tuple else kwargs
        before = _enter(self.fused_layers, calls)
        try:
            output = _run(self.fused_layers, host.forward, self, *args, **named)
        finally:
            _leave(self.fused_layers, before)
        for one, call in zip(active, calls, strict=True):
            one.tokens = call.tokens
        told = output_fusion or (fewer and not as_tuple)
        output = _told(output, calls, told, fewer, by_layer=output_fusion)
        return output.to_tuple() if as_tuple else output

    return forward


def _told(output: Any, calls: Sequence[Call], told: bool, fewer: bool, *, by_layer: bool) -> Any:
    """An output with what became of the tokens, if that was asked for."""
    if calls[0].tokens is None or not (told or fewer):
        return output
    tokens = _tracked(calls[0].tokens, calls[0])
    if fewer:
        output = _left(output, tokens)
    if not told:
        return output
    found = (tokens.sizes, tokens.assignment(), tokens.assignments if by_layer else None)
    return _extended(type(output))(**dict(output), **dict(zip(_TOLD, found, strict=True)))


def _enter(layers: Sequence[HostedLayers], calls: Sequence[Call]) -> Any:
    """Let layers run as in some calls from here on; returns what :func:`_leave` needs."""
    if torch.compiler.is_compiling():
        before = [one.call for one in layers]
        for one, call in zip(layers, calls, strict=True):
            one.call = call
        return before
    mine = {id(one): call for one, call in zip(layers, calls, strict=True)}
    return _CALLS.set({**_CALLS.get({}), **mine})


def _leave(layers: Sequence[HostedLayers], entered: Any) -> None:
    if not isinstance(entered, list):
        _CALLS.reset(entered)
        return
    for one, call in zip(layers, entered, strict=True):
        one.call = call


_COMPILED = Lock()
_BLOCKS: dict[int, list[Call]] = {}  # of fusion_of, by the id of the layers


def _show_to_compiled(layers: Sequence[HostedLayers], calls: Sequence[Call], inside: bool) -> None:
    """Let what is compiled see the calls of a block, in whatever thread, while it lasts."""
    with _COMPILED:
        for one, call in zip(layers, calls, strict=True):
            blocks = _BLOCKS.setdefault(id(one), [])
            if inside:
                blocks.append(call)
            else:
                blocks[:] = [other for other in blocks if other is not call]
            one.call = blocks[-1] if blocks else None
            if not blocks:
                del _BLOCKS[id(one)]


def _tracked(tokens: Tokens, call: Call) -> Tokens:
    """The tokens of a call with sizes and rows, which layers without fusion do not make."""
    if tokens.rows is not None:
        return tokens
    batch, num_tokens, _ = tokens.hidden_states.shape
    device = tokens.hidden_states.device
    sizes = torch.ones(batch, num_tokens, device=device)
    places = torch.arange(num_tokens, device=device).expand(batch, -1)
    return tokens._replace(
        sizes=sizes,
        rows=torch.arange(batch * num_tokens, device=device),
        assignments=(places,) * call.settings.num_hidden_layers if call.history else None,
    )


def _left(output: Any, tokens: Tokens) -> Any:
    """An output with one row for each token that is left, in place of one for each position.

    Everything that reads tokens has seen each as often as it has patches by then.
    """
    assignment = tokens.assignment()
    assert assignment is not None
    batch, num_tokens = assignment.shape
    places = torch.arange(num_tokens, device=assignment.device).expand(batch, -1)
    first = places.new_full((batch, tokens.hidden_states.shape[1]), num_tokens)
    first = first.scatter_reduce(1, assignment.clamp(min=0), places, "amin")  # [b, m]

    def fewer(value: Any) -> Any:
        if num_tokens == first.shape[1]:
            return value
        return value.gather(1, first[:, :, None].expand(-1, -1, value.shape[2]))

    changed = dict(output)
    whole = changed.get("last_hidden_state")
    if whole is not None and whole.shape[1] == num_tokens:
        changed["last_hidden_state"] = fewer(whole)
    if isinstance(changed.get("vision_model_output"), ModelOutput):
        changed["vision_model_output"] = _left(changed["vision_model_output"], tokens)
    return type(output)(**changed)


# What an output tells of the fusion, besides what transformers' has.
_TOLD: dict[str, Any] = {
    "token_sizes": Tensor | None,
    "assignment": Tensor | None,
    "assignments": tuple[Tensor, ...] | None,
}


def _extended(output: type[Any]) -> type[Any]:
    """A class of outputs with more fields."""
    if "token_sizes" in output.__dataclass_fields__:
        return output
    if output not in _EXTENDED:
        more = [(name, kind, None) for name, kind in _TOLD.items()]
        name = f"Fused{output.__name__}"
        made = dataclasses.make_dataclass(name, more, bases=(output,))
        made.__module__, made.__qualname__ = __name__, name  # by which it is pickled
        globals()[name] = _EXTENDED[output] = made
    return _EXTENDED[output]


_EXTENDED: dict[type[Any], type[Any]] = {}
for _output in (BaseModelOutput, BaseModelOutputWithPooling, BackboneOutput, ImageClassifierOutput):
    _extended(_output)  # what is compiled cannot make classes


def fuse_tokens(model: Any, **settings: Any) -> Any:
    """Let the vision encoder of a model fuse tokens, in place.

    Outputs keep their classes, fields and shapes: where the encoder ends, each original position
    gets its token's row back. ``model(…, r=8)`` fuses another amount in one call, and
    ``model(…, output_fusion=True)`` adds ``token_sizes`` (b, m), ``assignment`` (b, n) and that of
    each layer, ``assignments``, to the output.

    Args:
        model: of transformers: one of the encoders of :func:`supported`, or a model with one in it.
        settings: of :class:`.configuration_mctf.FusionConfigMixin`, such as ``r`` and
            ``reduction``, and ``rope_positions`` for encoders with rotary positions.

    Returns:
        The model.

    Raises:
        ValueError: for a model without a vision encoder that is supported, one that fuses already,
            or settings that do not exist, have no effect or do not fit; nothing is changed then.
        huggingface_hub.errors.StrictDataclassError: for a value outside of what is allowed.
    """
    return _fuse(model, settings, settings)


def _fuse(model: Any, settings: dict[str, Any], given: dict[str, Any]) -> Any:
    """See :func:`fuse_tokens`; ``given`` are those that somebody chose."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ValueError(f"{model!r} is no model, whose tokens could be fused")
    inside = [path for path, module in model.named_modules() if isinstance(module, FusedModel)]
    if inside and inside != [""]:
        raise ValueError(
            f"{name} contains a model that fuses tokens already, {inside[0]!r}: call unfuse_tokens "
            "with that first"
        )
    if any(isinstance(module, FusedLayers) for module in model.modules()):
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
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ValueError(f"settings {unknown} are not known: they are among {', '.join(SETTINGS)}")
    chosen = [_settings(encoder, settings, given) for encoder in encoders]
    _settle_readers(model, encoders, chosen)
    for encoder, its in zip(encoders, chosen, strict=True):
        fuse_layers(encoder.layers, encoder.family.names, its, HostedLayers)
        if encoder.family.rotary is not None:
            rotary = encoder.owner.get_submodule(encoder.family.rotary)
            exchange_class(rotary, fused_class(FusedRotaryEmbedding, type(rotary)))
        if encoder.runner is not model:
            exchange_class(encoder.runner, fused_class(FusedRunner, type(encoder.runner)))
            encoder.runner.__dict__["hosted_layers"] = encoder.layers
    exchange_class(model, fused_class(FusedModel, type(model)))
    # Not a submodule, whose weights would have two names.
    model.__dict__["fused_layers"] = [encoder.layers for encoder in encoders]
    return model


def _settle_readers(model: Any, encoders: Sequence[Encoder], chosen: Sequence[TokenFusion]) -> None:
    """Settle how many tokens are read.

    Raises:
        ValueError: where fewer tokens are to be handed out to what has a place for each.
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
    family, config = encoder.family, encoder.owner.config
    name, reason = type(encoder.owner).__name__, family.hindrance(config)
    if reason is not None:
        raise ValueError(f"tokens of this {name} cannot be fused: {reason}")
    for layer in encoder.layers.children():
        check_layer(layer, family.names)
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
    if not made.restore and encoder.backbone is not None:
        raise ValueError(
            f"restore={made.restore!r} is not allowed with {encoder.backbone}, which makes grids "
            "of its tokens"
        )
    return made


def unfuse_tokens(model: Any) -> Any:
    """Take away from a model what :func:`fuse_tokens` gave it, in place.

    Returns:
        The model.

    Raises:
        ValueError: for a model that was not given fusion.
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
    """What became of the tokens in the last call of a block of :func:`fusion_of`.

    Attributes:
        settings: of the fusion in the block.
    """

    def __init__(self, calls: Sequence[Call]):
        self._calls = calls
        self.settings = calls[0].settings

    def _tokens(self) -> Tokens:
        tokens = self._calls[0].tokens
        if tokens is None:
            raise ValueError("the model has not been called in this block of fusion_of")
        return _tracked(tokens, self._calls[0])

    @property
    def token_sizes(self) -> Tensor | None:
        """(b, m), how many of the embedded tokens each final token stands for."""
        return self._tokens().sizes

    @property
    def assignment(self) -> Tensor | None:
        """(b, n) int64, index of the final token that each embedded one became part of, or -1."""
        return self._tokens().assignment()

    @property
    def assignments(self) -> tuple[Tensor, ...] | None:
        """Of each layer (b, n), the assignment to the tokens that leave it."""
        return self._tokens().assignments


@contextmanager
def fusion_of(model: Any, **settings: Any) -> Iterator[FusionRecord]:
    """Fuse otherwise for a while, in this thread alone.

    What ``torch.compile`` made runs as the block says that was entered last, in any thread.

    Args:
        model: one that :func:`fuse_tokens` was called with.
        settings: any of those that it takes; the others stay as they are.

    Yields:
        A record of what becomes of the tokens.

    Raises:
        ValueError, huggingface_hub.errors.StrictDataclassError: as :func:`fuse_tokens`.
    """
    _check_fused(model)
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ValueError(f"settings {unknown} are not known: they are among {', '.join(SETTINGS)}")
    calls = []
    for encoder in find_encoders(model):
        layers = encoder.layers
        assert isinstance(layers, HostedLayers)
        own = {name: getattr(layers.active().settings, name) for name in SETTINGS}
        chosen = _settings(encoder, _defined(own) | settings, settings)
        calls.append(Call(chosen, history=True))
    _settle_readers(model, find_encoders(model), [call.settings for call in calls])
    before = _enter(model.fused_layers, calls)
    _show_to_compiled(model.fused_layers, calls, inside=True)
    try:
        yield FusionRecord(calls)
    finally:
        _show_to_compiled(model.fused_layers, calls, inside=False)
        _leave(model.fused_layers, before)


def _defined(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def from_pretrained(name: str | os.PathLike, **kwargs: Any) -> Any:
    """Load any vision model, and let it fuse tokens as it was saved, or as is said here.

    Args:
        name: folder, or id on the Hub, of a model of transformers, with or without the settings of
            fusion beside it, or of this library.
        kwargs: settings of fusion, which replace those that were saved; all else goes to
            ``from_pretrained`` of the model's class, which its configuration names.

    Raises:
        OSError: if there is no such model.
        ValueError: for a model without a vision encoder that is supported.
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
    file = cached_file(
        name,
        FILE,
        _raise_exceptions_for_missing_entries=False,
        **of_hub,
    )
    if file is not None or given:
        saved = {} if file is None else _read(file)
        _fuse(model, _defined(saved) | given, given)
    return (model, *report) if report else model


# What says where files come from, of the arguments of from_pretrained.
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

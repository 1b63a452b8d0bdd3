"""Lists of layers that fuse tokens, from the embeddings to the final norm.

:func:`fuse_layers` exchanges the classes of an encoder's layers, so that they run the algorithm of
:mod:`.fused_layer`. It supports every encoder that has names in :mod:`.anatomy`. The modules, their
weights and the weights' names stay the same.
"""

import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging, output_capturing

from .anatomy import LayerNames, attention_core, attention_names, check_layer
from .attention import FusionAttention, Rotation, is_recorded
from .configuration_mctf import FusionConfigMixin
from .fused_layer import FusedLayer, Step, Tokens
from .records import replace
from .reducers import build_reducer
from .schedule import KeepRate, TokensFused

logger = logging.get_logger(__name__)

# Largest activation, in bytes, of the images that a CPU runs through the layers at once.
SLICE_BYTES = 12 * 2**20

_FUSED_CLASSES: dict[tuple[type, type], type] = {}


def fused_class(mixin: type, host: type, **attributes: Any) -> type:
    """Create the class that derives from ``mixin`` and ``host``, or return it if it exists.

    It keeps the host's name, by which libraries find the modules that must not be split. Copies and
    pickles of its instances store the two classes, and create the class again.

    Args:
        attributes: attributes of the class, the same for all modules of ``host``.
    """
    if (mixin, host) not in _FUSED_CLASSES:
        own = {
            "__module__": host.__module__,
            "__qualname__": host.__qualname__,
            "__doc__": host.__doc__,
            "__reduce_ex__": _reduce,
            "host": host,
            "made_of": (mixin, host, attributes),
            **attributes,
        }
        _FUSED_CLASSES[mixin, host] = type(host.__name__, (mixin, host), own)
    return _FUSED_CLASSES[mixin, host]


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    return _new, type(self).made_of, self.__dict__


def _new(mixin: type, host: type, attributes: dict[str, Any]) -> Any:
    return object.__new__(fused_class(mixin, host, **attributes))


def exchange_class(module: nn.Module, new: type) -> None:
    """Change the class of a module, and update a hook of accelerate that it may have."""
    module.__class__ = new
    if "_old_forward" in module.__dict__:  # the method that accelerate's hook calls
        module._old_forward = new.forward.__get__(module)  # type: ignore[attr-defined]


class Rotary(NamedTuple):
    """Positions of an image's patches for encoders that rotate queries and keys.

    Attributes:
        rotation: rotation of the patches, in the form that layers of transformers take.
        coordinates: (patches, 2), float32.
        frequencies: (d / h / 4,), turns of the channels per unit of a coordinate.
    """

    rotation: Rotation
    coordinates: Tensor
    frequencies: Tensor


class FusedLayerList(nn.ModuleList):
    """The layers of an encoder, with a method that runs all of them.

    Attributes:
        settings: settings of fusion.
        widest: number of channels of the widest activation.
        takes_options: whether the original layers accept any keyword; those of DINOv2 before
            transformers 5.18 do not.
        names: names of the parts of a layer.
    """

    settings: FusionConfigMixin
    widest: int
    takes_options: bool
    names: LayerNames

    def encode(
        self,
        hidden_states: Tensor,
        *args: Any,
        settings: FusionConfigMixin | None = None,
        r: TokensFused | None = None,
        keep_rate: KeepRate | None = None,
        track: bool = False,
        history: bool = False,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
        keeps_all: bool = False,
        num_read: int | None = None,
        **kwargs: Any,
    ) -> Tokens:
        """Run all layers: (b, n, d) -> tokens (b, m, d) that are not restored.

        Args:
            args, kwargs: arguments of layers that run as those of transformers.
            settings: settings to use instead of the layers' own.
            r, keep_rate: see :meth:`.schedule.ScheduleMixin.tokens_fused`.
            track: whether to fill the tokens' sizes and rows even if nothing is fused.
            history: whether to fill the assignments of each layer too.
            rotary: positions of the patches, for rotary encoders.
            mask: attention mask in the form that the layers take; only without fusion.
            keeps_all: whether the tokens will be restored, so that none may be dropped.
            num_read: number of prefix tokens the last layer computes; ``None`` for all tokens. It
                computes all if ``history``, attentions or hidden states are requested, or if it
                has hooks.

        Raises:
            ValueError: if an amount is not allowed, or a mask is given and tokens are fused.
        """
        settings = self.settings if settings is None else settings
        num_tokens = hidden_states.shape[1]
        scheduled = settings.scheduled(num_tokens, r, keep_rate)
        counts = tuple(fused for _, fused in scheduled)
        fuses = any(counts)
        if fuses:
            check_mask(mask)
            mask = None
            if not torch.compiler.is_compiling():
                short = settings.shortfall(num_tokens, r, keep_rate, scheduled)
                if short is not None:
                    logger.warning_once(short)
        if num_read is not None and (history or self._is_shown()):
            num_read = None
        keeps_all = keeps_all and num_read is None
        track = history or (num_read is None and (track or (keeps_all and fuses)))
        run = functools.partial(
            self._run,
            args=args,
            kwargs=kwargs,
            step=_step(settings, keeps_all, num_read, fuses),
            counts=counts,
            track=track,
            history=history,
            rotary=rotary,
        )
        size = self._slice_size(hidden_states, fuses, mask)
        if size == hidden_states.shape[0]:
            return run(hidden_states, mask)
        return _joined([run(images, None) for images in hidden_states.split(size)])

    def _run(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        *,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: Step,
        counts: Sequence[int],
        track: bool,
        history: bool,
        rotary: Rotary | None,
    ) -> Tokens:
        batch, num_tokens = hidden_states.shape[:2]
        rows = positions = None
        fuses = step.fuses
        first = next(self.children())
        assert isinstance(first, FusedLayer)
        by_map = fuses and first.core.is_faster_by_map(hidden_states)
        if track:
            rows = torch.arange(batch * num_tokens, device=hidden_states.device)
        host = dict(kwargs) if self.takes_options else {}
        if rotary is not None:
            host["position_embeddings"] = tuple(rotary.rotation)
            if fuses or step.num_read is not None:
                prefix = num_tokens - rotary.coordinates.shape[0]
                positions = nn.functional.pad(rotary.coordinates, (0, 0, prefix, 0))[None]
                step = replace(step, frequencies=rotary.frequencies)
        own = {"attention_mask": mask}
        own |= {k: kwargs[k] for k in ("output_attentions",) if k in kwargs}
        shown, last = kwargs.get("output_attentions"), len(counts) - 1
        tokens = Tokens(hidden_states, None, positions, rows)
        made: list[Tensor] = []
        for index, (layer, r) in enumerate(zip(self.children(), counts, strict=True)):
            own_way = r or tokens.sizes is not None or (shown and fuses)
            own_way = own_way or (index == last and step.num_read is not None)
            own_way = own_way or by_map
            if layer.runs_as_host and not own_way:
                output = layer(tokens.hidden_states, *args, **host)
                tokens = replace(tokens, hidden_states=output)
            else:
                # Reentrant checkpointing needs the hidden states as an argument of their own.
                rest = replace(tokens, hidden_states=None)
                own["step"] = step.in_layer(index, len(counts), r)
                _, tokens = layer(tokens.hidden_states, tokens=rest, **own)
            if history:
                assignment = tokens.assignment()
                assert assignment is not None
                made.append(assignment)
        if track and tokens.sizes is None:
            sizes = hidden_states.new_ones(batch, num_tokens, dtype=torch.float32)
            tokens = replace(tokens, sizes=sizes)
        return replace(tokens, assignments=tuple(made)) if history else tokens

    def _is_shown(self) -> bool:
        """Whether attentions or hidden states are requested, or the last layer has hooks."""
        return is_captured() or any(map(is_hooked, self[-1].modules()))

    def _slice_size(self, hidden_states: Tensor, fuses: bool, mask: Tensor | None) -> int:
        """Number of images that run through all layers at once.

        On a CPU, activations larger than its cache are slow, mostly because each layer allocates
        them again. So a batch is split into slices, if only the final hidden states are requested
        and no graph is recorded. Layers that run as those of transformers get the whole batch if
        nothing is fused or a module has hooks.
        """
        batch, num_tokens = hidden_states.shape[:2]
        if not goes_in_slices(hidden_states) or batch == 1:
            return batch
        first = next(self.children())
        whole = (
            mask is not None
            or (not fuses and first.runs_as_host)
            or is_captured()
            or (first.runs_as_host and any(map(_is_watched, self.modules())))
        )
        if whole or not batch:
            return batch
        slices = math.ceil(
            batch * num_tokens * self.widest * hidden_states.element_size() / SLICE_BYTES
        )
        return math.ceil(batch / min(slices, batch))


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, other than those that transformers installs to capture outputs.

    transformers leaves its hooks in place, and they do nothing unless outputs are requested.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks)


def is_captured() -> bool:
    """Whether attentions or hidden states are requested in the current call of a model."""
    captured = output_capturing._active_collector.get()
    return captured is not None and ("attentions" in captured or "hidden_states" in captured)


def goes_in_slices(x: Tensor) -> bool:
    """Whether a batch may be split: on a CPU, if no graph is recorded or traced."""
    return x.is_cpu and not is_recorded()


def _step(settings: FusionConfigMixin, keeps_all: bool, num_read: int | None, fuses: bool) -> Step:
    reducer = build_reducer(settings)
    return Step(
        reducer=reducer,
        r=0,
        num_prefix_tokens=settings.num_prefix_tokens,
        class_token=settings.class_token,
        proportional_attention=settings.proportional_attention
        and (reducer is None or reducer.biases_attention),
        shown_restored=settings.restore,
        keeps_all=keeps_all,
        rope_positions=getattr(settings, "rope_positions", None),
        num_read=num_read,
        fuses=fuses,
    )


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """Join the tokens of slices of a batch."""
    first = parts[0]
    rows = None
    if first.rows is not None:
        num_tokens = first.hidden_states.shape[1]
        before, shifted = 0, []
        for part in parts:
            found = part.rows
            assert found is not None
            shifted.append(torch.where(found < 0, found, found + before * num_tokens))
            before += part.hidden_states.shape[0]
        rows = torch.cat(shifted)
    sizes = [part.sizes for part in parts if part.sizes is not None]
    hidden_states = torch.cat([part.hidden_states for part in parts])
    by_layer = zip(*(part.assignments for part in parts if part.assignments), strict=True)
    assignments = tuple(torch.cat(layer) for layer in by_layer)
    return Tokens(
        hidden_states, torch.cat(sizes) if sizes else None, None, rows, assignments or None
    )


def check_mask(mask: Tensor | None) -> None:
    """Raise ValueError if a mask masks something, or its values cannot be read."""
    if may_mask(mask):
        raise ValueError(
            "attention_mask is not allowed where tokens are fused: leave it out, or set r=0 or "
            "reduction='none'"
        )


def may_mask(mask: Tensor | None) -> bool:
    """Whether a mask masks something, or its values cannot be read."""
    if mask is None or torch.compiler.is_compiling():
        return mask is not None
    return not bool(mask.all() if mask.dtype == torch.bool else (mask == 0).all())


def fuse_layers(
    layers: nn.ModuleList,
    names: LayerNames,
    settings: FusionConfigMixin,
    kind: type[FusedLayerList] = FusedLayerList,
) -> None:
    """Make the layers of an encoder fuse tokens, in place.

    Args:
        layers: layers of one class.
        names: names of the parts of a layer.
        settings: settings of fusion; each call uses their current values.
        kind: new class of the list.

    Raises:
        ValueError: if a layer lacks a part that ``names`` contains; nothing is changed then.
    """
    for layer in layers:
        check_layer(layer, names)
    for layer in layers:
        core = attention_core(getattr(layer, names.attention))
        exchange_class(core, fused_class(FusionAttention, type(core), names=attention_names(core)))
        if not isinstance(layer, FusedLayer):
            exchange_class(layer, fused_class(FusedLayer, type(layer), names=names))
    host = getattr(type(layers[0]), "host", type(layers[0]))
    parameters = inspect.signature(host.forward).parameters.values()
    takes_options = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    linear = (module for module in layers[0].modules() if isinstance(module, nn.Linear))
    widest = max(module.out_features for module in linear)
    layers.__class__ = kind
    layers.settings, layers.widest, layers.names = settings, widest, names
    layers.takes_options = takes_options

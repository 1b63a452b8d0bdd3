"""Fused layers of a transformers model, which take their settings from the current call or block.

Context variables hold the current calls, so each thread has its own. Compiled code cannot read
context variables; it reads attributes of the layers instead.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_mctf import FusionConfigMixin, TokenFusion
from .fused_encoder import FusedLayerList, check_mask, may_mask
from .fused_layer import Tokens
from .reducers import build_reducer
from .schedule import KeepRate, TokensFused

# Settings that a user can change; the encoder determines the other fields of TokenFusion.
SETTINGS = (
    *(field.name for field in dataclasses.fields(FusionConfigMixin)),
    *TokenFusion.further_settings,
)


@dataclasses.dataclass(eq=False)
class Call:
    """Fusion settings of one or more calls of a model, and the tokens that the last call returned.

    Attributes:
        settings: fusion settings.
        r, keep_rate: amounts that replace those of the settings; ``None`` to keep them.
        unmasked: whether the caller passed no mask; a mask that an export creates is ignored.
        history: whether the tokens also contain the assignment after each layer.
        tokens: output tokens of the last call.
    """

    settings: TokenFusion
    r: TokensFused | None = None
    keep_rate: KeepRate | None = None
    unmasked: bool = False
    history: bool = False
    tokens: Tokens | None = None


# The current call of each layer list, by its id. Compiled code reads ``HostedLayerList.call``.
_CALLS: ContextVar[dict[int, Call]] = ContextVar("calls")
# Ids of the layer lists that a transformers module is running in this context.
_RUNNING: ContextVar[frozenset[int]] = ContextVar("running", default=frozenset())


class HostedLayerList(FusedLayerList):
    """The layers of a transformers model, whose ``forward`` loops over them.

    In that loop, iteration yields only this list, which runs all layers; elsewhere, each layer.
    """

    settings: TokenFusion
    call: Call | None = None  # for compiled code
    running: bool = False
    __repr__ = nn.Module.__repr__  # that of ModuleList omits extra_repr

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
        """The current call; without one, a call with the layers' own settings."""
        call = self.call
        if not torch.compiler.is_compiling():
            call = _CALLS.get({}).get(id(self))
        return Call(self.settings) if call is None else call

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run all layers: (b, n, d) -> (b, n, d), or fewer tokens if some are dropped or unread."""
        active = call = self.active()
        if kwargs.keys() & {"r", "keep_rate"}:  # the call bypassed the model's own forward
            r, keep_rate = kwargs.pop("r", None), kwargs.pop("keep_rate", None)
            call = dataclasses.replace(call, r=r, keep_rate=keep_rate)
        refuse(kwargs)
        settings, rotary = call.settings, kwargs.pop("position_embeddings", None)
        counts = settings.tokens_fused(hidden_states.shape[1], call.r, call.keep_rate)
        read = settings.num_read_tokens
        mask = args[0] if args else kwargs.get("attention_mask")
        if not any(counts) and (not read or (may_mask(mask) and not call.unmasked)):
            if rotary is not None:
                kwargs["position_embeddings"] = tuple(rotary.rotation)
            for layer in self.children():
                hidden_states = layer(hidden_states, *args, **kwargs)
            active.tokens = Tokens(hidden_states)
            return hidden_states[:, :read] if read else hidden_states
        reducer = build_reducer(settings)
        drops = reducer is not None and reducer.drops_tokens
        if any(counts) and not call.unmasked:
            check_mask(mask)
        if args:
            args = (None, *args[1:])
        elif mask is not None:
            kwargs["attention_mask"] = None
        tokens = self.encode(
            hidden_states,
            *args,
            settings=settings,
            r=call.r,
            keep_rate=call.keep_rate,
            track=not read,
            history=call.history,
            rotary=rotary,
            keeps_all=not drops,
            num_read=read,
            **kwargs,
        )
        active.tokens = tokens
        return tokens.hidden_states if drops else tokens.restored()


def refuse(options: dict[str, Any]) -> None:
    """Raise ValueError for fusion settings that a call does not accept."""
    wrong = sorted(options.keys() & {*SETTINGS, "output_fusion"})
    if wrong:
        raise ValueError(
            f"{wrong} are not allowed in this call: use fusion_of for a while, and output_fusion "
            "in the call of the model that fuse_tokens was called with"
        )


def run_hosted(
    layers: Sequence[HostedLayerList], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a ``forward`` that loops over layers, so that each layer list runs as one module."""
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


def enter_calls(layers: Sequence[HostedLayerList], calls: Sequence[Call]) -> Any:
    """Make the calls current for the layers; return the state that :func:`leave_calls` restores."""
    if torch.compiler.is_compiling():
        before = [one.call for one in layers]
        for one, call in zip(layers, calls, strict=True):
            one.call = call
        return before
    mine = {id(one): call for one, call in zip(layers, calls, strict=True)}
    return _CALLS.set({**_CALLS.get({}), **mine})


def leave_calls(layers: Sequence[HostedLayerList], entered: Any) -> None:
    if not isinstance(entered, list):
        _CALLS.reset(entered)
        return
    for one, call in zip(layers, entered, strict=True):
        one.call = call


_COMPILED = Lock()
_BLOCKS: dict[int, list[Call]] = {}  # open blocks of fusion_of, by id of the layer list


def show_to_compiled(
    layers: Sequence[HostedLayerList], calls: Sequence[Call], inside: bool
) -> None:
    """Show the calls of a block to compiled code in all threads, or hide them at its end."""
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

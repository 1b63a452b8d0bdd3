"""Outputs of transformers that tell what became of the tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
from transformers.utils import ModelOutput

from .fused_layer import Tokens
from .hosted_layers import Call


def with_fusion(
    output: Any, calls: Sequence[Call], told: bool, fewer: bool, *, by_layer: bool
) -> Any:
    """An output with what became of the tokens, if that was asked for."""
    if calls[0].tokens is None or not (told or fewer):
        return output
    tokens = tracked(calls[0].tokens, calls[0])
    if fewer:
        output = _left(output, tokens)
    if not told:
        return output
    found = (tokens.sizes, tokens.assignment(), tokens.assignments if by_layer else None)
    return _extended(type(output))(**dict(output), **dict(zip(_TOLD, found, strict=True)))


def tracked(tokens: Tokens, call: Call) -> Tokens:
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

"""Outputs of transformers with additional fields on token fusion."""

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
from .records import replace


def with_fusion(
    output: Any, calls: Sequence[Call], add: bool, fewer: bool, *, by_layer: bool
) -> Any:
    """Add fields on fusion to an output if ``add``; with ``fewer``, keep only the tokens left."""
    if calls[0].tokens is None or not (add or fewer):
        return output
    tokens = tracked(calls[0].tokens, calls[0])
    if fewer:
        output = _left(output, tokens)
    if not add:
        return output
    found = (tokens.sizes, tokens.assignment(), tokens.assignments if by_layer else None)
    return _extended(type(output))(**dict(output), **dict(zip(_FIELDS, found, strict=True)))


def tracked(tokens: Tokens, call: Call) -> Tokens:
    """The tokens of a call, with sizes and rows even if no layer fused tokens."""
    if tokens.rows is not None:
        return tokens
    batch, num_tokens, _ = tokens.hidden_states.shape
    device = tokens.hidden_states.device
    sizes = torch.ones(batch, num_tokens, device=device)
    places = torch.arange(num_tokens, device=device).expand(batch, -1)
    return replace(
        tokens,
        sizes=sizes,
        rows=torch.arange(batch * num_tokens, device=device),
        assignments=(places,) * call.settings.num_hidden_layers if call.history else None,
    )


def _left(output: Any, tokens: Tokens) -> Any:
    """Reduce the rows of an output from one per original position to one per token left.

    All modules that read the tokens have already used the restored ones.
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


# Fields on fusion that are added to the outputs of transformers.
_FIELDS: dict[str, Any] = {
    "token_sizes": Tensor | None,
    "assignment": Tensor | None,
    "assignments": tuple[Tensor, ...] | None,
}


def _extended(output: type[Any]) -> type[Any]:
    """The class of outputs with the fields on fusion added."""
    if "token_sizes" in output.__dataclass_fields__:
        return output
    if output not in _EXTENDED:
        more = [(name, kind, None) for name, kind in _FIELDS.items()]
        name = f"Fused{output.__name__}"
        made = dataclasses.make_dataclass(name, more, bases=(output,))
        made.__module__, made.__qualname__ = __name__, name  # needed to pickle outputs
        globals()[name] = _EXTENDED[output] = made
    return _EXTENDED[output]


_EXTENDED: dict[type[Any], type[Any]] = {}


for _output in (BaseModelOutput, BaseModelOutputWithPooling, BackboneOutput, ImageClassifierOutput):
    _extended(_output)  # compiled code cannot create classes

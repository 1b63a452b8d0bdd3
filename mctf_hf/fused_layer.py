"""The algorithm: a transformer layer with attention, optional token fusion, and an MLP.

:class:`FusedLayer` is a mixin for the layer classes of transformers, and finds their parts by name
(:mod:`.anatomy`). Layers hold no settings of fusion and no state: each call gets its instructions
as a :class:`Step`, and the tokens with their data as :class:`Tokens`.

Shapes: ``b`` images, ``n`` tokens before and ``m`` tokens after a layer's fusion, ``d`` channels,
``h`` heads.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .anatomy import LayerNames, attention_core
from .attention import Attention, ColumnMeans, FusionAttention, Rotation, is_recorded
from .fusion import Reduction, add_up, compose, fuse, fuse_sizes, images_rows
from .records import replace
from .reducers import Observation, Reducer, Stage


class Tokens(NamedTuple):
    """Tokens, and the data that goes with them from layer to layer.

    Attributes:
        hidden_states: (b, n, d).
        sizes: (b, n), number of embedded tokens that each token represents; ``None`` if all are 1.
        positions: (b or 1, n, 2), coordinates for rotary encoders, 0 for prefix tokens; or None.
        rows: (b * embedded tokens,) int64, the row of each embedded token's present token in the
            flattened (b * n, …), -1 for dropped tokens; ``None`` if not requested.
        assignments: one (b, embedded tokens) per layer, see :meth:`assignment`, filled after the
            last layer; ``None`` if not requested.
    """

    hidden_states: Tensor
    sizes: Tensor | None = None
    positions: Tensor | None = None
    rows: Tensor | None = None
    assignments: tuple[Tensor, ...] | None = None

    def reduce(self, reduction: Reduction, rope_positions: str | None) -> "Tokens":
        """The tokens and their data after a reduction of n tokens to m."""
        hidden_states, sizes, positions, rows, _ = self
        if sizes is None:
            precision = torch.promote_types(hidden_states.dtype, torch.float32)
            sizes = hidden_states.new_ones(hidden_states.shape[:2], dtype=precision)
        if positions is not None:
            positions = positions.expand(hidden_states.shape[0], -1, -1)
            positions = _move(positions, reduction, rope_positions)
        return Tokens(
            hidden_states=fuse(hidden_states, reduction),
            sizes=fuse_sizes(sizes, reduction),
            positions=positions,
            rows=None if rows is None else compose(rows, reduction.rows),
        )

    def restored(self) -> Tensor:
        """The hidden states at the positions of the embedded tokens: (b, embedded tokens, d)."""
        if self.rows is None:
            return self.hidden_states
        batch = self.hidden_states.shape[0]
        flat = self.hidden_states.flatten(0, 1).index_select(0, self.rows)
        return flat.view(batch, -1, self.hidden_states.shape[2])

    def assignment(self) -> Tensor | None:
        """(b, embedded tokens) int64, index of the token that contains each one, -1 if dropped."""
        if self.rows is None:
            return None
        return images_rows(self.rows, *self.hidden_states.shape[:2])


def _move(positions: Tensor, reduction: Reduction, rope_positions: str | None) -> Tensor:
    """Positions of the new tokens: (b, n, 2) -> (b, m, 2)."""
    batch, _, axes = positions.shape
    if rope_positions == "kept":
        return positions.flatten(0, 1).index_select(0, reduction.kept).view(batch, -1, axes)
    counted = torch.cat([positions, torch.ones_like(positions[:, :, :1])], 2)
    total = add_up(counted, reduction) if reduction.maximum else fuse(counted, reduction)
    return total[:, :, :axes] / total[:, :, axes:]


class Step(NamedTuple):
    """Instructions to a layer for one pass.

    Attributes:
        reducer: reduction method; ``None`` for no reduction.
        r: number of tokens that the layer removes.
        num_prefix_tokens: number of tokens at the front that are never fused.
        class_token: whether the first token represents the whole image.
        proportional_attention: whether attention scores include the sizes of the tokens.
        shown_restored: whether hooks see hidden states at the positions of the embedded tokens.
        keeps_all: whether the tokens will be restored, so that none may be dropped.
        rope_positions: see :class:`.configuration_mctf.RotaryConfigMixin`.
        frequencies: (d / h / 4,), turns of the channels per unit of a coordinate; or ``None``.
        num_read: number of prefix tokens the layer outputs; ``None`` for all tokens.
        fuses: whether any layer fuses; if none does, all is computed as in transformers.
    """

    reducer: Reducer | None
    r: int
    num_prefix_tokens: int
    class_token: bool
    proportional_attention: bool
    shown_restored: bool = False
    keeps_all: bool = False
    rope_positions: str | None = None
    frequencies: Tensor | None = None
    num_read: int | None = None
    fuses: bool = False

    def in_layer(self, layer: int, num_layers: int, r: int) -> "Step":
        """The instructions to one of the layers; only the last one gets ``num_read``."""
        reducer = self.reducer
        return replace(
            self,
            r=r,
            reducer=None if reducer is None else reducer.for_layer(layer, num_layers),
            num_read=self.num_read if layer == num_layers - 1 else None,
        )

    # Not a property, which torch.compile of torch 2.7 cannot trace in a named tuple.
    def stage(self) -> Stage | None:
        """When tokens are reduced; ``None`` if they are not, or if no output would depend on it."""
        if self.reducer is None or not self.r:
            return None
        return self.reducer.stage if self.num_read is None or self.reducer.stage.ahead else None


UNFUSED = Step(None, 0, 0, False, False)


def rotation_at(positions: Tensor, frequencies: Tensor) -> Rotation:
    """Rotation of tokens at given positions: (b, n, 2), (d / h / 4,) -> two (b, 1, n, d / h)."""
    angles = 2 * math.pi * positions[:, None, :, :, None] * frequencies  # [b, 1, n, 2, d / h / 4]
    angles = angles.flatten(3).repeat(1, 1, 1, 2)
    return Rotation(angles.cos(), angles.sin())


class FusedLayer:
    """Mixin for a layer class of transformers: a layer that can fuse tokens between its parts.

    Without a step it works as the original layer. Subclasses may override ``norm_attention``,
    ``attend``, ``add`` and ``run_mlp``.

    Attributes:
        names: names of its parts.
        runs_as_host: whether the original layer can be used if nothing is fused.
    """

    names: ClassVar[LayerNames]
    runs_as_host: ClassVar[bool] = True

    if TYPE_CHECKING:
        training: bool
        _forward_hooks: dict[int, Any]

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        tokens: Tokens | None = None,
        step: Step | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the layer on ``hidden_states``, (b, n, d), and fuse as the step defines.

        Args:
            args, kwargs: arguments of the original layer; with a step only ``attention_mask``, for
                a layer that fuses nothing, and ``output_attentions``.
            tokens: data of the tokens, without the hidden states.
            step: instructions; unset, the layer runs as in transformers.

        Returns:
            The hidden states, as in transformers; with a step, these and the :class:`Tokens`. If
            the layer has forward hooks and ``step.shown_restored`` is set, the former are restored.
        """
        if step is None or tokens is None:
            if self.runs_as_host:
                return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
            return self._run(Tokens(hidden_states), UNFUSED, *args, **kwargs).hidden_states
        tokens = self._run(replace(tokens, hidden_states=hidden_states), step, *args, **kwargs)
        shown = step.shown_restored and self._forward_hooks
        return tokens.restored() if shown else tokens.hidden_states, tokens

    def _run(
        self, tokens: Tokens, step: Step, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tokens:
        stage, read = step.stage(), step.num_read
        shown = step.reducer is not None and bool(kwargs.get("output_attentions"))
        normed = self.norm_attention(tokens.hidden_states)
        bias = _size_bias(tokens.sizes, step, normed.dtype)
        bias = attention_mask if bias is None else bias
        attention = reduction = None
        applied_here = stage is not None or shown or read is not None
        applied_here = applied_here or tokens.sizes is not None or tokens.positions is not None
        if applied_here or (attention_mask is None and self._is_faster(normed, step)):
            # Attention that only ranks tokens before it is computed again needs no gradient.
            with torch.set_grad_enabled(torch.is_grad_enabled() and stage is not Stage.RECOMPUTE):
                attention = self._look_ahead(normed, bias, tokens, step, shown, stage)

        if stage is not None and stage.ahead:
            reduction = self._reduction(tokens, attention, step)
            tokens = tokens.reduce(reduction, step.rope_positions)
            normed = self.norm_attention(tokens.hidden_states)
        if stage is Stage.RECOMPUTE:
            bias = _size_bias(tokens.sizes, step, normed.dtype)
            attention = self._look_ahead(normed, bias, tokens, step, shown, None)
            reduction = None

        if attention is None:
            output = self.attend(normed, attention_mask, **kwargs)
        else:
            if read is not None:
                kwargs["num_queries"] = read
                tokens = Tokens(tokens.hidden_states[:, :read])
            output = self.attend(normed, attention=attention, reduction=reduction, **kwargs)
        tokens = self._add(tokens, output, self.names.after_attention)
        if stage is Stage.AFTER_ATTENTION:
            tokens = tokens.reduce(self._reduction(tokens, attention, step), step.rope_positions)
        tokens = self._add(tokens, self.run_mlp(tokens.hidden_states), self.names.after_mlp)
        if stage is Stage.AFTER_MLP:
            tokens = tokens.reduce(self._reduction(tokens, attention, step), step.rope_positions)
        return tokens

    @property
    def core(self) -> FusionAttention:
        """The module that computes queries and keys."""
        core = attention_core(getattr(self, self.names.attention))
        assert isinstance(core, FusionAttention)
        return core

    def norm_attention(self, hidden_states: Tensor) -> Tensor:
        """The norm before attention: (b, n, d) -> (b, n, d)."""
        return getattr(self, self.names.norm_attention)(hidden_states)

    def attend(self, normed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The attention output, (b, m, d), for normalised tokens."""
        output = getattr(self, self.names.attention)(normed, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def add(self, residual: Tensor, branch: Tensor, through: tuple[str, ...]) -> Tensor:
        """Add a branch to the residual stream: both (b, m, d) -> (b, m, d).

        Args:
            through: names of the parts to apply to the branch first.
        """
        parts = [part for part in (getattr(self, name) for name in through) if _acts(part)]
        scale = _scale(parts[-1]) if parts else None
        for part in parts[:-1] if scale is not None else parts:
            branch = part(branch) if isinstance(part, nn.Module) else part * branch
        if scale is None:
            return branch + residual
        return torch.addcmul(residual, branch, scale)  # in one pass over the tokens

    def run_mlp(self, hidden_states: Tensor) -> Tensor:
        """The norm before the MLP, and the MLP: (b, m, d) -> (b, m, d)."""
        normed = getattr(self, self.names.norm_mlp)(hidden_states)
        return getattr(self, self.names.mlp)(normed)

    def _add(self, tokens: Tokens, branch: Tensor, through: tuple[str, ...]) -> Tokens:
        return replace(tokens, hidden_states=self.add(tokens.hidden_states, branch, through))

    def _look_ahead(
        self,
        normed: Tensor,
        bias: Tensor | None,
        tokens: Tokens,
        step: Step,
        shown: bool,
        stage: Stage | None,
    ) -> Attention:
        rotation = None
        if tokens.positions is not None and step.frequencies is not None:
            rotation = rotation_at(tokens.positions, step.frequencies)
        hold_map = shown or self._holds_map(normed, step, stage)
        num_queries = step.num_read if stage is None else None  # the reducer needs all queries
        attention = self.core.look_ahead(
            normed, bias, hold_map=hold_map, rotation=rotation, num_queries=num_queries
        )
        if hold_map or stage is not Stage.AFTER_ATTENTION or is_recorded() or self.training:
            return attention
        return replace(attention, columns=ColumnMeans() if self._sees_all_rows(step) else None)

    def _sees_all_rows(self, step: Step) -> bool:
        """Whether the reducer needs the attention that each token receives from all tokens."""
        needs = () if step.reducer is None else step.reducer.needs
        return "attention_received" in needs or (
            "class_attention" in needs and not step.class_token
        )

    def _is_faster(self, normed: Tensor, step: Step) -> bool:
        """Whether attention in this layer is faster with a map than with a kernel."""
        return step.fuses and self.core.is_faster_by_map(normed, step.num_read)

    def _holds_map(self, normed: Tensor, step: Step, stage: Stage | None) -> bool:
        """Whether to compute the attention map once and hold it."""
        if self.core.config._attn_implementation == "eager" or self._is_faster(normed, step):
            return True
        reducer = step.reducer
        if reducer is None or stage is None:
            return False
        fuses_map = stage is Stage.REUSE and not reducer.pools_linearly
        if fuses_map or "attention" in reducer.needs:
            return True
        return self._sees_all_rows(step) and self.core.holds_map(normed)

    def _reduction(self, tokens: Tokens, attention: Attention | None, step: Step) -> Reduction:
        assert attention is not None
        reduction = self._choose(tokens, attention, step)
        if not torch.compiler.is_compiling():
            _check(reduction, tokens, step)
        return reduction

    @torch.no_grad()
    def _choose(self, tokens: Tokens, attention: Attention, step: Step) -> Reduction:
        assert step.reducer is not None
        observable = {
            "keys": attention.mean_keys,
            "attention": lambda: attention.map,
            "attention_received": attention.received,
            "class_attention": attention.from_class if step.class_token else attention.received,
        }
        needed = {need: observable[need]() for need in step.reducer.needs}
        seen = Observation(tokens.hidden_states, tokens.sizes, step.num_prefix_tokens, **needed)
        return step.reducer(seen, step.r)


def _acts(part: Any) -> bool:
    """Whether a part of a branch has an effect; a dropout needs training mode or hooks for it."""
    if not isinstance(part, nn.Module):
        return isinstance(part, Tensor) or part != 1
    idle = isinstance(part, nn.Identity) or (not part.training and not list(part.parameters()))
    return not idle or bool(part._forward_hooks or part._forward_pre_hooks)


def _scale(part: Any) -> Tensor | None:
    """The factors of a LayerScale; ``None`` if its module must be called, or for other parts."""
    if not isinstance(part, nn.Module):
        return part if isinstance(part, Tensor) else None
    called = part._forward_hooks or part._forward_pre_hooks or "_old_forward" in part.__dict__
    return None if called else getattr(part, "lambda1", None)


def _size_bias(sizes: Tensor | None, step: Step, dtype: torch.dtype) -> Tensor | None:
    """Bias of proportional attention, the logarithm of each key's size: (b, 1, 1, n)."""
    if sizes is None or not step.proportional_attention:
        return None
    return sizes.log().to(dtype)[:, None, None, :]


def _check(reduction: Reduction, tokens: Tokens, step: Step) -> None:
    """Raise ValueError if a reduction does not match the step or the reducer's attributes."""
    found, num_tokens = reduction.kept.shape[0], tokens.hidden_states.shape[1]
    images, name = max(1, reduction.batch), type(step.reducer).__qualname__
    if found // images != num_tokens - step.r:
        raise ValueError(
            f"{name} left {found // images} tokens, where there are to be {num_tokens - step.r}"
        )
    if reduction.kept_weights is None and not reduction.maximum:
        raise ValueError(
            f"{name} returned a reduction without weights: call its weigh(), or set its maximum"
        )
    if step.reducer is not None and reduction.maximum == step.reducer.pools_linearly:
        raise ValueError(
            f"{name} returned a reduction with maximum={reduction.maximum}, where its "
            f"pools_linearly is {step.reducer.pools_linearly}"
        )
    if step.keeps_all and found + reduction.merged.shape[0] < reduction.rows.shape[0]:
        raise ValueError(
            f"{name} drops tokens, which cannot be restored: let it say drops_tokens=True, and set "
            "restore to False"
        )

"""Mixins for models of transformers that fuse tokens, and for the modules that run their layers."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from .files import drop_links, write_text
from .fused_outputs import with_fusion
from .hosted_layers import (
    SETTINGS,
    HostedLayerList,
    enter_calls,
    leave_calls,
    refuse,
    run_hosted,
)
from .schedule import KeepRate, TokensFused

FILE = "token_fusion.json"


class FusedRunner:
    """Mixin for the module, of transformers or torch, that runs layers with fusion."""

    hosted_layers: HostedLayerList

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        host = cls.__dict__.get("host")
        if host is None:  # a subclass made by another library, such as FSDP2
            return

        @functools.wraps(host.forward)
        def forward(self: FusedRunner, *args: Any, **kwargs: Any) -> Any:
            return run_hosted([self.hosted_layers], host.forward, self, *args, **kwargs)

        cls.forward = forward  # type: ignore[attr-defined]


class FusedModel:
    """Mixin for the class of transformers of a model that fuses tokens.

    Calls also accept ``r``, ``keep_rate`` and ``output_fusion``, like the models of this library.
    Saving writes the settings of fusion to a file beside the unchanged checkpoint.
    """

    fused_layers: list[HostedLayerList]
    host: ClassVar[Any]
    config: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new model has no fusion, even if it is created from the class of a fused model."""
        return cls.host(*args, **kwargs) if args or kwargs else object.__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "host" in cls.__dict__:  # not in a subclass made by another library, such as FSDP2
            cls.forward = _forward_of(cls.host)  # type: ignore[attr-defined]

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the checkpoint as transformers does, and the settings of fusion beside it.

        Raises:
            ValueError: for ``push_to_hub=True``, which would not upload the settings.
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
            saved = {name: getattr(settings, name) for name in SETTINGS}
            write_text(Path(save_directory, FILE), json.dumps(saved, indent=2) + "\n")


def _forward_of(host: type[PreTrainedModel]) -> Callable[..., Any]:
    """The forward method of a class of transformers, with settings of fusion for one call."""

    @functools.wraps(host.forward)
    def forward(
        self: FusedModel,
        *args: Any,
        r: TokensFused | None = None,
        keep_rate: KeepRate | None = None,
        output_fusion: bool = False,
        **kwargs: Any,
    ) -> Any:
        refuse(kwargs)
        calls = [layers.active() for layers in self.fused_layers]
        fewer = not all(call.settings.restore for call in calls)
        exported = torch.compiler.is_exporting()
        if len(calls) > 1 and (output_fusion or fewer):
            raise ValueError(
                f"{'output_fusion=True' if output_fusion else 'restore=False'} is not allowed with "
                f"{type(self).__name__}, which has {len(calls)} vision encoders"
            )
        if (r, keep_rate) == (None, None) and not (output_fusion or fewer or exported):
            return run_hosted(self.fused_layers, host.forward, self, *args, **kwargs)
        active = calls
        if (r, keep_rate) != (None, None):
            calls = [
                dataclasses.replace(call, r=r, keep_rate=keep_rate, tokens=None) for call in calls
            ]
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
        before = enter_calls(self.fused_layers, calls)
        try:
            output = run_hosted(self.fused_layers, host.forward, self, *args, **named)
        finally:
            leave_calls(self.fused_layers, before)
        for one, call in zip(active, calls, strict=True):
            one.tokens = call.tokens
        add = output_fusion or (fewer and not as_tuple)
        output = with_fusion(output, calls, add, fewer, by_layer=output_fusion)
        return output.to_tuple() if as_tuple else output

    return forward

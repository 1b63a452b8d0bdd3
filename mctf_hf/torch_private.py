"""What this library takes of torch that is private there."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.profiler import profile

from .dependencies import check_names

check_names(
    "torch",
    {
        "torch._C._autograd._KinetoEvent": ("name", "nbytes", "start_ns"),
        "torch._C._autograd._ProfilerResult": ("events",),
        "torch._dynamo.config": ("accumulated_recompile_limit", "patch", "recompile_limit"),
        "torch._inductor": ("aoti_compile_and_package", "aoti_load_package"),
        "torch.autograd.profiler.profile": ("kineto_results",),
    },
)


compile_package = torch._inductor.aoti_compile_and_package
load_package = torch._inductor.aoti_load_package


def many_programs() -> AbstractContextManager:
    """Let what is compiled in a block have as many programs as torch allows at all."""
    config = torch._dynamo.config
    return config.patch(recompile_limit=config.accumulated_recompile_limit)


def compile_for_many(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` of a function that has a program for each of many amounts."""
    compiled = torch.compile(function, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        with many_programs():
            return compiled(*args, **kwargs)

    return call


def allocations(records: profile) -> list[int]:
    """Bytes that were taken (above 0) and given back (below) on the CPU, in order."""
    profiler: Any = records.profiler
    events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return [event.nbytes() for event in events if event.name() == "[memory]"]

"""Private parts of torch that this library uses."""

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
    """Within a block, allow a compiled function as many programs as torch allows in total."""
    config = torch._dynamo.config
    return config.patch(recompile_limit=config.accumulated_recompile_limit)


def compile_for_many(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` for a function that needs one program for each of many amounts."""
    compiled = torch.compile(function, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        with many_programs():
            return compiled(*args, **kwargs)

    return call


def allocations(records: profile) -> list[int]:
    """Bytes allocated (positive) and freed (negative) on the CPU, in order of time."""
    profiler: Any = records.profiler
    events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return [event.nbytes() for event in events if event.name() == "[memory]"]

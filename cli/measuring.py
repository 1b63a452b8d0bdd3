"""Measures speed and memory of models, side by side in one process."""

import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mctf_hf.torch_private import allocations

Run = Callable[[], object]


def seconds_in_rounds(
    runs: Sequence[Run], *, rounds: int, warmup: int = 2, device: str = "cpu"
) -> list[list[float]]:
    """Time each of ``runs`` once per round, A B C A B C …, so that all see the same machine load.

    Args:
        rounds: number of timings returned for each run; ``warmup`` more rounds come first.
        device: ``cpu``, or ``cuda`` for the GPU's own clock.

    Returns:
        For each of ``runs``, the seconds of each round.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for timed in range(-warmup, rounds):
        for run, times in zip(runs, seconds, strict=True):
            elapsed = _seconds_cuda(run) if device.startswith("cuda") else _seconds(run)
            if timed >= 0:
                times.append(elapsed)
    return seconds


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_cuda(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak_bytes(run: Run, *, device: str = "cpu") -> int:
    """Peak memory of tensors during ``run``, in bytes, minus the memory in use before it.

    On a CPU, it comes from the allocations that the profiler records; on a GPU, from its allocator.
    """
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        run()
    live = peak = 0
    for taken in allocations(records):
        live += taken
        peak = max(peak, live)
    return peak


def images_per_second(runs: Sequence[Run], batch: int, rounds: int = 20) -> list[float]:
    """Median speed of each of ``runs``, which process ``batch`` images."""
    return [batch / statistics.median(times) for times in seconds_in_rounds(runs, rounds=rounds)]


def machine_name(device: str = "cpu") -> str:
    """Name of the processor or of the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    named = (
        re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        if cpuinfo.exists()
        else None
    )
    return named[1].strip() if named else platform.processor() or platform.machine()

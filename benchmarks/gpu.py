"""Correctness and speed of models on a GPU, with and without fusion.

    python -m benchmarks.gpu results.json [--minutes 8] [--parts correctness speed …]

Needs only this library, PyTorch and transformers; all weights and images are random. Jobs run in a
fixed order until the time is up. The end of the output and the results list the jobs that were left
out or failed. ``--device cpu --tiny`` runs all parts with tiny models, to check that they run.
"""

import argparse
import copy
import functools
import gc
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cli.measuring import Run, machine_name, peak_bytes, seconds_in_rounds
from mctf_hf import attention, kernels
from mctf_hf.attention import Attention, apply_by_kernel, with_bias_as_channel
from mctf_hf.cost import r_for_budget
from mctf_hf.files import write_text
from mctf_hf.fused_layer import FusedLayer
from mctf_hf.fusion import Reduction
from mctf_hf.losses import TokenReductionConsistency
from mctf_hf.presets import preset, preset_class
from mctf_hf.registry import plain_class, plain_config

Row = dict[str, Any]

BUDGET = 0.56
DTYPE = torch.bfloat16  # of the timed models
SEED = 0
# One preset of each backbone, and of each kind of front end.
BACKBONES = (
    *("deit_t", "deit_t_distilled", "t2t_vit_7", "t2t_vit_t_14", "lv_vit_t", "dinov2_s"),
    *("dinov2_s_reg", "clip_b_16", "siglip_b_16", "dinov3_s"),
)
REDUCTIONS: dict[str, dict[str, Any]] = {
    "MCTF precise": {"one_step_ahead": "precise"},
    "MCTF present": {"one_step_ahead": "present"},
    "MCTF past": {"one_step_ahead": "past"},
    "MCTF maximum": {"pooling": "max"},
    "MCTF keys and class": {"key_share": 0.2, "class_share": 0.5},
    "ToMe": {"reduction": "tome"},
    "PiToMe": {"reduction": "pitome"},
    "DiffRate": {"reduction": "diffrate", "dropped": 0.25, "restore": False},
    "EViT": {"reduction": "evit", "keep_rate": 0.7},
    "token mergence": {"reduction": "token_mergence", "keep_rate": 0.7},
}
# Maximum relative errors of outputs and gradients, compared with a CPU in float32 that fuses the
# same tokens: norm of the difference over norm. In half precision, they are four times the largest
# error on a CPU (for gradients that of LV-ViT, 5 times as large as those of the others).
TOLERANCES = {
    torch.float32: (1e-4, 1e-3),
    torch.float16: (4e-3, 6e-2),
    torch.bfloat16: (3e-2, 2e-1),
}
# Minimum share of the fused tokens that must be the same if the device chooses by itself. In half
# precision, many pairs are equally attractive: on a CPU, bfloat16 agrees with float32 on 74% to
# 100% of the tokens; by chance, it would be 13%.
AGREEMENT = {torch.float32: 0.99, torch.float16: 0.5, torch.bfloat16: 0.5}

MODELS = ("deit_s", "deit_b", "dinov2_b", "clip_l_14")
CONTESTANTS: dict[str, dict[str, Any]] = {
    "MCTF look-ahead": {},
    "MCTF after attention": {"one_step_ahead": "present"},
    "ToMe": {"reduction": "tome"},
}
# Compiling takes most of the time, so it comes last. The most important models come first.
COMPILED = (
    *(("deit_s", 32), ("deit_s", 256), ("dinov2_b", 32), ("deit_s", 1), ("clip_l_14", 32)),
    *(("deit_b", 256), ("deit_b", 32), ("dinov2_b", 256), ("clip_l_14", 256)),
    *(("deit_b", 1), ("dinov2_b", 1), ("clip_l_14", 1)),
)
MAPS = ((1, 6, 197), (32, 6, 197), (256, 6, 197), (32, 12, 257), (256, 12, 257), (32, 12, 1025))
TINY = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 3, "image_size": 64}
TINY_MAPS = ((2, 1, 50),)
TINY_BUDGET = 0.7


@dataclass
class Bench:
    """The device and the size of the benchmark.

    Attributes:
        device: device of all models.
        tiny: whether models are tiny, so that times mean nothing.
    """

    device: str
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def batches(self) -> tuple[int, ...]:
        return (2,) if self.tiny else (1, 32, 256)

    @property
    def largest(self) -> int:
        """Number of images in the largest batch."""
        return self.batches[-1]

    @property
    def small(self) -> Row:
        """Settings of models that are small enough to run on a CPU too."""
        if self.tiny:
            return TINY
        size = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4}
        return {**size, "image_size": 112}

    def fused(self, name: str, settings: Row, dtype: torch.dtype | None = None) -> Any:
        """Make a model of a preset that fuses enough tokens to meet the budget."""
        size, own = TINY if self.tiny else {}, preset_class(name)
        with torch.device("meta"):
            model = own(preset(name, **size, **settings))
            r = r_for_budget(model, TINY_BUDGET if self.tiny else BUDGET)[1]
        return self.made(own, preset(name, **size, **settings, r=r), dtype)

    def plain(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """Make the plain model of a preset."""
        own = preset_class(name)
        config = preset(name, **(TINY if self.tiny else {}))
        plain = plain_class(own, config)
        assert plain is not None
        return self.made(plain, plain_config(own, config), dtype)

    def made(self, kind: Any, config: Any, dtype: torch.dtype | None) -> Any:
        """Make a model of a class for inference, with random weights."""
        torch.manual_seed(SEED)
        with torch.device(self.device):
            return kind(config).to(dtype or DTYPE).eval()

    def images(self, model: Any, batch: int) -> Tensor:
        """Random images, (b, 3, size, size), in the model's dtype."""
        size = model.config.image_size
        torch.manual_seed(SEED)
        return torch.randn(batch, 3, size, size, device=self.device, dtype=model.dtype)

    def milliseconds(self, runs: Sequence[Run]) -> list[float]:
        """Median times of functions, timed in turns: 5 to 50 rounds, in about two seconds."""
        timed = functools.partial(seconds_in_rounds, runs, device=self.device)
        found = timed(rounds=1, warmup=0 if self.tiny else 3)
        if not self.tiny:
            once = sum(times[0] for times in found)
            found = timed(rounds=max(5, min(50, int(2 / once))))
        return [1000 * statistics.median(times) for times in found]


@dataclass
class Choices:
    """Records which tokens one run fuses, and makes other runs fuse the same.

    Where two pairs are almost equally attractive, rounding decides which one is fused, and then all
    later values differ. So a device is judged by two numbers: the error of its outputs if it fuses
    the same tokens as the CPU, and the share of these tokens that it would have chosen itself, from
    input that differs only by rounding.

    Attributes:
        made: the recorded reductions, in the order of the layers.
        agreement: for each repeated choice, the share of the fused tokens that the device would
            have fused itself.
    """

    made: list[Reduction] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the choices made inside the block."""

        def record(chosen: Reduction) -> Reduction:
            self.made.append(chosen)
            return chosen

        with self._choosing(record):
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Replace the choices made inside the block by the recorded ones."""
        coming = iter(self.made)

        def repeat(chosen: Reduction) -> Reduction:
            wanted = _moved(next(coming), chosen.rows.device)
            own, other = _leaving(chosen), _leaving(wanted)
            self.agreement.append((own & other).sum().item() / other.sum().item())
            return wanted

        with self._choosing(repeat):
            yield
        assert next(coming, None) is None, "fewer choices than recorded"

    @staticmethod
    @contextmanager
    def _choosing(through: Callable[[Reduction], Reduction]) -> Iterator[None]:
        own = FusedLayer._choose

        def choose(self: Any, *given: Any) -> Reduction:
            return through(own(self, *given))

        FusedLayer._choose = choose  # type: ignore[method-assign]
        try:
            yield
        finally:
            FusedLayer._choose = own  # type: ignore[method-assign]


def _moved(reduction: Reduction, device: torch.device) -> Reduction:
    parts = {
        name: value.to(device) for name, value in vars(reduction).items() if torch.is_tensor(value)
    }
    return replace(reduction, **parts)


def _leaving(reduction: Reduction) -> Tensor:
    """Whether each token is merged or dropped, (b * n,)."""
    leaving = torch.ones_like(reduction.rows, dtype=torch.bool)
    leaving[reduction.kept] = False
    return leaving


def correctness(bench: Bench, name: str, settings: dict[str, Any]) -> Iterator[Row]:
    """Compare a small model's outputs and gradients with those of the CPU in float32."""
    torch.manual_seed(SEED)
    amount = {} if "keep_rate" in settings else {"r": 0.12}
    config = preset(name, **bench.small, **amount, **settings)
    model = preset_class(name)(config).eval()
    images = torch.randn(2 if bench.tiny else 4, 3, config.image_size, config.image_size)
    choices = Choices()
    with torch.no_grad(), choices.recorded():
        expected = model(images)[0]
    with choices.repeated():
        gradients = _gradients(model, images)
    for dtype, (most, most_of_gradients) in TOLERANCES.items():
        made = copy.deepcopy(model).to(bench.device, dtype)
        given = images.to(bench.device, dtype)
        choices.agreement.clear()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            with torch.no_grad(), choices.repeated():
                error = _relative(made(given)[0], expected)
            agreement = statistics.mean(choices.agreement)
            with choices.repeated():
                error_of_gradients = _relative(_gradients(made, given), gradients)
            with torch.no_grad():
                by_itself = _relative(made(given)[0], expected)
        good = error <= most and error_of_gradients <= most_of_gradients
        yield {
            "model": name,
            "settings": settings,
            "dtype": _short(dtype),
            "error": error,
            "error_of_gradients": error_of_gradients,
            "agreement": agreement,
            "error_by_itself": by_itself,
            "good": good and agreement >= AGREEMENT[dtype],
        }


def _gradients(model: Any, images: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    output = model(images)[0]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(SEED))
    (output * weights.to(output)).mean().mul(1000).backward()
    found = [one.grad for one in model.parameters() if one.grad is not None]
    return torch.cat([one.float().flatten() for one in found])


def _relative(found: Tensor, expected: Tensor) -> float:
    found = found.detach().float().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Captured:
    """A function of images as a CUDA graph, captured once and replayed at each call."""

    def __init__(self, function: Callable[[Tensor], Any], images: Tensor):
        self.images = images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(self.images)[0]

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.output


@torch.no_grad()
def graphs(bench: Bench, name: str, settings: Row) -> Iterator[Row]:
    """Check that a model can be captured, and computes the same for images that come later."""
    amount = {} if "keep_rate" in settings else {"r": 0.12}
    config = preset(name, **bench.small, **amount, **settings)
    model = bench.made(preset_class(name), config, torch.float32)
    captured = Captured(model, bench.images(model, 4))
    captured.images.normal_()
    error = _relative(captured(), model(captured.images)[0].cpu())
    most = TOLERANCES[torch.float32][0]
    yield {"model": name, "settings": settings, "error": error, "good": error <= most}


def determinism(bench: Bench, contestant: str) -> Iterator[Row]:
    """Measure how much two runs of a model on the same images differ, forward and backward."""
    model = bench.fused("deit_s", CONTESTANTS[contestant])
    images = bench.images(model, min(32, bench.largest))
    with torch.no_grad():
        outputs = [model(images)[0].float().cpu() for _ in range(2)]
    gradients = [_gradients(model, images).cpu() for _ in range(2)]
    errors = _relative(*outputs), _relative(*gradients)
    yield {"contestant": contestant, "output": errors[0], "gradients": errors[1]}


@torch.no_grad()
def ways_to_attend(bench: Bench, batch: int, heads: int, tokens: int) -> Iterator[Row]:
    """Time the ways to compute attention, with 64 channels per head and a bias by token sizes."""
    made = torch.randn(3, batch, tokens, heads, 64, device=bench.device, dtype=DTYPE)
    query, key, value = made.transpose(2, 3)
    sizes = torch.randint(1, 9, (batch, 1, 1, tokens), device=bench.device)
    plain = Attention(query, key, None, 0.125)
    biased = plain._replace(bias=sizes.log().to(DTYPE))

    def by_map() -> Tensor:
        rows = biased.rows()
        biased._replace(map=rows).received()
        return torch.bmm(rows.flatten(0, 1), value.flatten(0, 1))

    ways: dict[str, Run] = {
        "kernel, no bias": lambda: apply_by_kernel(plain, value),
        "kernel, bias": lambda: apply_by_kernel(biased, value),
        "kernel, bias as channel": lambda: apply_by_kernel(*with_bias_as_channel(biased, value)),
        "map and what is received": by_map,
    }
    row: Row = {"images": batch, "heads": heads, "tokens": tokens}
    if bench.on_gpu and kernels.triton is not None:
        apart = query, key, value, biased.bias
        ways["Triton and what is received"] = lambda: kernels.attend(*apart, 0.125)
        ways["Triton, only what is received"] = lambda: kernels.attention_received(
            query, key, biased.bias, 0.125
        )
        row |= _errors_of_kernels(*(part[:2] for part in apart if part is not None))
    with _setting(BIAS_AS_CHANNEL={}, BY_TRITON={}):
        times = bench.milliseconds(list(ways.values()))
    yield row | dict(zip(ways, times, strict=True))


def _errors_of_kernels(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Row:
    output, received = kernels.attend(query, key, value, bias, 0.125)
    exact = Attention(query.double(), key.double(), bias.double(), 0.125)
    exact = exact._replace(map=exact.rows())
    assert exact.map is not None
    errors = (
        _relative(output, (exact.map @ value.double()).float().cpu()),
        _relative(received, exact.received().float().cpu()),
    )
    good = errors[0] < 1e-2 and errors[1] < 1e-3
    return {"error of output": errors[0], "error of received": errors[1], "good": good}


@contextmanager
def _setting(**settings: Any) -> Iterator[None]:
    """Change settings of :mod:`mctf_hf.attention` while the block runs."""
    own = {name: getattr(attention, name) for name in settings}
    vars(attention).update(settings)
    try:
        yield
    finally:
        vars(attention).update(own)


@torch.no_grad()
def own_ways(bench: Bench, contestant: str) -> Iterator[Row]:
    """Time a whole model with and without this library's own ways to compute attention."""
    model = bench.fused("deit_s", CONTESTANTS[contestant])
    images = bench.images(model, bench.largest)
    own = {name: getattr(attention, name) for name in ("BIAS_AS_CHANNEL", "BY_TRITON")}
    ways = {
        "neither": {name: {} for name in own},
        "bias as channel": {**own, "BY_TRITON": {}},
        "Triton": {**own, "BIAS_AS_CHANNEL": {}},
        "both": own,
    }

    def run(settings: Row) -> None:
        with _setting(**settings):
            model(images)

    times = bench.milliseconds([functools.partial(run, way) for way in ways.values()])
    yield {"contestant": contestant, "batch": bench.largest, **dict(zip(ways, times, strict=True))}


@torch.no_grad()
def speed(bench: Bench, name: str, batch: int, compiled: bool) -> Iterator[Row]:
    """Time the plain model and fused models in turns: eager or compiled, also as CUDA graphs."""
    models = {"plain": bench.plain(name)}
    models |= {key: bench.fused(name, settings) for key, settings in CONTESTANTS.items()}
    images = bench.images(models["plain"], batch)
    functions: dict[str, Callable[[Tensor], Any]] = dict(models)
    form = "eager"
    if compiled:
        torch._dynamo.reset()  # the number of compiled models is limited
        form, backend = "compiled", "eager" if bench.tiny else "inductor"
        functions = {
            key: torch.compile(model, dynamic=False, backend=backend)
            for key, model in models.items()
        }
    runs = [functools.partial(function, images) for function in functions.values()]
    times = bench.milliseconds(runs)
    memory = [None if compiled else peak_bytes(run, device=bench.device) / 2**20 for run in runs]
    yield from _compared(name, batch, form, tuple(models), times, memory)
    if bench.on_gpu:
        replays = [Captured(function, images) for function in functions.values()]
        times = bench.milliseconds(replays)
        yield from _compared(name, batch, f"{form}, graph", tuple(models), times, [None] * 4)


def _compared(
    name: str,
    batch: int,
    form: str,
    contestants: Sequence[str],
    times: Sequence[float],
    memory: Sequence[float | None],
) -> Iterator[Row]:
    for contestant, own, peak in zip(contestants, times, memory, strict=True):
        yield {
            "model": name,
            "batch": batch,
            "form": form,
            "contestant": contestant,
            "ms": own,
            "images/s": 1000 * batch / own,
            "ratio": times[0] / own,
            "peak MiB": peak,
        }


def training(bench: Bench) -> Iterator[Row]:
    """Time a training step of DeiT-S under autocast: plain, fused, and with consistency."""
    batch = bench.largest // 2
    models = {"plain": bench.plain("deit_s", torch.float32)}
    for contestant, settings in CONTESTANTS.items():
        models[contestant] = bench.fused("deit_s", settings, torch.float32)
    images = bench.images(models["plain"], batch)
    labels = torch.zeros(batch, dtype=torch.int64, device=bench.device)
    consistency = TokenReductionConsistency()

    def alone(model: Any) -> Tensor:
        return model(images, labels=labels).loss

    def with_teacher(model: Any) -> Tensor:
        embedded, less = model.embed(images), [fused // 4 for fused in model.config.r]
        passes = [model(**embedded, **how, output_features=True) for how in ({}, {"r": less})]
        parts = [part for one in passes for part in (one.logits, one.features)]
        return consistency(*parts, labels).total

    def step(model: Any, optimizer: Any, loss: Callable[[Any], Tensor]) -> None:
        optimizer.zero_grad()
        with torch.autocast(bench.device, DTYPE):
            value = loss(model)
        value.backward()
        optimizer.step()

    optimizers = {
        key: torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=bench.on_gpu)
        for key, model in models.items()
    }
    runs = {
        key: functools.partial(step, model, optimizers[key], alone) for key, model in models.items()
    }
    key = "MCTF look-ahead"
    runs[f"{key}, student and teacher"] = functools.partial(
        step, models[key], optimizers[key], with_teacher
    )
    times = bench.milliseconds(list(runs.values()))
    memory = [peak_bytes(run, device=bench.device) / 2**20 for run in runs.values()]
    yield from _compared("deit_s", batch, "training", tuple(runs), times, memory)


@torch.no_grad()
def operators(bench: Bench, contestant: str) -> Iterator[Row]:
    """Find the 20 kernels that take the most time in a forward pass of DeiT-S."""
    model = bench.fused("deit_s", CONTESTANTS[contestant])
    images = bench.images(model, bench.largest)
    model(images)
    activity = ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as records:
        model(images)
        if bench.on_gpu:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    events = sorted(records.key_averages(), key=lambda one: getattr(one, spent), reverse=True)
    total = sum(getattr(event, spent) for event in events)
    for event in events[:20]:
        own = getattr(event, spent)
        yield {
            "contestant": contestant,
            "ms": own / 1000,
            "share": own / total,
            "calls": event.count,
            "kernel": event.key[:90],
        }


class Job(NamedTuple):
    """A measurement.

    Attributes:
        part: part of the results for its rows.
        name: name of the job in its part.
        run: function that yields the rows.
    """

    part: str
    name: str
    run: Callable[[], Iterator[Row]]


def jobs_of(bench: Bench) -> Iterator[Job]:
    """All measurements, the most important ones first."""

    def job(part: str, function: Callable[..., Iterator[Row]], *given: Any) -> Job:
        name = " ".join(map(str, given))
        return Job(part, name, functools.partial(function, bench, *given))

    cases: list[tuple[str, Row]] = [(name, {}) for name in BACKBONES]
    cases += [("deit_t", settings) for settings in REDUCTIONS.values()]
    models, compiled = (MODELS, COMPILED) if not bench.tiny else (MODELS[:1], (("deit_s", 2),))
    for case in cases:
        yield job("correctness", correctness, *case)
    for case in cases if bench.on_gpu else ():
        yield job("graphs", graphs, *case)
    for shape in TINY_MAPS if bench.tiny else MAPS:
        yield job("attention", ways_to_attend, *shape)
    for contestant in CONTESTANTS:
        yield job("determinism", determinism, contestant)
        yield job("own ways", own_ways, contestant)
    for name in models:
        for batch in bench.batches:
            yield job("speed", speed, name, batch, False)
    yield job("training", training)
    yield job("operators", operators, "MCTF after attention")
    for name, batch in compiled:
        yield job("compiled", speed, name, batch, True)


PARTS = (
    *("correctness", "graphs", "attention", "determinism", "own ways", "speed", "training"),
    *("operators", "compiled"),
)


def measure(bench: Bench, jobs: Sequence[Job], seconds: float, file: str) -> int:
    """Run jobs until the time is up, write their results, and return the number of failures.

    A job is left out if there is not enough time left for the longest job so far of its part.
    """
    start, longest = time.monotonic(), {"compiled": 0.0 if bench.tiny else 60.0}
    results: Row = {"environment": environment(bench), "rows": {}, "failed": [], "left_out": []}
    header: tuple[str, ...] = ()
    for part, name, run in jobs:
        begun = time.monotonic()
        if begun - start + longest.get(part, 0) > seconds:
            results["left_out"].append(f"{part}: {name}")
            continue
        try:
            for row in run():
                results["rows"].setdefault(part, []).append(row)
                if (part, *row) != header:
                    header = (part, *row)
                    print(f"\n{part}\n\n| {' | '.join(row)} |\n|{'---|' * len(row)}")
                print(f"| {' | '.join(map(_shown, row.values()))} |", flush=True)
                if not row.get("good", True):
                    results["failed"].append({"job": f"{part}: {name}", "error": "not good"})
        except Exception as error:  # any error: the other jobs still run
            text = "".join(traceback.format_exception(error))
            results["failed"].append({"job": f"{part}: {name}", "error": text})
            print(f"FAILED {part}: {name}: {error!r}", flush=True)
        longest[part] = max(longest.get(part, 0), time.monotonic() - begun)
        if bench.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
        write_results(file, results, time.monotonic() - start)
    write_results(file, results, time.monotonic() - start)
    left, failed = results["left_out"], results["failed"]
    print(f"\nleft out, for time was up ({len(left)}):", *left, sep="\n  ")
    print(f"failed ({len(failed)}):", *(one["job"] for one in failed), sep="\n  ")
    return len(failed)


def write_results(file: str, results: Row, seconds: float) -> None:
    """Write the results so far as JSON."""
    write_text(file, json.dumps({**results, "seconds": seconds}, indent=2) + "\n")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def environment(bench: Bench) -> Row:
    """Device, versions and date of the measurements."""
    versions: Row = {}
    for package in ("torch", "transformers", "triton", "mctf-hf"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": machine_name(bench.device),
        "dtype": _short(DTYPE),
        "tiny": bench.tiny,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Read the command line and measure; the exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", help="file of JSON to write")
    parser.add_argument("--minutes", type=float, default=8, help="leave out what comes later")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    given = parser.parse_args()
    bench = Bench(given.device, given.tiny)
    jobs = [job for job in jobs_of(bench) if job.part in given.parts]
    sys.exit(bool(measure(bench, jobs, 60 * given.minutes, given.results)))


if __name__ == "__main__":
    main()

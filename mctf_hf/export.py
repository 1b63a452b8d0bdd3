"""Export of models to files that run without this library: ONNX, and two kinds of ``.pt2``.

A ``.pt2`` file is a program of ``torch.export``, or a package of AOTInductor, which is compiled
ahead of time. The image size is fixed; the batch size is not. Each file contains metadata: ONNX in
``metadata_props``, a program in the extra file ``metadata.json``, a package in ``get_metadata()``.
"""

import copy
import io
import json
import logging
import operator
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from .checks import check_weights
from .extras import needed_by
from .files import draft
from .registry import output_of
from .schedule import KeepRate, TokensFused
from .torch_private import compile_package, load_package

Model = Any  # a model of this library

# Rounding alone causes far smaller differences; a larger one means a different choice of tokens.
TOLERANCE = 1e-4
# Torch before 2.8 needs a limit: it cannot exclude a batch as large as the largest integer.
BATCH = Dim("batch", max=2**31 - 1)
# Start of the messages that torch and onnx log on every export, by logger.
_NOISE = {
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
    "onnx_ir._convenience": "Attribute type is ambiguous because it is an empty sequence",
}


class Agreement(NamedTuple):
    """Agreement of two functions of images.

    Attributes:
        batch_sizes: number of images in each call.
        max_difference: largest absolute difference between corresponding output numbers.
        differing: fraction of the images with a difference above :data:`TOLERANCE`, in [0, 1].
        top1: fraction of the images that get the same label, in [0, 1]; ``None`` for a backbone.
    """

    batch_sizes: tuple[int, ...]
    max_difference: float
    differing: float
    top1: float | None


def to_onnx(
    model: Model,
    file: str | os.PathLike,
    *,
    image_processor: Any = None,
    r: TokensFused | None = None,
    keep_rate: KeepRate | None = None,
) -> Path:
    """Write a model as ONNX, with the input ``pixel_values`` and the model's main output.

    The output is ``logits``, ``image_embeds`` or ``last_hidden_state``. The file contains the
    weights; above 1.5 GiB they are in ``<file>.data`` beside it. No file appears before all are
    complete.

    Args:
        model: model in evaluation mode, in float32.
        file: path that ends in ``.onnx``.
        image_processor: image processor that makes ``pixel_values``, recorded in the metadata.
        r: value to use instead of the configuration's ``r``.
        keep_rate: value to use instead of the configuration's, with a method that uses it.

    Raises:
        ImportError: see :func:`import_onnx`.
        ValueError: if ``file`` has another suffix, the model is in training mode, not in float32 or
            has weights that are not finite, or ``r`` or ``keep_rate`` is not allowed.
        RuntimeError: if torch cannot export the model.
    """
    import_onnx()
    if model.dtype != torch.float32:
        raise ValueError(f"a model of {model.dtype} is not written as ONNX: call model.float()")
    amount = {"r": r, "keep_rate": keep_rate}
    file = _checked(model, file, ".onnx", amount)
    output = output_of(model)
    # ONNX holds every attention map in any case; eager attention computes each only once.
    with draft(file) as whole, _quiet(), _attention(model, "eager"), torch.no_grad():
        program = torch.onnx.export(
            _make_quantizable(_program(FirstOutput(model, **amount), _example(model))),
            (),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=[output],
            dynamic_shapes={"pixel_values": {0: BATCH}},
            verbose=False,
        )
        assert program is not None
        graph = program.model.graph
        for node in graph:
            node.metadata_props.clear()  # stack traces contain folder names of this machine
        inner = [made for node in graph for made in node.outputs if not made.is_graph_output()]
        for value in (*inner, *graph.initializers.values()):
            value.shape = value.type = None  # would be out of date after quantization
        program.model.metadata_props.update(_metadata(model, image_processor, amount))
        program.save(whole, external_data=False)  # torch ignores this above ONNX's size limit
    return file


def to_torch_export(
    model: Model,
    file: str | os.PathLike,
    *,
    image_processor: Any = None,
    r: TokensFused | None = None,
    keep_rate: KeepRate | None = None,
) -> Path:
    """Write a model as a program of ``torch.export``, for ``torch.export.load``.

    The arguments are those of :func:`to_onnx`, but ``file`` ends in ``.pt2``. The model's type of
    numbers and attention backend are kept.

    Raises:
        ValueError: as :func:`to_onnx`, but any type of numbers is allowed.
        RuntimeError: if torch cannot export the model.
    """
    amount = {"r": r, "keep_rate": keep_rate}
    file = _checked(model, file, ".pt2", amount)
    with draft(file) as whole, _quiet():
        program = _program(FirstOutput(model, **amount), _example(model))
        metadata = json.dumps(_metadata(model, image_processor, amount), indent=2)
        packed = io.BytesIO()  # writing to a full disk, torch would end the process
        torch.export.save(program, packed, extra_files={"metadata.json": metadata})
        whole.write_bytes(packed.getbuffer())
    return file


def to_aot_inductor(
    model: Model,
    file: str | os.PathLike,
    *,
    image_processor: Any = None,
    r: TokensFused | None = None,
    keep_rate: KeepRate | None = None,
) -> Path:
    """Write a model as a package of AOTInductor: machine code and weights prepared for it.

    The package needs a processor and a torch release like those here, where it is by far the
    fastest form of a model. ``torch._inductor.aoti_load_package`` loads it. The arguments are those
    of :func:`to_torch_export`.

    Raises:
        ValueError: as :func:`to_torch_export`.
        RuntimeError: as :func:`to_torch_export`, or if torch finds no C++ compiler.
    """
    amount = {"r": r, "keep_rate": keep_rate}
    file = _checked(model, file, ".pt2", amount)
    metadata = _metadata(model, image_processor, amount)
    with draft(file) as whole, _quiet():
        compile_ahead(FirstOutput(model, **amount), _example(model), whole, metadata)
    return file


@torch.no_grad()
def _program(function: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Export a function for any batch size, without stack traces, which contain folder names."""
    shapes = ({0: BATCH},)
    program = torch.export.export(function, (example,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


@torch.no_grad()
def compile_ahead(
    function: nn.Module, example: Tensor, file: Path, metadata: dict[str, str]
) -> None:
    """Compile a function, (b, …) -> (b, …) for any b, into a package.

    Args:
        example: input with a batch size of two.
        file: path that ends in ``.pt2``.

    Raises:
        RuntimeError: if torch cannot export or compile the function.
    """
    program = _program(function, example)
    options = {"freezing": True, "aot_inductor.metadata": metadata}
    with tempfile.TemporaryDirectory(prefix="mctf-") as folder:
        place = compile_package(
            program, package_path=str(Path(folder, file.name)), inductor_configs=options
        )
        shutil.copyfile(place, file)


def load(file: str | os.PathLike) -> Callable[[Tensor], Tensor]:
    """Load an exported file as a function of images, (b, channels, height, width).

    It returns the model's first output: (b, labels), (b, d) or (b, m, d). ONNX files run in
    onnxruntime on the CPU, with as many threads as torch.

    Raises:
        ImportError: see :func:`import_onnx`; only for ONNX files.
    """
    file = Path(file)
    if file.suffix == ".pt2":
        with zipfile.ZipFile(file) as archive:
            compiled = any("/aotinductor/" in name for name in archive.namelist())
        if compiled:
            return load_package(str(file))
        return torch.export.load(file).module()
    onnxruntime = import_onnx()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise threads that wait for the next call keep the cores busy.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(pixel_values: Tensor) -> Tensor:
        (output,) = session.run(None, {"pixel_values": pixel_values.numpy(force=True)})
        return torch.from_numpy(output)

    return run


def check(model: Model, file: str | os.PathLike, batches: Iterable[Tensor]) -> Agreement:
    """Run an exported file and its model on the same images, and compare the outputs.

    Some images may differ: if two tokens are almost equally attractive, rounding decides which one
    is fused. :func:`check_rounding` measures how often this happens.

    Args:
        batches: tensors (b, channels, height, width), preferably of several batch sizes.

    Raises:
        ImportError: as :func:`load`.
    """
    return _compare(model, load(file), batches)


def check_rounding(model: Model, batches: Iterable[Tensor]) -> Agreement:
    """Compare a model with itself in float64, where only the rounding differs.

    Args:
        batches: tensors (b, channels, height, width).
    """
    return _compare(model, FirstOutput(copy.deepcopy(model).double()), batches)


@torch.no_grad()
def _compare(
    model: Model, other: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> Agreement:
    function = FirstOutput(model)
    batch_sizes, differences, same = [], [], []
    for pixel_values in batches:
        pixel_values = pixel_values.to(model.device, model.dtype)
        expected, found = function(pixel_values).cpu(), other(pixel_values).cpu()
        batch_sizes.append(len(pixel_values))
        differences.append((found - expected).abs().flatten(1).amax(1).double())
        same.append(found.argmax(-1) == expected.argmax(-1))
    difference = torch.cat(differences)
    alike = (difference <= TOLERANCE).double()  # NaN counts as different
    return Agreement(
        batch_sizes=tuple(batch_sizes),
        max_difference=difference.max().item(),
        differing=1 - alike.mean().item(),
        top1=torch.cat(same).double().mean().item() if output_of(model) == "logits" else None,
    )


def import_onnx() -> Any:
    """Import onnxruntime, and check that the other packages for ONNX are installed.

    Raises:
        ImportError: if a package is missing; the message contains the command to install it.
    """
    with needed_by("ONNX"):
        for package in ("onnx", "onnxscript"):
            import_module(package)
        return import_module("onnxruntime")


class FirstOutput(nn.Module):
    """A model's first output as a function of images only.

    Args:
        options: keyword arguments of each call of the model.
    """

    def __init__(self, model: Model, **options: Any):
        super().__init__()
        self.model = model
        self.options = options
        self.training = model.training

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values, **self.options)[0]


def _example(model: Model) -> Tensor:
    """A batch of two images; with one image torch would fix the batch size to 1."""
    shape = (2, model.config.num_channels, *model.config.usual_size)
    return torch.zeros(shape, dtype=model.dtype, device=model.device)


def _checked(model: Model, file: str | os.PathLike, suffix: str, amount: dict[str, Any]) -> Path:
    if Path(file).suffix != suffix:
        raise ValueError(f"{file} is not allowed: the file's name ends in {suffix}")
    if model.training:
        raise ValueError("a model in training mode is not exported: call model.eval()")
    model.config.tokens_fused(model.config.num_tokens(), **amount)  # raises if not allowed
    check_weights(model, "the model")
    return Path(file)


def _metadata(model: Model, image_processor: Any, amount: dict[str, Any]) -> dict[str, str]:
    """Metadata that a user of the file needs, each value in JSON."""
    config = model.config
    given = {name: value for name, value in amount.items() if value is not None}
    metadata: dict[str, Any] = {
        "image_size": config.usual_size,
        "reduction": config.reduction,
        **(given or config.own_amount()),
    }
    if config.inflection and "r" in metadata and not isinstance(metadata["r"], list):
        metadata["inflection"] = config.inflection
    if output_of(model) == "logits":
        metadata["id2label"] = config.id2label
    if image_processor is not None:
        metadata["image_processor"] = json.loads(image_processor.to_json_string())
        if image_processor.do_normalize:
            metadata["image_mean"] = image_processor.image_mean
            metadata["image_std"] = image_processor.image_std
    return {name: json.dumps(value, ensure_ascii=False) for name, value in metadata.items()}


def _make_quantizable(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Replace operators whose shapes onnxruntime's quantization tools cannot infer, in place.

    The tools fail on reductions whose axes are an input, except sums and means.
    """
    aten, call, erase = torch.ops.aten, program.graph.call_function, program.graph.erase_node
    for node in list(program.graph.nodes):
        with program.graph.inserting_before(node):
            if node.target is aten.linalg_vector_norm.default:
                x, order, *axes = node.args
                assert order == 2 and axes
                squares = call(aten.mul.Tensor, (x, x))
                total = call(aten.sum.dim_IntList, (squares, *axes))
                node.replace_all_uses_with(call(aten.sqrt.default, (total,)))
            elif node.target in (aten.max.dim, aten.amax.default, aten.amin.default):
                x, dims, *keepdim = node.args
                (dim,) = dims if isinstance(dims, list) else [dims]
                top = call(aten.topk.default, (x, 1, dim, node.target is not aten.amin.default))
                made = [call(operator.getitem, (top, index)) for index in range(2)]
                if keepdim != [True]:
                    made = [call(aten.squeeze.dim, (value, dim)) for value in made]
                if node.target is aten.max.dim:
                    for user in list(node.users):
                        user.replace_all_uses_with(made[user.args[1]])
                        erase(user)
                else:
                    node.replace_all_uses_with(made[0])
            else:
                continue
        erase(node)
    return program


@contextmanager
def _attention(model: Model, implementation: str) -> Iterator[None]:
    own = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of torch and onnx that occur with every model."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*", FutureWarning)
        for name, start in _NOISE.items():
            logger = logging.getLogger(name)

            def speaks(record: logging.LogRecord, start: str = start) -> bool:
                return not record.getMessage().startswith(start)

            logger.addFilter(speaks)
            stack.callback(logger.removeFilter, speaks)
        yield

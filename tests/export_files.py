"""Exported files: how each kind is written, and that one can be quantized."""

from pathlib import Path

from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from mctf_hf.export import load, to_onnx, to_torch_export

WRITE = {"onnx": to_onnx, "pt2": to_torch_export}


def assert_quantizes(file: str | Path, images: Tensor, within: float = 0.1) -> None:
    """With and without the preparation that onnxruntime advises, to much the same outputs.

    Args:
        within: mean difference of outputs, in their standard deviations.
    """
    quant_pre_process(file, "prepared.onnx")
    whole = load(file)(images)
    for source in (file, "prepared.onnx"):
        quantize_dynamic(source, "quantized.onnx")
        assert Path("quantized.onnx").stat().st_size < Path(file).stat().st_size
        found = load("quantized.onnx")(images)
        assert (found - whole).abs().mean() < within * whole.std()

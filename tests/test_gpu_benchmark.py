"""The benchmark of GPUs runs, whatever it measures, with little installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from tests.helpers import REPOSITORY

# Packages of the extras; what is None cannot be imported.
ALONE = """
import runpy, sys
for name in ("accelerate", "datasets", "gradio", "jsonargparse", "kornia", "lightning",
             "matplotlib", "onnx", "optuna", "pyarrow", "rich", "scipy", "torchmetrics",
             "torchvision", "triton"):
    sys.modules[name] = None
sys.argv = ["gpu.py", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def test_all_of_it_runs_on_a_cpu_with_the_library_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "results.json"), "--device", "cpu", "--tiny"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["failed"] and not results["left_out"]
    assert set(results["rows"]) == set(gpu.PARTS) - {"graphs"}  # which a CPU has none of
    for row in results["rows"]["correctness"]:
        same = row["dtype"] == "float32"
        assert row["agreement"] == 1 and row["error"] == 0 if same else 0 < row["error"] < 0.03
    assert {row["contestant"] for row in results["rows"]["speed"]} == {"plain", *gpu.CONTESTANTS}
    assert results["environment"]["tiny"] and results["environment"]["torch"]


def failing() -> Any:
    yield {"good": True}
    raise RuntimeError("no such kernel")


def test_what_fails_or_is_left_out_is_told_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        gpu.Job("a", "breaks", failing),
        gpu.Job("a", "is wrong", lambda: iter([{"good": False}])),
        gpu.Job("compiled", "takes long", lambda: iter([{"never": 1}])),
        gpu.Job("b", "is well", lambda: iter([{"number": 2.0}])),
    ]
    file = tmp_path / "results.json"
    assert gpu.measure(gpu.Bench("cpu", tiny=False), jobs, seconds=30, file=str(file)) == 2
    results = json.loads(file.read_text())
    assert [one["job"] for one in results["failed"]] == ["a: breaks", "a: is wrong"]
    assert "no such kernel" in results["failed"][0]["error"]
    assert results["left_out"] == ["compiled: takes long"]
    assert results["rows"] == {"a": [{"good": True}, {"good": False}], "b": [{"number": 2.0}]}
    told = capsys.readouterr().out
    assert "compiled: takes long" in told and "a: breaks" in told


def test_tokens_that_other_tokens_would_be_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that scores tokens the other way round fuses others."""
    from mctf_hf import reducers

    own = reducers.similarity
    (first, *_) = gpu.correctness(gpu.Bench("cpu", tiny=True), "deit_t", {"reduction": "tome"})
    assert first["good"] and first["agreement"] == 1
    calls = iter(range(10**6))

    def reversed_later(*given: Any) -> Any:
        return own(*given) if next(calls) < 4 else 1 - own(*given)

    monkeypatch.setattr(reducers, "similarity", reversed_later)
    (first, *_) = gpu.correctness(gpu.Bench("cpu", tiny=True), "deit_t", {"reduction": "tome"})
    assert not first["good"] and first["agreement"] < 0.5

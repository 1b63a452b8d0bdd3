"""Exported files: they compute what their model does, tell what they hold, and appear whole."""

import json
import logging
import re
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from datasets import load_dataset
from torch import Tensor, nn
from transformers import ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from cli import export as command
from cli.main import main
from mctf_hf import MCTFViTForImageClassification
from mctf_hf import export as exporting
from mctf_hf.export import Model, check, check_rounding, load, to_onnx, to_torch_export
from mctf_hf.hub import save
from tests.export_files import WRITE, assert_quantizes
from tests.helpers import DIGITS, REPOSITORY, SHARED, needs_shared, tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "precise, sizes": {"one_step_ahead": "precise", "pooling": "size"},
    "past, mean": {"one_step_ahead": "past", "pooling": "mean", "proportional_attention": False},
    "maximum, all forward": {"pooling": "max", "bidirectional": False, "r": [0.3, 5]},
    "present": {"one_step_ahead": "present", "key_share": 0.2, "class_share": 0.5},
    "tome": {"reduction": "tome"},
    "pitome": {"reduction": "pitome"},
    "diffrate": {"reduction": "diffrate", "dropped": 4, "restore": False},
}


def small_model(attention: str = "sdpa", **settings: Any) -> MCTFViTForImageClassification:
    """Fuses in both of its layers, in the second tokens that have been fused before."""
    layers = {"num_hidden_layers": 2, "fusion_layers": [0, 1], "r": 9}
    model = tiny_model(**{**layers, **settings})
    model.set_attn_implementation(attention)
    return model


def random_images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def expected(model: Model, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(images)
    return output.logits if "logits" in output else output.last_hidden_state


def assert_computes(file: str, model: Model) -> None:
    run = load(file)
    for count in (1, 2, 5):
        images = random_images(count)
        torch.testing.assert_close(run(images), expected(model, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "variant"),
    # ONNX goes by torch.export as well: what can't be traced fails there.
    [*(("onnx", name) for name in VARIANTS), ("pt2", "precise, sizes")],
)
def test_a_file_computes_what_its_model_does(kind: str, variant: str) -> None:
    attention = "eager" if variant in ("past, mean", "tome") else "sdpa"
    model = small_model(attention, **VARIANTS[variant])
    WRITE[kind](model, f"model.{kind}")
    assert_computes(f"model.{kind}", model)
    assert model.config._attn_implementation == attention
    if kind == "onnx":  # nothing guards against masks where nothing is masked
        assert not {"IsNaN", "Where"} & {
            node.op_type for node in onnx.load("model.onnx").graph.node
        }
        assert_quantizes("model.onnx", random_images(5))


def test_a_backbone_gives_its_hidden_states() -> None:
    model = small_model(fusion_layers=[1]).vit
    to_torch_export(model, "model.pt2")
    assert_computes("model.pt2", model)
    assert load("model.pt2")(random_images(5)).shape == (5, 65 - 9, 24)
    agreement = check(model, "model.pt2", [random_images(5)])
    assert agreement.differing == 0 and agreement.top1 is None


def test_onnx_is_one_file_that_tells_what_it_holds(
    capfd: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mctf_hf.attention.MAP_BYTES", 0)  # as of a large image, see below
    model = small_model()
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    model.config.id2label = {i: f"Ziffer {i}, groß" for i in range(5)}
    to_onnx(model, "model.onnx", image_processor=processor)

    assert [path.name for path in Path().iterdir()] == ["model.onnx"]
    assert not any(capfd.readouterr()) and not recwarn.list
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    content = Path("model.onnx").read_bytes()
    assert str(REPOSITORY).encode() not in content and b"site-packages" not in content
    written = onnx.load("model.onnx")
    onnx.checker.check_model(written, full_check=True)
    maps = [node for node in written.graph.node if node.op_type == "Softmax"]
    assert len(maps) == model.config.num_hidden_layers  # of a large image too, and no blocks
    (given,), (result,) = written.graph.input, written.graph.output
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (given, result)
    ]
    assert (given.name, result.name) == ("pixel_values", "logits")
    assert shapes == [["batch", 3, 32, 32], ["batch", 5]]
    told = {entry.key: json.loads(entry.value) for entry in written.metadata_props}
    assert told == {
        "image_size": [32, 32],
        "reduction": "mctf",
        "r": 9,
        "id2label": {str(i): f"Ziffer {i}, groß" for i in range(5)},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor": json.loads(processor.to_json_string()),
    }
    assert_computes("model.onnx", model)


def test_a_pt2_tells_what_it_holds_and_keeps_its_numbers() -> None:
    model = small_model().bfloat16()
    to_torch_export(model, "model.pt2", r=0, image_processor=ViTImageProcessorPil())
    extra = {"metadata.json": ""}
    program = torch.export.load("model.pt2", extra_files=extra)
    told = {name: json.loads(value) for name, value in json.loads(extra["metadata.json"]).items()}
    assert told["r"] == 0 and told["image_size"] == [32, 32] and len(told["id2label"]) == 5
    assert told["image_std"] == [0.5, 0.5, 0.5]
    images = random_images(3).bfloat16()
    with torch.no_grad():
        assert torch.equal(program.module()(images), model(images, r=0).logits)
    assert b"site-packages" not in Path("model.pt2").read_bytes()


def test_a_package_compiled_ahead_of_time(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture
) -> None:
    """Through the command: for batches of any size, with what it holds, and nothing beside it."""
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    folder = save(small_model(), processor, tmp_path_factory.mktemp("small") / "vit")
    words = ["--output", "m.pt2", "--aot_inductor", "true", "--images", DIGITS, "--count", 9]
    run_command(f"{folder},r=[0,9]", *words, "--batch_size", 4)
    assert "m.pt2 in AOTInductor" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in Path().iterdir()] == ["m.pt2"]
    told = torch._inductor.aoti_load_package("m.pt2").get_metadata()
    assert json.loads(told["r"]) == [0, 9] and json.loads(told["image_size"]) == [32, 32]
    fused = MCTFViTForImageClassification.from_pretrained(folder, r=[0, 9])
    for count in (1, 5):
        images = random_images(count)
        found = load("m.pt2")(images)
        torch.testing.assert_close(found, expected(fused, images), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="aot_inductor=True is not allowed with output='m.onnx'"):
        run_command(folder, "--output", "m.onnx", "--aot_inductor", "true")


def test_weights_too_many_for_one_file_lie_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
    monkeypatch.setattr(limit, 1000)  # bytes, instead of 1.5 GiB
    model = tiny_model(r=0, num_hidden_layers=1)
    Path("there").mkdir()
    to_onnx(model, "there/model.onnx")
    assert sorted(path.name for path in Path("there").iterdir()) == [
        "model.onnx",
        "model.onnx.data",
    ]
    Path("there").rename("moved")
    assert check(model, "moved/model.onnx", [random_images(3)]).differing == 0


@pytest.mark.parametrize("kind", WRITE)
def test_an_export_that_fails_leaves_what_was_there(kind: str) -> None:
    class Fickle(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = small_model(r=0)
    model.classifier = nn.Sequential(model.classifier, Fickle())
    Path(f"model.{kind}").write_text("of an earlier export")
    with pytest.raises(RuntimeError):
        WRITE[kind](model, f"model.{kind}")
    assert [path.name for path in Path().iterdir()] == [f"model.{kind}"]
    assert Path(f"model.{kind}").read_text() == "of an earlier export"
    assert model.config._attn_implementation == "sdpa"


def test_models_that_are_not_exported() -> None:
    with pytest.raises(ValueError, match="call model.eval()"):
        to_onnx(small_model().train(), "model.onnx")
    with pytest.raises(ValueError, match="a model of torch.float16 is not written as ONNX"):
        to_onnx(small_model().half(), "model.onnx")
    for write in WRITE.values():
        with pytest.raises(ValueError, match="model.bin is not allowed: .* ends in ."):
            write(small_model(), "model.bin")
    for kind, write in WRITE.items():
        with pytest.raises(ValueError, match="r=-1 is not allowed"):
            write(small_model(), f"model.{kind}", r=-1)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            write(small_model(), f"nowhere/model.{kind}")
    assert not list(Path().iterdir())


def test_a_check_counts_what_differs(tmp_path: Path) -> None:
    model = tiny_model(r=0, num_hidden_layers=1)
    to_torch_export(model, "model.pt2")
    batches = random_images(10).split([1, 2, 7])
    assert check(model, "model.pt2", batches) == ((1, 2, 7), 0, 0, 1)
    head = model.classifier
    labels = expected(model, torch.cat(batches)).argmax(1)
    head.bias.data[labels[0]] += 100
    found = check(model, "model.pt2", batches)
    assert found.max_difference == pytest.approx(100, rel=1e-4)
    assert found.differing == 1
    assert found.top1 == (labels == labels[0]).double().mean()
    head.bias.data[0] = torch.nan
    assert check(model, "model.pt2", batches).differing == 1
    assert np.isnan(check(model, "model.pt2", batches).max_difference)


def test_rounding_is_that_of_float64() -> None:
    model = small_model()
    images = random_images(8)
    with torch.no_grad():
        logits = model(images).logits
        precise = small_model().double()(images.double()).logits
    found = check_rounding(model, [images])
    assert 0 < found.max_difference == (logits - precise).abs().max().item()
    assert found.top1 == 1 and model.dtype == torch.float32


def run_command(*words: Any) -> None:
    """As ``mctf export``, whose errors a user can mend are ValueError, OSError, RuntimeError."""
    command.main([str(word) for word in words])


def test_the_command_checks_on_real_images(
    flat_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", 1e-9)  # rounding does more, in any runtime
    options = ["--output", "model.onnx", "--images", DIGITS, "--count", 24, "--batch_size", 8]
    run_command(f"{flat_folder},r=[0,9]", *options)
    shown = capsys.readouterr().out
    assert f"24 images of {DIGITS} in batches of 1, 2, 5, 8" in " ".join(shown.split())
    for name in ("model.onnx in onnxruntime", "torch in float64"):
        assert re.search(rf"{name} +│ +\d\.\de-0[5-9] │ +[\d.]+% │ +100.0%", shown), shown
    assert [path.name for path in Path().iterdir()] == ["model.onnx"]
    model = MCTFViTForImageClassification.from_pretrained(flat_folder, r=[0, 9])
    run = load("model.onnx")
    torch.testing.assert_close(
        run(random_images(4)), expected(model, random_images(4)), rtol=0, atol=1e-5
    )
    assert json.loads(onnx.load("model.onnx").metadata_props[0].value)


def test_the_command_measures_speed(
    flat_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = []

    def write(*args: Any, r: int | None = None, **kwargs: Any) -> Path:
        fused.append(r)
        return to_torch_export(*args, r=r, **kwargs)

    monkeypatch.setitem(command.WRITE, "torch_export", write)
    options = ["--count", "3", "--batch_size", "4", "--speed", "true", "--rounds", "1"]
    run_command(f"{flat_folder},r=[0,9]", "--output", "model.pt2", *options)
    shown = capsys.readouterr().out
    assert "3 random images in batches of 1, 2 " in " ".join(shown.split())
    assert shown.index("batches of 1;") < shown.index("batches of 4;")
    for name in ("torch.export", "torch"):
        speeds = re.findall(rf"│ {name} +│ +([\d.,]+) │ +([\d.,]+) │ +([\d.]+)x │", shown)
        assert len(speeds) == 2, shown
        for numbers in speeds:
            base, faster, ratio = (float(number.replace(",", "")) for number in numbers)
            assert ratio == pytest.approx(faster / base, abs=0.01)
    assert fused == [None, 0]
    assert [path.name for path in Path().iterdir()] == ["model.pt2"]


def test_the_command_exports_a_preset() -> None:
    run_command("deit_t,reduction=none", "--output", "model.pt2", "--count", 3)
    extra = {"metadata.json": ""}
    program = torch.export.load("model.pt2", extra_files=extra).module()
    assert program(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert "image_mean" not in json.loads(extra["metadata.json"])


@pytest.mark.parametrize("wrong", ["weights", "model"])
def test_the_command_refuses_a_file_that_is_wrong(
    wrong: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Path("out").mkdir()
    output = Path("out/model.pt2")
    output.write_text("of an earlier export")
    name: Any = tiny_folder
    error: type[Exception] = RuntimeError
    if wrong == "weights":
        model = MCTFViTForImageClassification.from_pretrained(tiny_folder, r=0)
        model.classifier.bias.data[1] = torch.nan
        model.save_pretrained("broken")
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("broken")
        name, error = "broken", ValueError
        message = "broken is not used: weights are infinite or no numbers in classifier.bias"
    else:
        monkeypatch.setitem(
            command.WRITE, "torch_export", partial(to_torch_export, r=[0, 0, 0, 0, 30])
        )
        message = (
            "out/model.pt2 is not written: 30 of 30 images differ by more than 0.0001, up to .*, "
            "and rounding explains 0"
        )
    words = [f"{name},r=0", "--output", output, "--count", 30]
    with pytest.raises(error, match=message):
        run_command(*words)
    assert ("100.0%" in capsys.readouterr().out) == (wrong == "model")
    assert [path.name for path in Path("out").iterdir()] == ["model.pt2"]
    assert output.read_text() == "of an earlier export"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "model.bin"], "model.bin is not allowed: .* ends in .onnx or .pt2"),
        (["--output", "no/model.onnx"], "no/model.onnx cannot be written: its folder does not"),
        (["--count", "2"], "count=2 is not allowed: it must be at least 3"),
        (["--batch_size", "1"], "batch_size=1 is not allowed: it must be at least 2"),
        (["--speed", "true", "--rounds", "0"], "rounds=0 is not allowed: it must be at least 1"),
        (["--images", DIGITS, "--count", "99999"], "not the 99999 that are needed"),
        (["deit_t,reduction=none,r=8"], "r=8 has no effect with reduction='none'"),
        (["deit_t,speed=9"], "setting 'speed' of 'deit_t,speed=9' is not known: it must be one of"),
        (["no/such/model"], "no/such/model"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(words: list[str], message: str) -> None:
    model = [] if not words[0].startswith("-") else ["deit_t"]
    output = [] if "--output" in words else ["--output", "model.pt2"]
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        run_command(*model, *words, *output)
    assert not list(Path().iterdir())


def test_an_image_processor_of_another_size_is_told(tiny_folder: Path) -> None:
    tiny_model().save_pretrained("model")
    ViTImageProcessorPil(size={"height": 48, "width": 32}).save_pretrained("model")
    words = ["--output", "model.pt2", "--images", DIGITS, "--count", 3]
    with pytest.raises(ValueError, match="makes 3 x 48 x 32 numbers .* takes 3 x 32 x 32"):
        run_command("model", *words)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r"onnxruntime.*pip install 'mctf-hf\[onnx\]'"
    with pytest.raises(ImportError, match=message):
        run_command("deit_t", "--output", "model.onnx")
    with pytest.raises(ImportError, match=message):
        to_onnx(small_model(), "model.onnx")
    to_torch_export(tiny_model(r=0, num_hidden_layers=1), "model.pt2")
    assert [path.name for path in Path().iterdir()] == ["model.pt2"]


@needs_shared("data/cifar10")
@needs_shared("checkpoints/deit-tiny-cifar10")
@pytest.mark.timeout(600)
def test_real_weights_on_real_images() -> None:
    checkpoint = SHARED / "checkpoints" / "deit-tiny-cifar10"
    rows = load_dataset(str(SHARED / "data" / "cifar10"), split="test[:200]")
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    pixels = processor([np.asarray(image) for image in rows["image"]], return_tensors="pt")
    model = MCTFViTForImageClassification.from_pretrained(
        checkpoint, r=0.35, fusion_layers=[3, 6, 9]
    ).eval()
    to_onnx(model, "model.onnx", image_processor=processor)
    found = check(model, "model.onnx", pixels["pixel_values"].split([1, 49, 150]))
    assert found.top1 == 1
    assert found.differing <= 0.005  # one; torch in float64 differs in none


def test_a_full_disk_is_told_with_the_file_that_was_asked_for(
    capsys: pytest.CaptureFixture,
) -> None:
    tiny_model(num_hidden_layers=1, reduction="none").save_pretrained("model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("model")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["export", "model", "--output", "model.pt2", "--count", "3"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stopped.value.code == 1
    assert "File too large: 'model.pt2'" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["model"]

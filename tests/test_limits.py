"""Settings and files that claim more than any model has: an error before memory is taken."""

import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from cli.main import main
from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification
from mctf_hf.hub import save
from mctf_hf.loading import load_pretrained
from mctf_hf.registry import BACKBONES, class_of
from tests.helpers import in_timm_names, tiny_model

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return tiny_model(num_labels=10, r=4).config.to_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(num_labels=10, r=4), PROCESSOR, tmp_path_factory.mktemp("m") / "model")


@pytest.fixture
def configured(folder: Path) -> Any:
    """Write settings to the folder's config.json for a while."""
    file = folder / "config.json"
    before = file.read_text()

    def write(contents: Any) -> Path:
        file.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        return folder

    def change(**given: Any) -> Path:
        return write({**json.loads(before), **given})

    change.write = write  # type: ignore[attr-defined]
    yield change
    file.write_text(before)


def refused(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    told = capsys.readouterr().err
    assert ended.value.code in (1, 2) and "Traceback" not in told
    return told


HOSTILE = {
    "num_hidden_layers": 100_000,
    "hidden_size": 10**9,
    "intermediate_size": 10**12,
    "num_attention_heads": 0,
    "image_size": [224, 10**6],
    "patch_size": 0,
    "num_channels": 10**8,
    "num_labels": 10**9,
    "num_register_tokens": 10**9,
    "layer_norm_eps": float("nan"),
    "initializer_range": float("inf"),
    "hidden_dropout_prob": -1.0,
    "tau_info": 1e300,
    "r": 10**400,
    "hidden_act": "foo",
    "dtype": "nn",
    "multi_scale": [10**9],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_numbers_beyond_any_model_are_refused_when_a_configuration_is_made(name: str) -> None:
    with pytest.raises(StrictDataclassError, match=f"{name}=.* is not allowed: "):
        MCTFViTConfig(**{name: HOSTILE[name]})
    made = MCTFViTConfig()
    with pytest.raises(StrictDataclassError, match=f"{name}=.* is not allowed: "):
        setattr(made, name, HOSTILE[name])


@pytest.mark.parametrize(
    "given",
    [
        {"num_hidden_layers": 100_000},
        {"num_labels": 10**9, "id2label": None},
        {"image_size": 65_536, "patch_size": 1},
        {"image_size": 0},
        {"hidden_size": 25},
        {"id2label": {"0": "a", "2": "c"}},
        {"id2label": {"one": "a"}},
        {"patch_size": 64},
        {"layer_norm_eps": 0.0},
    ],
    ids=lambda given: ",".join(given),
)
def test_commands_tell_it_in_a_line(
    given: dict[str, Any], configured: Any, capsys: pytest.CaptureFixture
) -> None:
    tracemalloc.start()
    try:
        message = refused(capsys, "convert", configured(**given), "--output", "made")
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    finally:
        tracemalloc.stop()
    assert any(name in message for name in given)
    assert not Path("made").exists()


@pytest.mark.parametrize("contents", ["[]", "null", "3", '"x"', "{", "[" * 100_000])
def test_a_config_that_holds_no_settings_is_told(
    contents: str, configured: Any, capsys: pytest.CaptureFixture
) -> None:
    folder = configured.write(contents)
    for words in (("convert", folder, "--output", "made"), ("benchmark", folder)):
        message = refused(capsys, *words)
        assert str(folder) in message and ("config" in message)
    with pytest.raises((ValueError, OSError), match="config"):
        MCTFViTForImageClassification.from_pretrained(folder)


def test_a_folder_without_config_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words in (("convert", tmp_path, "--output", "made"), ("benchmark", tmp_path)):
        assert f"{tmp_path} has no config.json" in refused(capsys, *words)


def test_a_config_that_claims_more_than_the_weights_hold(
    configured: Any, capsys: pytest.CaptureFixture
) -> None:
    folder = configured(hidden_size=8_192, intermediate_size=65_536, num_hidden_layers=200)
    for words in (
        ("convert", folder, "--output", "made"),
        ("fit", "--model.pretrained", folder, "--trainer.logger=false"),
    ):
        assert "bytes cannot hold them" in refused(capsys, *words)
    for load in (AutoModelForImageClassification, MCTFViTForImageClassification):
        with pytest.raises(ValueError, match="config.json says [0-9,]+ weights, and the files of"):
            load.from_pretrained(folder, ignore_mismatched_sizes=True)


def _claimed(weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights | {"head.weight": torch.zeros(1, 24).expand(10**9, -1)}, "w.pth")


def _overlapping(weights: dict[str, torch.Tensor]) -> None:
    name = "blocks.0.mlp.fc1.weight"
    torch.save(weights | {name: torch.zeros(200).as_strided((96, 24), (1, 1))}, "w.pth")


def _packed(weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights | {"head.weight": torch.zeros(10**6, 24)}, "plain.pth")
    with zipfile.ZipFile("plain.pth") as plain, zipfile.ZipFile("w.pth", "w", 8) as packed:
        for part in plain.namelist():
            packed.writestr(part, plain.read(part))


def _imaginary(weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights | {"head.weight": torch.empty(10**9, 24, device="meta")}, "w.pth")


@pytest.mark.parametrize("make", [_claimed, _overlapping, _packed, _imaginary])
def test_a_file_that_claims_more_than_it_holds(
    make: Callable[[dict[str, torch.Tensor]], None], capsys: pytest.CaptureFixture
) -> None:
    make(in_timm_names(tiny_model().state_dict()))
    message = refused(capsys, "convert", "w.pth", "--output", "made", "--num_heads", "2")
    assert "w.pth is refused: " in message or "w.pth cannot be read: " in message
    assert not Path("made").exists()


def bomb() -> str:
    steps = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(["a0: &a0 [x, x, x]", *steps])


def test_aliases_that_multiply_are_refused(capsys: pytest.CaptureFixture) -> None:
    Path("bomb.yaml").write_text(bomb())
    Path("loop.yaml").write_text("model: &model\n  fusion: *model\n")
    inline = "{" + bomb().replace("\n", ", ") + "}"
    for words in (
        ("fit", "--config", "bomb.yaml"),
        ("fit", "--config", "loop.yaml"),
        ("fit", f"--model.fusion={inline}"),
        ("benchmark", "deit_t", "--batch_sizes", inline),
        ("benchmark", f"deit_t,r={inline}".replace(", ", ",")),
    ):
        message = refused(capsys, *words)
        assert "its aliases (*) stand for" in message or "r='{a0" in message
    assert "bomb.yaml: the YAML is refused" in refused(capsys, "fit", "--config", "bomb.yaml")


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.sampled_from(["", "eager", "mctf", "evit", "float16", "auto", "/etc/passwd", "x" * 99]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
NAMES = sorted(
    {name for entry in BACKBONES.values() for name in entry.config.known()}
    | {"__class__", "__dict__", "per_layer_config", "rope_scaling", "transformers_weights", "nope"}
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changed=st.dictionaries(st.sampled_from(NAMES), ANY, min_size=1, max_size=3))
def test_any_config_loads_or_is_refused(changed: dict[str, Any], configured: Any) -> None:
    folder = configured(**changed)
    try:
        model = load_pretrained(folder)
    except (ValueError, OSError, RuntimeError, ImportError, StrictDataclassError):
        return
    assert sum(weight.numel() for weight in model.parameters()) < 10**8
    assert class_of(folder) is type(model)


def test_words_that_are_no_settings_are_errors(
    images: torch.Tensor, configured: Any, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"MCTFViTConfig has no settings \['tau_inf'\]: did you"):
        MCTFViTConfig(tau_inf=3)
    model = tiny_model(r=4)
    for called in (model, model.vit):
        with pytest.raises(TypeError, match=r"takes no arguments \['nonsense'\]"):
            called(images, nonsense=3)
    folder = configured()
    for name, value in {"skip_lambda": 2, "num_prefix_tokens": 3, "attention_scale": "x"}.items():
        with pytest.raises(ValueError, match=f"MCTFViTConfig has no settings .'{name}'"):
            MCTFViTForImageClassification.from_pretrained(folder, **{name: value})
        with pytest.raises(ValueError, match=f"MCTFViTConfig has no settings .'{name}'"):
            MCTFViTConfig(**{name: value})
    with pytest.raises(TypeError, match="nonsense"):  # as transformers says it
        MCTFViTForImageClassification.from_pretrained(folder, nonsense=3)
    torch.save(in_timm_names(model.state_dict()), "vit.pth")
    for words in (("vit.pth,skip_lambda=2", "--num_heads", "2"), (f"{folder},skip_lambda=2",)):
        message = refused(capsys, "convert", *words, "--output", "made")
        assert "MCTFViTConfig has no settings ['skip_lambda']" in message
    message = refused(capsys, "benchmark", f"{folder},rope_positions=mean")
    assert "MCTFViTConfig has no settings ['rope_positions']" in message


@torch.no_grad()
def test_what_has_no_effect_has_none(configured: Any, images: torch.Tensor) -> None:
    logits = MCTFViTForImageClassification.from_pretrained(configured())(images).logits
    folder = configured(skip_lambda=2, attention_scale="hidden_size", num_prefix_tokens=7)
    for load in (AutoModelForImageClassification, MCTFViTForImageClassification):
        model = load.from_pretrained(folder)
        assert torch.equal(model(images).logits, logits)
        assert "skip_lambda" not in model.config.to_dict()


@torch.no_grad()
def test_more_than_the_layers_can_fuse_is_told_once(
    images: torch.Tensor, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    model = tiny_model(r=1009)
    for _ in range(3):
        model(images)
        model(images, r=4)
    model(images, r=1013)
    told = [record.getMessage() for record in caplog.records if "min_tokens" in record.message]
    assert [text.partition(",")[0] for text in told] == [
        "r=1009 asks the layers to fuse 4",
        "r=1013 asks the layers to fuse 4",
    ]
    assert "and they can fuse 55" in told[0]
    torch.save(in_timm_names(model.state_dict()), "vit.pth")
    main(["convert", "vit.pth,r=1000", "--num_heads", "2", "--output", "made"])
    assert "they can fuse 55" in capsys.readouterr().out


@torch.no_grad()
def test_a_config_that_asks_for_tuples(configured: Any, images: torch.Tensor) -> None:
    model = MCTFViTForImageClassification.from_pretrained(configured())
    asked = MCTFViTForImageClassification.from_pretrained(configured(return_dict=False))
    assert torch.equal(asked(images)[0], model(images).logits)

"""``mctf benchmark`` through its own door: what it measures, writes and refuses."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from matplotlib.figure import Figure
from PIL import Image
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTForImageClassification,
)

from cli.contestants import make
from cli.evaluation import open_labelled
from cli.main import main
from cli.measuring import peak_bytes, seconds_in_rounds
from lightning_modules.opening import NamedDataset
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.cost import describe, multiply_accumulates, r_for_budget
from mctf_hf.hub import load_image_processor, save
from mctf_hf.presets import preset
from tests.helpers import DIGITS, TINY, tiny_model


def test_a_table_a_file_and_a_picture(tiny_folder: Path, capsys: pytest.CaptureFixture) -> None:
    ViTForImageClassification.from_pretrained(tiny_folder, num_hidden_layers=2).save_pretrained("m")
    models = [f"m{settings}" for settings in ("", ",r=8", ",r=8,slice=1", ",compile", ",aot")]
    words = ["--batch_sizes", "[1,3]", "--rounds", "3", "--output", "o.json", "--plot", "o.png"]
    threads = torch.get_num_threads()
    main(["benchmark", *models, *words, "--threads", str(threads + 1)])
    assert torch.get_num_threads() == threads

    assert "batches of 3, 32 px" in capsys.readouterr().out
    written = json.loads(Path("o.json").read_text())
    assert written["environment"]["threads"] == threads + 1
    rows = written["results"]
    assert [(row["model"], row["batch_size"]) for row in rows] == [
        (model, batch) for batch in (1, 3) for model in models
    ]
    for row in rows:
        first = rows[0] if row["batch_size"] == 1 else rows[len(models)]
        ratio = first["latency_p50_ms"] / row["latency_p50_ms"]
        assert row["ratio"] == pytest.approx(ratio)
        assert row["efficiency"] == pytest.approx(ratio * row["gmacs"] / first["gmacs"])
        assert row["images_per_second"] == pytest.approx(
            1000 * row["batch_size"] / row["latency_p50_ms"]
        )
        assert row["latency_p50_ms"] <= row["latency_p95_ms"]
        assert row["peak_memory_mib"] > 0
    config = make(models[1], None, torch.float32, "cpu").model.model.config
    assert rows[1]["gmacs"] * 1e9 == pytest.approx(multiply_accumulates(config, r=8))
    assert rows[0]["gmacs"] * 1e9 == pytest.approx(describe(config).unfused)
    assert Image.open("o.png").size[0] > 500


@pytest.mark.parametrize(
    ("settings", "left"),
    [("r=8", [65, 57, 49, 41]), ("one_step_ahead=present,r=[0,9,0,5,0]", [65, 65, 56, 56, 51])],
)
def test_sliced_is_the_plain_model_on_as_many_tokens(
    settings: str, left: list[int], tiny_folder: Path
) -> None:
    """Of each layer it is told how many tokens its attention sees."""
    sliced = make(f"{tiny_folder},{settings},sliced", None, torch.float32, "cpu")
    fused = make(f"{tiny_folder},{settings}", None, torch.float32, "cpu")
    plain = make(str(tiny_folder), None, torch.float32, "cpu")
    assert type(sliced.model.model) is type(plain.model.model)
    seen: list[int] = []
    for layer in sliced.model.model.vit.layers:
        layer.attention.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    assert sliced.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert seen[: len(left)] == left
    below = sliced.multiply_accumulates < plain.multiply_accumulates
    assert below and sliced.multiply_accumulates == pytest.approx(
        fused.multiply_accumulates, rel=0.3
    )


def test_an_encoder_of_any_size_is_sliced_as_the_images_are() -> None:
    """Whose own size is another one than that of its positions."""
    sliced = make("dinov2_s,r=8,sliced", 70, torch.float32, "cpu")
    fused = make("dinov2_s,r=8", 70, torch.float32, "cpu")
    assert type(sliced.model.model).__module__.startswith("transformers.")
    assert sliced.multiply_accumulates == pytest.approx(fused.multiply_accumulates, rel=0.1)
    assert sliced.model(torch.zeros(1, 3, 70, 70)).shape[0] == 1


def test_long_names_of_models_are_read_in_the_table_and_in_the_picture(
    tiny_folder: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    monkeypatch.setattr("cli.benchmark.replace", lambda file, write: write(file))
    Path("experiments of November", "deit_tiny" * 9).mkdir(parents=True)
    folder = Path("experiments of November", "deit_tiny" * 9, "model")
    folder.symlink_to(tiny_folder)
    models = [str(tiny_folder), f"{folder},r=8,reduction=tome", f"{folder},r=8"]
    main(["benchmark", *models, "--batch_sizes", "1", "--rounds", "1", "--plot", "o.png"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"{number}: {words}" for number, words in enumerate(models, 1)]
    assert all(len(line) <= 80 for line in lines[3:])
    assert [line.split()[1] for line in lines[3:] if line.startswith("│")] == ["1", "2", "3"]

    (figure,) = figures
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1)
    assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1)
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert ["".join(text.get_text().split("\n")) for text in legend.get_texts()][1:] == models


def test_real_images_of_another_size_in_bfloat16(tiny_folder: Path) -> None:
    options = ["--images", DIGITS, "--image_size", "48", "--dtype", "bfloat16", "--rounds", "1"]
    main(["benchmark", f"{tiny_folder},r=8", "--output", "o.json", *options])
    written = json.loads(Path("o.json").read_text())
    assert (
        written["environment"] | {"image_size": 48, "dtype": "bfloat16"} == written["environment"]
    )
    assert len(written["results"]) == 2


def test_accuracy_is_counted_beside_speed(tiny_folder: Path, capsys: pytest.CaptureFixture) -> None:
    none = ",reduction=evit,keep_rate=1"
    models = [f"{tiny_folder}{settings}" for settings in ("", ",r=8", none)]
    words = ["--accuracy", DIGITS, "--max_images", "50", "--rounds", "1", "--batch_sizes", "[2]"]
    main(["benchmark", *models, *words, "--output", "o.json"])
    assert "top-1" in capsys.readouterr().out
    written = json.loads(Path("o.json").read_text())
    assert written["environment"]["num_images"] == 50
    main(["benchmark", models[1], *words[2:], "--accuracy", DIGITS, "--output", "again.json"])
    again = json.loads(Path("again.json").read_text())["results"][0]["accuracy"]

    labelled = open_labelled(
        NamedDataset(DIGITS),
        "test",
        50,
        make(models[1], None, torch.float32, "cpu").model.model,
        load_image_processor(str(tiny_folder)),
    )
    pixels = torch.stack([labelled[i]["pixel_values"] for i in range(50)])
    labels = torch.tensor([labelled[i]["labels"] for i in range(50)])
    for row, words in zip(written["results"], models, strict=True):
        with torch.inference_mode():
            found = make(words, None, torch.float32, "cpu").model(pixels).argmax(-1)
        assert row["accuracy"] == (found == labels).sum().item() / 50
    assert written["results"][1]["accuracy"] == again
    assert written["results"][2]["accuracy"] == written["results"][0]["accuracy"]
    backbone = MCTFViTForImageClassification.from_pretrained(tiny_folder).vit
    save(backbone, load_image_processor(str(tiny_folder)), "headless")
    for words, message in (
        (["deit_t"], "accuracy=.* is not allowed with deit_t: its weights are random"),
        ([models[0], "--image_size", "48"], "with images of 48 pixels: the image processor of"),
        (["./headless"], r"its weights are random \(classifier.bias, classifier.weight\)"),
    ):
        with pytest.raises(SystemExit):
            main(["benchmark", *words, "--accuracy", DIGITS, "--rounds", "1"])
        assert re.search(message, capsys.readouterr().err)


def test_each_model_gets_images_from_its_own_processor(tiny_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.0] * 3, "image_std": [0.1] * 3}
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    words = ["--accuracy", DIGITS, "--rounds", "1", "--batch_sizes", "[1]", "--output", "o.json"]
    found = []
    for models in ([tiny_folder, other], [other, tiny_folder]):
        main(["benchmark", *map(str, models), *words])
        rows = json.loads(Path("o.json").read_text())["results"]
        found.append({Path(row["model"]).name: row["accuracy"] for row in rows})
    assert found[0] == found[1] and len(set(found[0].values())) == 2


def test_the_order_of_classes_is_that_of_each_model(tiny_folder: Path) -> None:
    rows = load_dataset(DIGITS, split="test")
    for i in range(11):
        file = Path("pets", "cat" if i < 7 else "dog", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows[i]["image"].save(file)
    for name, classes in {"one": ["cat", "dog"], "other": ["dog", "cat"]}.items():
        model = ViTForImageClassification.from_pretrained(
            tiny_folder,
            ignore_mismatched_sizes=True,
            id2label=dict(enumerate(classes)),
            label2id={label: i for i, label in enumerate(classes)},
        )
        model.classifier.weight.data.zero_()
        model.classifier.bias.data = torch.tensor([float(one == "cat") for one in classes])
        model.save_pretrained(name)
        load_image_processor(str(tiny_folder)).save_pretrained(name)
    words = ["--accuracy", "pets", "--split", "train", "--rounds", "1", "--batch_sizes", "[1]"]
    main(["benchmark", "./one", "./other", *words, "--output", "o.json"])
    rows = json.loads(Path("o.json").read_text())["results"]
    assert [row["accuracy"] for row in rows] == [7 / 11, 7 / 11]


def test_a_plain_distilled_deit_has_its_own_weights(tiny_folder: Path) -> None:
    plain = DeiTForImageClassificationWithTeacher(DeiTConfig(**TINY)).eval()
    plain.save_pretrained("deit")
    load_image_processor(str(tiny_folder)).save_pretrained("deit")
    made = make("./deit", None, torch.float32, "cpu")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(made.model(pixels), plain(pixels).logits)
    assert made.missing == () and made.model.model.config.num_tokens() == 66


@pytest.mark.parametrize(
    ("words", "plain", "r"),
    [
        ("deit_t", True, None),
        ("deit_t,attn_implementation=eager", True, None),
        ("deit_t,r=3", False, 3),
        ("deit_t,r=0.35,fusion_layers=[3,6,9]", False, 0.35),
        ("deit_t,reduction=tome,r=4,compile", False, 4),
        ("deit_t,r=auto:0.56", False, r_for_budget(preset("deit_t"), 0.56)[1]),
    ],
)
def test_what_the_words_make(words: str, plain: bool, r: Any) -> None:
    contestant = make(words, None, torch.float32, "cpu")
    model = getattr(contestant.model.model, "_orig_mod", contestant.model.model)
    assert type(model) is (ViTForImageClassification if plain else MCTFViTForImageClassification)
    assert model.config._attn_implementation == ("eager" if "eager" in words else "sdpa")
    if plain:
        assert contestant.multiply_accumulates / 1e9 == pytest.approx(1.258, abs=1e-3)
    else:
        assert model.config.r == r
        assert model.config.reduction == ("tome" if "tome" in words else "mctf")
        assert contestant.multiply_accumulates == multiply_accumulates(model.config)


def test_a_budget_counts_the_images_as_they_are(tiny_folder: Path) -> None:
    words = f"{tiny_folder},reduction=tome,r=auto:0.6"
    contestant = make(words, 48, torch.float32, "cpu")
    config = contestant.model.model.config
    assert config.r == r_for_budget(config, 0.6, image_size=48)[1]
    whole = describe(config, 48).unfused
    assert 0.59 * whole < contestant.multiply_accumulates <= 0.6 * whole
    assert contestant.model(torch.randn(2, 3, 48, 48)).shape == (2, 10)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["deit_x"],
            "model 'deit_x' is not known, did you mean 'deit_t'\\?: it must be a folder, an id",
        ),
        (["deit_t,speed=9"], "setting 'speed' of 'deit_t,speed=9' is not known: it must be one of"),
        (["deit_t,r=-1"], "r=-1 is not allowed"),
        (["deit_t,r=auto:2"], "budget 2.0 is not allowed"),
        (["deit_t,slice=0"], "slice=0 of 'deit_t,slice=0' is not allowed: it must be a count"),
        (["deit_t,r=8,aot=3"], "aot=3 of 'deit_t,r=8,aot=3' is not allowed: it takes no value"),
        (
            ["deit_t,compile,aot"],
            "compile and aot of 'deit_t,compile,aot' are not allowed together",
        ),
        (["deit_t,sliced"], "sliced of 'deit_t,sliced' has no effect: name what is fused"),
        (["lv_vit_s,r=8,sliced"], "sliced of 'lv_vit_s,r=8,sliced' has no effect"),
        (["deit_t", "--dtype", "int8"], "dtype='int8' is not allowed: it must be one of float32,"),
        (["deit_t", "--rounds", "0"], "rounds=0 is not allowed: it must be at least 1"),
        (
            ["deit_t", "--batch_sizes", "[0]"],
            "is not allowed: it must be counts such as 1,16",
        ),
        (["deit_t", "--device", "tpu"], "device='tpu' is not allowed: it must be cpu"),
        (["deit_t", "--plot", "speed.jpg"], "speed.jpg is not allowed: the file's name ends in"),
        (["deit_t,reduction=none,r=8"], "r=8 has no effect with reduction='none'"),
        (["deit_t", "--output", "no/o.json"], "no/o.json cannot be written: its folder does not"),
        (
            ["deit_t", "--images", DIGITS, "--batch_sizes", "[99999]"],
            "not the 99999 that are needed",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", *words])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not list(Path().iterdir())


def test_contestants_take_turns_and_warm_up_is_left_out() -> None:
    calls = []
    runs = [lambda name=name: calls.append(name) for name in "ABC"]
    seconds = seconds_in_rounds(runs, rounds=3, warmup=2)
    assert "".join(calls) == "ABC" * 5
    assert [len(times) for times in seconds] == [3, 3, 3]


def test_peak_memory_counts_what_lives_at_once() -> None:
    mebibyte = 2**18  # of float32

    def run() -> None:
        a = torch.ones(4 * mebibyte)
        b = a + 1  # 8 MiB live
        del a
        torch.ones(2 * mebibyte).add_(b[: 2 * mebibyte])

    assert peak_bytes(run) == pytest.approx(8 * 2**20, rel=0.01)


def test_all_are_given_the_first_ones_images(tiny_folder: Path) -> None:
    options = ["--batch_sizes", "[1]", "--rounds", "1", "--output", "o.json"]
    main(["benchmark", "deit_t,r=8", f"{tiny_folder},r=auto:0.5", *options])
    written = json.loads(Path("o.json").read_text())
    assert written["environment"]["image_size"] == 224
    other = make(f"{tiny_folder},r=auto:0.5", 224, torch.float32, "cpu")
    assert written["results"][1]["gmacs"] * 1e9 == pytest.approx(other.multiply_accumulates)


def test_a_budget_replaces_a_saved_list(tmp_path: Path) -> None:
    tiny_model(r=[0, 2, 4, 4, 4]).save_pretrained("saved")
    config = make("saved,fusion_layers=[1,3],r=auto:0.8", None, torch.float32, "cpu")
    fused = config.model.model.config.r
    assert fused[1] and fused[3] and not fused[2] and not fused[4]

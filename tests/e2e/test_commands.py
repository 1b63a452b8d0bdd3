"""The real commands, in processes of their own, on real images."""

import csv
import glob
import json
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from cli.commands import COMMANDS, FINETUNING
from cli.main import main
from tests.helpers import DIGITS, REPOSITORY, fails, fit_words, mctf, predict_words
from tests.image_sets import PNG, encoded, write_dataset
from tests.training_runs import as_rank, free_port, start

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through."""
    folder = tmp_path_factory.mktemp("finished")
    done = mctf(*fit_words(folder, tiny_folder))
    assert done.returncode == 0, done.stderr
    (folder / "output").write_text(done.stdout + done.stderr)
    return folder


def test_fit_tells_what_it_does_and_nothing_of_others(finished: Path) -> None:
    shown = (finished / "output").read_text()
    assert "by layer: 0, 6, 6, 6, 6 fewer" in shown
    assert "39,178 of 39,178 weights are trained" in shown
    for noise in (
        "Tip",
        "deprecated",
        "Repo card",
        "FLOPs",
        "num_labels",
        "not empty",
        "asks the layers",
    ):
        assert noise not in shown, noise


def test_fit_leaves_checkpoints_logs_and_a_model_that_loads(finished: Path) -> None:
    checkpoints = sorted(path.name for path in finished.rglob("*.ckpt"))
    assert len(checkpoints) == 3 and checkpoints[1:] == ["last.ckpt", "previous.ckpt"]
    assert checkpoints[0].startswith("best-epoch=")
    last = torch.load(next(finished.rglob("last.ckpt")), weights_only=False)
    assert last["global_step"] == 2 * 36
    rows = list(csv.DictReader((finished / "run" / "metrics.csv").open()))
    assert sum(bool(row["val/accuracy"]) for row in rows) == 2
    assert (finished / "run" / "config.yaml").exists()
    model = AutoModelForImageClassification.from_pretrained(finished / "model").eval()
    assert (model.config.r, model.config.id2label[3]) == (6, "3")
    best = torch.load(next(finished.rglob("best-*.ckpt")), weights_only=False)["state_dict"]
    for name, weight in model.state_dict().items():
        assert torch.equal(best[f"model.{name}"], weight)
    assert AutoImageProcessor.from_pretrained(finished / "model").size["height"] == 32


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    words = fit_words(tmp_path, tiny_folder)
    process = start(main, [*map(str, words)])
    # Unlike rglob, it passes over folders that vanish while it looks: drafts come and go.
    while not glob.glob(f"{tmp_path}/**/last.ckpt", recursive=True):
        assert process.is_alive(), "the run ended before its first checkpoint"
        time.sleep(0.01)
    process.kill()
    process.join()
    (last,) = tmp_path.rglob("last.ckpt")
    step = torch.load(last, weights_only=False)["global_step"]
    assert 0 < step < 36, "it was to be killed in the middle of its first epoch"
    assert not (tmp_path / "model").exists()

    output = tmp_path / "output"
    resumed = start(main, [*map(str, words), "--ckpt_path", str(last)], output=output)
    resumed.join()
    assert resumed.exitcode == 0, output.read_text()
    for kept in ("best-*.ckpt", "last.ckpt"):
        (expected,) = (path for path in finished.rglob(kept))
        (found,) = (path for path in tmp_path.rglob(kept))
        weights = torch.load(found, weights_only=False)["state_dict"]
        for name, weight in torch.load(expected, weights_only=False)["state_dict"].items():
            assert torch.equal(weights[name], weight), name
    assert (
        load_file(tmp_path / "model" / "model.safetensors").keys()
        == load_file(finished / "model" / "model.safetensors").keys()
    )


def test_validate_and_test_report_accuracy(
    finished: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    accuracies: dict[str, float] = {}
    for command in ("validate", "test"):
        caplog.clear()
        main(
            [command, "--model.pretrained", str(finished / "model"), "--data.dataset", DIGITS,
             "--trainer.logger", "false"]
        )  # fmt: skip
        split = {"validate": "val", "test": "test"}[command]
        (shown,) = re.findall(rf"{split}/accuracy +│ +([\d.]+)", capsys.readouterr().out)
        accuracies[command] = float(shown)
        assert "by layer: 0, 6, 6, 6, 6 fewer" in caplog.text
    model = AutoModelForImageClassification.from_pretrained(finished / "model").eval()
    processor = AutoImageProcessor.from_pretrained(finished / "model")
    rows = load_dataset(DIGITS, split="test")
    pixels = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
    with torch.inference_mode():
        found = model(**pixels).logits.argmax(1)
    right = (found == torch.tensor(rows["label"][:])).float().mean().item()
    assert accuracies["test"] == pytest.approx(right)
    assert accuracies["validate"] == pytest.approx(right, abs=0.2)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predict_writes_file_label_and_score(finished: Path, tmp_path: Path, suffix: str) -> None:
    (tmp_path / "photos").mkdir()
    for i, level in enumerate((0, 90, 255)):
        Image.new("L", (20, 20), level).save(tmp_path / "photos" / f"{i}.png")
    output = tmp_path / "out" / f"labels.{suffix}"
    main(
        ["predict", "--model.pretrained", str(finished / "model"), "--trainer.logger", "false",
         "--data.predict_folder", str(tmp_path / "photos"), "--predictions.path", str(output)]
    )  # fmt: skip
    text = output.read_text()
    rows = (
        list(csv.DictReader(text.splitlines()))
        if suffix == "csv"
        else [json.loads(line) for line in text.splitlines()]
    )
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    model = AutoModelForImageClassification.from_pretrained(finished / "model").eval()
    processor = AutoImageProcessor.from_pretrained(finished / "model", backend="pil")
    for row in rows:
        image = Image.open(row["file"]).convert("RGB")
        logits = model(**processor(image, return_tensors="pt")).logits
        score, index = logits.softmax(-1).max(-1)
        assert row["label"] == model.config.id2label[index.item()]
        assert float(row["score"]) == pytest.approx(score.item(), rel=1e-4)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.r", "-2"], "r=-2 is not allowed: r is a count of tokens"),
        (["--model.fusion_layers", "[7]"], "fusion_layers=[7] is not allowed"),
        (["--model.reduction", "prune"], "reduction='prune' is not allowed"),
        (["--model.fusion", "{pooling: sum}"], "pooling='sum' is not allowed"),
        (["--model.fusion", "{tau_sim: -1}"], "tau_sim=-1 is not allowed"),
        (["--model.r", "many"], "r='many' is not allowed: it must be a number, a list"),
        (["--model.lerning_rate", "1"], "model.lerning_rate"),
        (["--data.image_column", "img"], "has the columns image, label"),
        (["--data.dataset", "/nowhere"], "dataset='/nowhere': there is no such folder"),
        (["--model.pretrained", "/nowhere"], "/nowhere"),
        (["--model.num_labels", "7"], "the model has the classes 0 to 6"),
        (
            ["--model.r_max", "9"],
            "r_max=9 is not allowed: it must be at least 0 (no teacher) and at most 6",
        ),
    ],
)
def test_a_mistake_gets_one_clear_message(
    words: list[str],
    message: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, fit_words(tmp_path, tiny_folder)), *words])
    assert stopped.value.code in (1, 2)
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.rglob("*.ckpt")) and not (tmp_path / "model").exists()


def test_a_broken_image_in_a_worker_is_named(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    jpeg = encoded(Image.effect_noise((64, 64), 50), "jpeg")
    rows = [(PNG, 0)] * 20 + [(jpeg[: len(jpeg) // 2], 1)] + [(PNG, 1)] * 20
    folder = write_dataset(tmp_path / "set", rows)
    words = [*map(str, fit_words(tmp_path, tiny_folder)), "--data.dataset", folder]
    words += ["--data.val_split", "train", "--trainer.num_sanity_val_steps", "0"]
    line = fails([*words, "--model.num_labels", "2"], capsys)
    assert f"mctf: error: row 20 of {folder}, split train holds no readable image" in line


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=str)
def test_recipes_are_complete_and_without_mistakes(
    config: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as finished:
        main(["fit", "--config", str(config), "--print_config"])
    assert finished.value.code == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(config.read_text())
    for section in ("model", "data", "trainer"):
        assert (
            settings[section].items()
            >= {name: value for name, value in given[section].items() if name != "logger"}.items()
        )


def test_a_folder_of_something_else_is_refused_before_training(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, fit_words(tmp_path, tiny_folder)), "--export.folder", str(documents)])
    assert stopped.value.code == 1
    assert "holds something else than a model" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_two_processes_train_together(tiny_folder: Path, tmp_path: Path) -> None:
    together = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = mctf(
        *fit_words(tmp_path, tiny_folder), *together, "--trainer.max_epochs", "1",
        "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1",
        "--data.num_workers", "0", "--summary.enabled", "false", "--picture.every_n_epochs", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "config.json").exists()


def test_two_processes_predict_together(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(5):  # an odd number, so that one process repeats an image
        Image.new("L", (20, 20), 50 * i).save(tmp_path / "photos" / f"{i}.png")
    words = predict_words(tiny_folder, tmp_path / "photos", "--predictions.path", "p.csv")
    words += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    port = free_port()
    runs = [start(as_rank, rank, 2, port, main, words) for rank in range(2)]
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [Path(row["file"]).name for row in rows] == [f"{i}.png" for i in range(5)]


def test_help_names_every_command_and_setting(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no name is broken at its hyphen
    main(["--help"])
    overview = capsys.readouterr().out
    assert all(word in overview for word in COMMANDS)
    for command in COMMANDS.keys() - FINETUNING:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"usage: mctf {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    fit = capsys.readouterr().out
    for setting in ("--model.r", "--model.r_max", "--data.dataset", "--export.folder"):
        assert setting in fit
    assert "tokens that each fusing layer fuses" in fit
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert "compare the three" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    help_of_benchmark = capsys.readouterr().out
    assert "timings of each model" in help_of_benchmark and "auto:0.56" in help_of_benchmark

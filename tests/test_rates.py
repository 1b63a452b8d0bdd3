"""Methods that go by a keep rate, through every door: finetuning, cards, pictures, exports."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor
from transformers import TrainingArguments, ViTImageProcessorPil

from cli.contestants import make
from cli.evaluation import evaluate
from cli.main import main
from lightning_modules import MCTFFinetuner
from mctf_hf.cost import keep_rate_for_budget, multiply_accumulates
from mctf_hf.export import check, to_onnx, to_torch_export
from mctf_hf.hub import save
from mctf_hf.loading import load_pretrained
from mctf_hf.model_card import make_card
from mctf_hf.teacher import teacher_amount, teacher_limit
from mctf_hf.trainer import ConsistencyTrainer
from mctf_hf.visualization import draw_groups
from tests.helpers import DIGITS, TINY, tiny_model
from tests.training_runs import digits, loss_of, short_trainer

LEARNING: dict[str, Any] = {
    **TINY, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_labels": 10,
    "initializer_range": 0.1, "min_tokens": 1,
}  # fmt: skip
TWO_LAYERS = {"num_hidden_layers": 2, "fusion_layers": [0, 1]}
METHODS = {
    "tome": {"r": 2},
    "evit": {"keep_rate": 0.7},
    "token_mergence": {"keep_rate": "auto:0.8", "fusion": {"multi_scale": [2]}},
}


@pytest.mark.parametrize("reduction", METHODS)
def test_finetuning_learns_with_every_method(reduction: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MCTFFinetuner(
        config=LEARNING,
        reduction=reduction,
        **METHODS[reduction],
        learning_rate=0.1,
        label_smoothing=0,
    )
    assert module.r_max == 1
    first, log = loss_of(module, tmp_path), CSVLogger(tmp_path, name="", version="")
    run = short_trainer(tmp_path, limit_train_batches=70, limit_val_batches=0, logger=log)
    run.fit(module, digits())
    assert loss_of(module, tmp_path) < 0.8 * first
    with Path(tmp_path, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    name = "train/teacher_r" if reduction == "tome" else "train/teacher_keep_rate"
    drawn = [float(row[name]) for row in rows if row.get(name)]
    assert len(drawn) > 10
    if reduction != "tome":
        assert min(drawn) > module.model.config.keep_rate and max(drawn) <= 1
        assert len(set(drawn)) == len(drawn)


def test_the_teachers_keep_rate_is_drawn_above_the_students() -> None:
    config = tiny_model(reduction="evit", keep_rate=[1, 0.6, 1, 0.8, 1]).config
    assert teacher_limit(config, None) == 1 and teacher_limit(config, 0) == 0
    drawn = [teacher_amount(config, 1, 3, step)["keep_rate"] for step in range(1000)]
    assert drawn == [teacher_amount(config, 1, 3, step)["keep_rate"] for step in range(1000)]
    shares = np.array([(rates[1] - 0.6) / 0.4 for rates in drawn])
    assert shares.min() > 0 and shares.max() <= 1
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.std() - 12**-0.5) < 0.02
    for rates, share in zip(drawn, shares, strict=True):
        assert rates == pytest.approx([1, 0.6 + 0.4 * share, 1, 0.8 + 0.2 * share, 1])
    assert teacher_limit(tiny_model(reduction="evit", keep_rate=1).config, None) == 0
    with pytest.raises(ValueError, match="r_max=2 is not allowed with reduction='evit', whose"):
        teacher_limit(config, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0.5}, "keep_rate=0.5 has no effect with reduction='mctf'"),
        ({"reduction": "evit", "r": 4}, "r=4 has no effect with reduction='evit'"),
        (
            {"reduction": "evit", "keep_rate": "half"},
            "keep_rate='half' is not allowed: it must be a nu",
        ),
        ({"fusion": {"keep_rate": 0.3}}, "keep_rate=0.3 has no effect with reduction='mctf'"),
        ({"reduction": "evit", "fusion": {"r": 3}}, "r=3 has no effect with reduction='evit'"),
        ({"reduction": "evit", "fusion": {"inflection": 1}}, "inflection=1 has no effect with"),
        ({"r": [1] * 5, "fusion": {"inflection": 1}}, "inflection=1 has no effect with"),
        ({"reduction": "tome", "fusion": {"tau_sim": 2}}, "tau_sim=2 has no effect .* of mctf"),
        ({"fusion": {"fuse_token": False}}, "fuse_token=False has no effect .* setting of evit"),
    ],
)
def test_amounts_without_effect_are_refused(
    settings: dict[str, Any], message: str, tiny_folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        MCTFFinetuner(str(tiny_folder), **settings)


def test_scales_are_added_to_a_checkpoint_that_lacks_them(
    tiny_folder: Path, tmp_path: Path
) -> None:
    plain = MCTFFinetuner(str(tiny_folder), reduction="token_mergence").model.eval()
    scaled = MCTFFinetuner(
        str(tiny_folder), reduction="token_mergence", fusion={"multi_scale": [2, 4]}
    ).model.eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(scaled(images).logits, plain(images).logits)
    assert sum("coarse" in name for name, _ in scaled.named_parameters()) == 6
    for model in (scaled, MCTFFinetuner(str(tiny_folder), fusion={"multi_scale": [2]}).model):
        save(model, ViTImageProcessorPil(size={"height": 32, "width": 32}), tmp_path / "scaled")
    more = MCTFFinetuner(str(tmp_path / "scaled"), fusion={"multi_scale": [2, 4]}).model.eval()
    torch.testing.assert_close(more(images).logits, model.eval()(images).logits)
    for scales in (None, [4], [4, 2]):
        with pytest.raises(ValueError, match=r"multi_scale=.* has the scales \[2\], which"):
            MCTFFinetuner(str(tmp_path / "scaled"), fusion={"multi_scale": scales})
    with pytest.raises(ValueError, match="coarse_patch_embeddings"):  # not for inference
        load_pretrained(str(tiny_folder), multi_scale=[2])


def test_the_command_line_finetunes_by_keep_rate(tiny_folder: Path, tmp_path: Path) -> None:
    main(
        ["fit", "--model.pretrained", str(tiny_folder), "--model.reduction", "token_mergence",
         "--model.keep_rate", "auto:0.7", "--model.fusion", "{multi_scale: [2]}",
         "--data.dataset", DIGITS, "--data.num_workers", "0", "--trainer.max_epochs", "1",
         "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1",
         "--trainer.accelerator", "cpu", "--trainer.logger", "false",
         "--trainer.enable_progress_bar", "false", "--export.folder", "out"]
    )  # fmt: skip
    model = load_pretrained("out")
    assert model.config.reduction == "token_mergence" and model.config.multi_scale == [2]
    assert model.config.keep_rate == keep_rate_for_budget(model.config, 0.7)
    record = json.loads(Path("out/training.json").read_text())
    assert (record["reduction"], record["keep_rate"]) == ("token_mergence", "auto:0.7")
    assert "r_max" not in record and "consistency_weight" in record
    card = str(make_card("me/model", model.config, license="mit", training=record))
    assert "Finetuned with token-reduction consistency" in card


def test_transformers_trainer_draws_keep_rates(tmp_path: Path, images: Tensor) -> None:
    model = tiny_model(reduction="evit", keep_rate=0.6, fusion_layers=[1, 3])
    asked: list[Any] = []
    forward = model.forward

    def recording(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("keep_rate"))
        return forward(*args, **kwargs)

    model.forward = recording
    rows = [{"pixel_values": image, "labels": i} for i, image in enumerate(images)]
    arguments = TrainingArguments(
        str(tmp_path / "t"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    ConsistencyTrainer(model=model, args=arguments, train_dataset=rows).train()
    assert [rates is None for rates in asked] == [True, False] * 2
    assert all(0.6 < rates[1] <= 1 and rates[0] == 1 for rates in asked[1::2])


@pytest.mark.parametrize("reduction", ["evit", "token_mergence"])
def test_a_card_with_other_keep_rates(reduction: str) -> None:
    model = tiny_model(reduction=reduction, keep_rate=0.7, min_tokens=1)
    evaluation = evaluate(model, None, batch_size=2, rounds=1)
    assert evaluation.own.keep_rate == 0.7 and evaluation.own.r is None
    assert evaluation.plain.r == 0 and evaluation.plain.name == "no fusion (plain model)"
    assert len(evaluation.others) >= 2
    for row in evaluation.others:
        cost = multiply_accumulates(model.config, keep_rate=row.keep_rate)
        assert row.gmacs * 1e9 == pytest.approx(cost)
        assert row.name == f"keep_rate {row.keep_rate}"
    card = str(make_card("me/model", model.config, license="mit", evaluation=evaluation))
    assert "keep_rate=0.8, output_fusion=True" in card and "config.keep_rate = 1.0" in card
    assert {"evit": "2202.07800", "token_mergence": "2306.04897"}[reduction] in card
    assert "**keep_rate 0.7, as configured**" in card


def test_dropped_patches_are_black() -> None:
    image = Image.new("RGB", (8, 8), (250, 200, 100))
    drawn = np.asarray(draw_groups(image, [[-1, 3], [4, -1]], scale=4))
    assert (drawn[:16, :16] == 0).all() and (drawn[16:, 16:] == 0).all()
    assert (drawn[2:14, 18:30] == (250, 200, 100)).all()


def test_pictures_of_what_was_dropped(tiny_folder: Path, capsys: pytest.CaptureFixture) -> None:
    evit = f"{tiny_folder},reduction=evit,keep_rate=0.5,fuse_token="
    words = [evit + value for value in ("true", "false")]
    main(["visualize", *words, "--images", DIGITS, "--output", "o.png", "--count", "1"])
    assert "65 -> 11 tokens" in capsys.readouterr().out
    sheet = np.asarray(Image.open("o.png"))
    third = sheet.shape[1] // 3
    black = [(sheet[40:, i * third : (i + 1) * third] == 0).all(2).mean() for i in range(3)]
    assert black[2] > 0.3 > black[1]


def test_benchmark_takes_budgets_of_both_kinds(tiny_folder: Path) -> None:
    base = make(str(tiny_folder), None, torch.float32, "cpu").multiply_accumulates
    for words in ("r=auto:0.7", "reduction=evit,keep_rate=auto:0.7"):
        contestant = make(f"{tiny_folder},{words}", None, torch.float32, "cpu")
        assert 0.66 < contestant.multiply_accumulates / base <= 0.7
    with pytest.raises(ValueError, match="meets a budget by its keep_rate"):
        make(f"{tiny_folder},reduction=evit,r=auto:0.7", None, torch.float32, "cpu")


@pytest.mark.parametrize("reduction", ["evit", "token_mergence"])
def test_they_are_exported(reduction: str, tmp_path: Path) -> None:
    model = tiny_model(reduction=reduction, keep_rate=0.6, **TWO_LAYERS)
    to_torch_export(model, tmp_path / "m.pt2")
    assert check(model, tmp_path / "m.pt2", [torch.randn(4, 3, 32, 32)]).differing == 0


def test_what_is_not_a_plain_vit_is_compared_with_itself() -> None:
    for settings in (
        {"class_token": False, "num_register_tokens": 1},
        {"class_token": False},
        {"multi_scale": [2]},
    ):
        evaluation = evaluate(tiny_model(**settings), None, batch_size=2, rounds=1)
        assert evaluation.plain.name == "no fusion"


def test_convert_takes_a_budget_of_rates(tiny_folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(["convert", f"{tiny_folder},reduction=evit,keep_rate=auto:0.7", "--output", "made"])
    config = load_pretrained("made").config
    assert config.keep_rate == keep_rate_for_budget(config, 0.7)
    assert f"evit, keep_rate {config.keep_rate}: 65 tokens become" in capsys.readouterr().out


def test_a_schedule_on_the_command_line(tiny_folder: Path) -> None:
    contestant = make(f"{tiny_folder},reduction=tome,r=(6,-1)", None, torch.float32, "cpu")
    config = contestant.model.model.config
    assert (config.r, config.inflection) == (6, -1)
    assert config.tokens_fused(65) == (12, 9, 6, 3, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": [0, 0, 20, 0, 0]},
        {"r": (6, -1), "reduction": "tome"},
        {"r": 0.35, "fusion_layers": [1, 3]},
        {"r": 20},
        {"reduction": "evit", "keep_rate": 0.5},
    ],
)
def test_no_layer_of_the_teacher_fuses_more_than_the_students(settings: dict[str, Any]) -> None:
    def accumulate(fused: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(itertools.accumulate(fused))

    config = tiny_model(**settings).config
    limit = teacher_limit(config, None)
    student = accumulate(config.tokens_fused(65))
    teachers = [
        accumulate(config.tokens_fused(65, **teacher_amount(config, limit, 0, step)))
        for step in range(30)
    ]
    assert all(a <= b for teacher in teachers for a, b in zip(teacher, student, strict=True))
    assert len(set(teachers)) > 1 and max(teachers)[-1] > 0


def test_an_exported_file_tells_the_keep_rate() -> None:
    for settings, expected in (
        ({"reduction": "evit", "keep_rate": 0.5}, {"keep_rate": "0.5"}),
        ({"reduction": "tome", "r": (4, -1)}, {"r": "4", "inflection": "-1"}),
    ):
        to_torch_export(tiny_model(num_hidden_layers=1, **settings), "model.pt2")
        extra = {"metadata.json": ""}
        torch.export.load("model.pt2", extra_files=extra)
        told = json.loads(extra["metadata.json"])
        amounts = {name: told[name] for name in ("r", "keep_rate", "inflection") if name in told}
        assert amounts == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"reduction": "evit", "fuse_token": True},
        {"reduction": "token_mergence", "multi_scale": [2]},
    ],
)
def test_they_are_written_as_onnx(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**settings, keep_rate=0.6, **TWO_LAYERS)
    if "multi_scale" in settings:
        torch.nn.init.normal_(model.vit.embeddings.coarse_patch_embeddings[0].fusion.weight)
    to_onnx(model, tmp_path / "m.onnx")
    assert check(model, tmp_path / "m.onnx", [torch.randn(4, 3, 32, 32)]).differing == 0


def test_a_file_can_be_written_with_another_keep_rate(tmp_path: Path, images: Tensor) -> None:
    model = tiny_model(reduction="evit", keep_rate=0.9, num_hidden_layers=3, fusion_layers=[1])
    file = to_torch_export(model, tmp_path / "m.pt2", keep_rate=0.5)
    extra = {"metadata.json": ""}
    program = torch.export.load(file, extra_files=extra)
    assert json.loads(json.loads(extra["metadata.json"])["keep_rate"]) == 0.5
    with torch.no_grad():
        expected = model(images, keep_rate=0.5).logits
        torch.testing.assert_close(program.module()(images), expected)
        assert not torch.allclose(expected, model(images).logits, atol=1e-5)
    for write, name in ((to_onnx, "m.onnx"), (to_torch_export, "n.pt2")):
        with pytest.raises(ValueError, match="keep_rate=0.5 has no effect with reduction='tome'"):
            write(tiny_model(reduction="tome", r=4), tmp_path / name, keep_rate=0.5)
        assert not (tmp_path / name).exists()


@torch.no_grad()
def test_sizes_enter_attention_but_with_evit(images: Tensor) -> None:
    for reduction, same in (("evit", True), ("token_mergence", False), ("tome", False)):
        logits = [
            tiny_model(reduction=reduction, r=8, keep_rate=0.5, proportional_attention=on)(images)
            for on in (True, False)
        ]
        assert torch.equal(logits[0].logits, logits[1].logits) is same

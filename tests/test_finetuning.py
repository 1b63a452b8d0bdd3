"""The training logic: what is drawn, decayed, scheduled, logged, and what stops it."""

import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.debugging import aot_eager
from transformers import ViTConfig

from lightning_modules import MCTFFinetuner
from lightning_modules.finetuning import parameter_groups
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.classes import names_of
from mctf_hf.cost import describe, multiply_accumulates
from mctf_hf.teacher import teacher_r
from tests.helpers import TINY, tiny_model
from tests.training_runs import digits, loss_of, short_trainer


def test_the_teachers_r_is_uniform_and_follows_from_seed_and_step() -> None:
    drawn = [teacher_r(1, step, 4) for step in range(2000)]
    assert drawn == [teacher_r(1, step, 4) for step in range(2000)]
    assert all(440 < drawn.count(r) < 560 for r in range(4)) and max(drawn) == 3
    assert drawn != [teacher_r(2, step, 4) for step in range(2000)]


def test_norms_biases_positions_and_class_token_do_not_decay() -> None:
    model = tiny_model()
    decay, no_decay = parameter_groups(model, 0.05)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decaying = {names[id(p)] for p in decay["params"]}
    assert decaying == {
        name for name in names.values() if name.endswith("weight") and "layernorm" not in name
    }
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= {
        names[id(p)] for p in no_decay["params"]
    }


def test_learning_rate_scales_with_the_global_batch_warms_up_and_falls(
    tiny_folder: Path, tmp_path: Path
) -> None:
    module = MCTFFinetuner(
        str(tiny_folder), r=6, learning_rate=1e-3, min_learning_rate=1e-6, warmup_epochs=1
    )
    run = short_trainer(
        tmp_path,
        logger=CSVLogger(tmp_path, name="", version=""),
        accumulate_grad_batches=2,
        limit_train_batches=8,
        max_epochs=3,
    )
    run.fit(module, digits())
    logged = {row["step"]: row for row in _metrics(tmp_path) if row["train/lr"]}
    rates = [float(row["train/lr"]) for row in logged.values()]
    peak = 1e-3 * 16 * 2 / 512
    steps = 3 * 8 // 2
    assert max(rates) == pytest.approx(peak)
    assert rates.index(max(rates)) == 4  # after one epoch of four optimizer steps
    assert rates[0] < peak and rates[-1] < peak / 4
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-6)
    assert run.global_step == steps


def _metrics(folder: Path) -> list[dict[str, str]]:
    import csv

    return list(csv.DictReader((folder / "metrics.csv").open()))


def test_every_part_of_the_loss_is_logged(tiny_folder: Path, tmp_path: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6, r_max=3, confidence_threshold=0.1)
    short_trainer(tmp_path, logger=CSVLogger(tmp_path, name="", version="")).fit(module, digits())
    rows = [row for row in _metrics(tmp_path) if row["train/loss"]]
    assert rows
    for row in rows:
        value = {
            name: float(row[f"train/{name}"])
            for name in (
                "loss",
                "student",
                "teacher",
                "consistency",
                "passing",
                "confidence",
                "teacher_r",
                "lr",
            )
        }
        total = value["student"] + value["teacher"] + 3 * value["consistency"]
        assert value["loss"] == pytest.approx(total, rel=1e-5)
        assert 0 <= value["passing"] <= 1 and 0 < value["confidence"] < 1
        assert value["teacher_r"] in (0, 1, 2)
    validated = [row for row in _metrics(tmp_path) if row["val/accuracy"]]
    assert validated and all(
        0 <= float(row["val/accuracy"]) <= float(row["val/accuracy_top5"]) for row in validated
    )


def test_accuracy_is_that_of_the_model_with_fusion(tiny_folder: Path, tmp_path: Path) -> None:
    module, data = MCTFFinetuner(str(tiny_folder), r=6), digits(eval_batch_size=64)
    (result,) = short_trainer(tmp_path).test(module, data, verbose=False)
    images = data.test_dataloader().dataset
    batch = torch.stack([images[i]["pixel_values"] for i in range(len(images))])
    labels = torch.tensor([images[i]["labels"] for i in range(len(images))])
    model = MCTFViTForImageClassification.from_pretrained(tiny_folder, r=6).eval()
    with torch.no_grad():
        top5 = model(batch).logits.topk(5).indices == labels[:, None]
    assert result["test/accuracy"] == pytest.approx(top5[:, 0].float().mean().item())
    assert result["test/accuracy_top5"] == pytest.approx(top5.any(1).float().mean().item())


def test_training_learns_with_and_without_a_teacher(tmp_path: Path) -> None:
    config = {
        **TINY, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_labels": 10,
        "initializer_range": 0.1,
    }  # fmt: skip
    for r_max in (2, 0):
        torch.manual_seed(0)
        module = MCTFFinetuner(
            config=config, r=2, r_max=r_max, learning_rate=0.1, label_smoothing=0
        )
        first, data = loss_of(module, tmp_path), digits()
        short_trainer(tmp_path, limit_train_batches=70, limit_val_batches=0).fit(module, data)
        assert loss_of(module, tmp_path) < 0.7 * first


def test_a_loss_that_is_not_finite_stops_training_and_keeps_checkpoints(
    tiny_folder: Path, tmp_path: Path
) -> None:
    class Breaking(MCTFFinetuner):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            if self.global_step == 3:
                batch["pixel_values"].fill_(math.nan)

    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    run = short_trainer(tmp_path, enable_checkpointing=True, callbacks=[kept])
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3 of epoch 0"):
        run.fit(Breaking(str(tiny_folder), r=6), digits())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=3.ckpt"]
    weights = torch.load(tmp_path / "step=3.ckpt", weights_only=False)["state_dict"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_new_head_is_named_after_the_datasets_classes(tmp_path: Path, tiny_folder: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6, num_labels=12)
    assert module.model.classifier.weight.shape == (12, 24)
    module = MCTFFinetuner(config={**TINY, "num_labels": 10}, r=6)
    short_trainer(tmp_path).fit(module, digits())
    assert module.model.config.id2label == {i: str(i) for i in range(10)}
    assert module.model.config.label2id["7"] == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained": None}, "pretrained=None and config=None: set one of them"),
        ({"config": TINY}, "set one of them"),
        ({"fusion": {"tau": 3}}, r"there are no settings \['tau'\]"),
        ({"r_max": -1}, "r_max=-1 is not allowed"),
        (
            {"r_max": 7, "r": 6},
            "r_max=7 is not allowed: it must be at least 0 .no teacher. and at most 6",
        ),
        ({"reduction": "none", "r": 4}, "r=4 has no effect with reduction='none'"),
        ({"fusion": {"to_dict": 1}}, r"there are no settings \['to_dict'\]"),
        ({"pretrained": None, "config": {"hiden_size": 24}}, r"no settings \['hiden_size'\]"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 is not allowed: it must be at least 0"),
        ({"label_smoothing": 2.0}, "label_smoothing=2.0 is not allowed: .* at most 1"),
        ({"learning_rate": float("1e400")}, "learning_rate=inf is not allowed: .* and finite"),
        ({"min_learning_rate": math.nan}, "min_learning_rate=nan is not allowed"),
        ({"num_labels": 0}, "num_labels=0 is not allowed: it must be at least 1"),
        ({"pretrained": None, "config": {**TINY, "num_labels": 0}}, "num_labels=0 of config"),
        (
            {"pretrained": None, "config": {"hidden_size": 24}},
            "states no number of classes: set num_labels",
        ),
        (
            {"num_labels": 1, "problem_type": "multi_label_classification"},
            "num_labels=1 is not allowed with problem_type=multi_label_classification",
        ),
        (
            {"num_labels": 1, "problem_type": "single_label_classification"},
            "num_labels=1|requires `num_labels > 1`",
        ),
        ({"num_labels": 1, "label_smoothing": 0.1}, "label_smoothing=0.1 has no effect with prob"),
        ({"num_labels": 1, "class_weights": "balanced"}, "class_weights=.* has no effect with pro"),
        (
            {"problem_type": "multi_label_classification", "distill_from": "somebody/else"},
            "distill_from='somebody/else' is not allowed with problem_type=multi",
        ),
        ({"freeze": True, "r_max": 2}, "r_max=2 has no effect with freeze=True"),
        ({"freeze": True, "layer_decay": 0.9}, "layer_decay=0.9 has no effect with freeze=True"),
        ({"image_size": 30}, r"image_size=30 is not allowed: .* multiple of patch_size=4"),
        ({"pretrained": None, "config": TINY, "image_size": 16}, "image_size=16 .* beside config"),
        ({"attn_implementation": "egaer"}, 'attn_implementation="egaer"` is not supported'),
        (
            {"reduction": "evit", "r": None, "keep_rate": 0.5, "compile": True},
            "compile=True is not allowed with reduction='evit'.* or set r_max to 0",
        ),
    ],
)
def test_settings_that_contradict_each_other(
    settings: dict[str, Any], message: str, tiny_folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        MCTFFinetuner(**{"pretrained": str(tiny_folder), **settings})


def test_fusion_settings_reach_the_model_and_unset_ones_stay(
    tiny_folder: Path, tmp_path: Path
) -> None:
    module = MCTFFinetuner(
        str(tiny_folder), r=[0, 1, 2, 3, 0], fusion={"tau_sim": 2, "pooling": "mean"}
    )
    config = module.model.config
    assert (config.r, config.tau_sim, config.pooling) == ([0, 1, 2, 3, 0], 2, "mean")
    module.model.save_pretrained(tmp_path / "m")
    module.image_processor.save_pretrained(tmp_path / "m")
    again = MCTFFinetuner(str(tmp_path / "m"), fusion_layers=None).model.config
    assert (again.r, again.tau_sim, again.pooling) == ([0, 1, 2, 3, 0], 2, "mean")


def test_checkpoints_that_do_not_fit_are_refused_by_name(tiny_folder: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_folder / "model.safetensors")
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_folder, folder)

    def rewrite(**changes: Any) -> None:
        kept = {name: value for name, value in {**weights, **changes}.items() if value is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    positions = "vit.embeddings.position_embeddings"
    for changes, message in (
        ({positions: torch.zeros(1, 17, 24)}, rf"of another shape: \['{positions}'\]"),
        ({positions: None}, rf"missing or of another shape: \['{positions}'\]"),
        ({"classifier.weight": None}, "set num_labels for a new head"),
    ):
        rewrite(**changes)
        with pytest.raises(ValueError, match=f"{folder} does not fit this model: .*{message}"):
            MCTFFinetuner(str(folder), r=6)
    rewrite(**{"classifier.weight": None, "classifier.bias": None})
    assert MCTFFinetuner(str(folder), r=6, num_labels=10).num_labels == 10


def test_without_r_max_the_teacher_stays_below_half_of_r(tiny_folder: Path) -> None:
    for settings, limit in (({"r": 6}, 3), ({"r": 0}, 0), ({"reduction": "none"}, 0)):
        assert MCTFFinetuner(str(tiny_folder), **settings).r_max == limit


def test_the_schedule_may_be_given_in_steps_but_must_end(tiny_folder: Path, tmp_path: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6, warmup_epochs=1, learning_rate=1e-3)
    run = short_trainer(
        tmp_path, max_epochs=-1, max_steps=12, logger=CSVLogger(tmp_path, name="", version="")
    )
    run.fit(module, digits())
    rates = [float(row["train/lr"]) for row in _metrics(tmp_path) if row["train/lr"]]
    assert len(rates) == 12
    assert rates.index(max(rates)) == 5  # after one epoch of five steps
    with pytest.raises(ValueError, match=r"set trainer.max_epochs or max_steps"):
        short_trainer(tmp_path, max_epochs=-1).fit(MCTFFinetuner(str(tiny_folder), r=6), digits())


def test_num_labels_makes_a_new_head_even_of_the_same_size(tiny_folder: Path) -> None:
    old = load_file(tiny_folder / "model.safetensors")["classifier.weight"]
    kept = MCTFFinetuner(str(tiny_folder), r=6).model.classifier.weight
    new = MCTFFinetuner(str(tiny_folder), r=6, num_labels=10).model.classifier.weight
    assert torch.equal(kept, old)
    assert new.shape == old.shape and not torch.equal(new, old)


def test_classes_in_another_order_are_not_mixed_up(tiny_folder: Path, tmp_path: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6)
    module.model.config.id2label = {i: str(9 - i) for i in range(10)}
    with pytest.raises(ValueError, match="in another order"):
        short_trainer(tmp_path).test(module, digits(), verbose=False)
    trained = short_trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    module.model.config.id2label = {i: f"class {i}" for i in range(10)}
    for run in (short_trainer(tmp_path).test, short_trainer(tmp_path).validate, trained.fit):
        with pytest.raises(ValueError, match="'0', '1', .* the model 'class 0', .* num_labels=10"):
            run(module, digits())
    module.model.config.id2label = {i: "three" if i == 3 else str(i) for i in range(10)}
    with pytest.warns(UserWarning, match="calls 1 of 10 classes otherwise .* '3' for 'three'"):
        short_trainer(tmp_path).test(module, digits(), verbose=False)
    assert module.model.config.id2label[3] == "three"
    trained.fit(module, digits())
    assert module.model.config.id2label[3] == "3"
    with pytest.raises(ValueError, match="names 2 classes, but not 1: it is to name 0 to 1"):
        names_of(ViTConfig(id2label={0: "zero", 2: "two"}))


def test_student_and_teacher_share_one_embedding(tiny_folder: Path, tmp_path: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6, r_max=4)
    calls: list[str] = []
    module.model.vit.embeddings.register_forward_hook(lambda *_: calls.append("embedding"))
    module.model.vit.layers[0].register_forward_hook(lambda *_: calls.append("layer"))
    short_trainer(tmp_path, max_epochs=1, limit_train_batches=3, limit_val_batches=0).fit(
        module, digits()
    )
    assert calls == ["embedding", "layer", "layer"] * 3


def test_a_compiled_step_learns_the_same_by_a_program_for_each_amount(tmp_path: Path) -> None:
    programs: list[str] = []

    @torch._dynamo.register_backend(name="counting")
    def counting(program: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        programs.append("made")
        return aot_eager(program, inputs)

    found: dict[str, tuple[list[dict[str, str]], Any]] = {}
    for name, compiled in (("eager", False), ("compiled", {"backend": "counting"})):
        torch.manual_seed(0)
        module = MCTFFinetuner(
            config={**TINY, "num_hidden_layers": 2, "num_labels": 10},
            r=6,
            r_max=2,
            compile=compiled,
            learning_rate=0.01,
            attn_implementation="eager",
        )
        logger = CSVLogger(tmp_path / name, name="", version="")
        short_trainer(tmp_path, logger=logger).fit(module, digits(rand_augment="rand-m9"))
        found[name] = [r for r in _metrics(tmp_path / name) if r["train/loss"]], module.state_dict()
    drawn = {row["train/teacher_r"] for row in found["eager"][0]}
    assert len(drawn) == 2 and len(programs) == 3
    for one, other in zip(found["eager"][0], found["compiled"][0], strict=True):
        assert float(one["train/loss"]) == pytest.approx(float(other["train/loss"]), rel=1e-5)
    torch.testing.assert_close(found["eager"][1], found["compiled"][1], rtol=1e-3, atol=1e-4)


def test_a_compiled_step_does_not_go_with_shards_of_weights(tiny_folder: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6, compile=True)
    module.trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match="compile=True is not allowed with weights in shards"):
        module.configure_model()


@torch._dynamo.config.patch(recompile_limit=1)  # of usually 8
def test_more_amounts_than_are_usually_compiled(tmp_path: Path) -> None:
    torch._dynamo.reset()  # programs of other tests count
    module = MCTFFinetuner(
        config={**TINY, "num_hidden_layers": 1, "num_labels": 10},
        fusion_layers=[0],
        r=4,
        r_max=4,
        compile={"backend": "eager"},
        learning_rate=0.01,
    )
    run = short_trainer(tmp_path, limit_train_batches=3, logger=CSVLogger(tmp_path, "", ""))
    run.fit(module, digits())
    assert torch._dynamo.config.recompile_limit == 1
    rows = [row for row in _metrics(tmp_path) if row["train/teacher_r"]]
    assert len({row["train/teacher_r"] for row in rows}) > 2


def test_r_can_be_a_budget(tiny_folder: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r="auto:0.6")
    config = module.model.config
    assert isinstance(config.r, list) and len(config.r) == config.num_hidden_layers
    cost = multiply_accumulates(config) / describe(config).unfused
    assert 0.58 < cost <= 0.6
    with pytest.raises(ValueError, match="r='most' is not allowed: it must be a number, a list"):
        MCTFFinetuner(str(tiny_folder), r="most")
    tiny_model(r=[0, 2, 4, 4, 4]).save_pretrained("list")
    shutil.copy(tiny_folder / "preprocessor_config.json", "list")
    other = MCTFFinetuner("list", r="auto:0.8", fusion_layers=[1, 3]).model.config.r
    assert [layer for layer, fused in enumerate(other) if fused] == [1, 3]


def test_a_new_head_is_not_used_before_it_is_trained(tiny_folder: Path, tmp_path: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6, num_labels=10)
    Image.new("RGB", (32, 32)).save("photo.png")
    for evaluate in (
        short_trainer(tmp_path).test,
        short_trainer(tmp_path).validate,
        short_trainer(tmp_path).predict,
    ):
        with pytest.raises(ValueError, match="num_labels=10 is not allowed without training: it"):
            evaluate(module, digits(predict_folder="."))
    run = short_trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    run.fit(module, digits())
    run.save_checkpoint("trained.ckpt")
    (expected,) = run.test(module, digits(), verbose=False)
    again = MCTFFinetuner(str(tiny_folder), r=6, num_labels=10)
    (found,) = short_trainer(tmp_path).test(
        again, digits(), ckpt_path="trained.ckpt", verbose=False
    )
    assert found == expected
    loaded = MCTFFinetuner.load_from_checkpoint("trained.ckpt")
    assert short_trainer(tmp_path).test(loaded, digits(), verbose=False) == [expected]


def test_a_dataset_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    module = MCTFFinetuner(config={**TINY, "num_labels": 20}, r=6)
    with pytest.raises(
        ValueError, match="the dataset has 10 classes .*, and the model has 20 .*set num_labels=10"
    ):
        short_trainer(tmp_path).fit(module, digits())


def test_a_new_head_that_would_learn_at_a_trained_ones_rate_is_warned_of(
    tiny_folder: Path, tmp_path: Path
) -> None:
    for settings, warned in (({}, True), ({"learning_rate": 1e-3}, False)):
        module = MCTFFinetuner(str(tiny_folder), r=6, num_labels=10, **settings)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            short_trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(module, digits())
        told = [str(warning.message) for warning in said]
        assert any("the new head begins with random weights" in text for text in told) is warned


def test_the_mean_loss_is_one_of_float32_whatever_the_weights_are(
    tiny_folder: Path, tmp_path: Path
) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6, attn_implementation="eager")
    run = short_trainer(tmp_path, precision="bf16-true", limit_val_batches=1.0, max_epochs=1)
    (found,) = run.validate(module, digits(eval_batch_size=1), verbose=False)
    assert 0 < found["val/loss"] < 20
    model = module.model.bfloat16().eval()
    losses = []
    with torch.no_grad():
        for batch in module.trainer.val_dataloaders:
            logits = model(batch["pixel_values"].bfloat16()).logits.float()
            losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"]))
    assert found["val/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_a_loss_of_no_number_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6)
    module.model.classifier.register_forward_hook(
        lambda head, given, logits: logits.where(torch.arange(len(logits))[:, None] > 0, math.nan)
    )
    (found,) = short_trainer(tmp_path, limit_val_batches=2).validate(
        module, digits(), verbose=False
    )
    assert math.isnan(found["val/loss"])


def test_overfitting_a_few_batches_on_purpose(tiny_folder: Path, tmp_path: Path) -> None:
    run = short_trainer(tmp_path, overfit_batches=2, max_epochs=1, limit_train_batches=None)
    run.fit(MCTFFinetuner(str(tiny_folder), r=6), digits())
    assert run.global_step == 2 and run.num_val_batches == [2]

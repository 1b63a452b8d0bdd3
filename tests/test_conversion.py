"""``mctf convert`` and what is below it: weights of other code, from file to logits."""

import argparse
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from cli.convert import main
from cli.error_texts import EXPECTED
from lightning_modules.data import HFImageDataModule
from lightning_modules.image_task import ImageTask
from lightning_modules.labelled_images import LabelledImages
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.conversion import build_model, convert_state_dict, infer_config
from mctf_hf.cost import describe, multiply_accumulates, r_for_budget
from mctf_hf.weight_files import load_checkpoint
from tests.helpers import DIGITS, SHARED, TINY, Golden, in_timm_names, needs_shared, tiny_model

GOLDEN = Golden("deit")
WEIGHTS = dict(sorted(GOLDEN.weights("deit/model.").items()))
EXACT = {"atol": 1e-5, "rtol": 0}
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
TWO_HEADS = ("--num_heads", "2")


def refused(*words: str | Path) -> str:
    """The one line that a command fails with, having written nothing."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(EXPECTED) as caught:
        main([*map(str, words), "--output", "made"])
    assert sorted(Path().rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


CONTAINERS: dict[str, Callable[[], object]] = {
    "plain.pth": lambda: torch.save(WEIGHTS, "plain.pth"),
    "old.pth": lambda: torch.save(WEIGHTS, "old.pth", _use_new_zipfile_serialization=False),
    "lightning.pt": lambda: torch.save({"state_dict": WEIGHTS, "epoch": 3}, "lightning.pt"),
    "average.bin": lambda: torch.save({"model_ema": WEIGHTS}, "average.bin"),
    "wrapped.pth": lambda: torch.save(
        {f"module.{name}": torch.nn.Parameter(tensor) for name, tensor in WEIGHTS.items()},
        "wrapped.pth",
    ),
    "official.pth": lambda: torch.save(
        {
            "model": WEIGHTS,
            "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-3}]},
            "args": argparse.Namespace(model="deit_tiny", mctf_type=[0.35, 0], lr=1e-3),
            # A slip of the official script makes a tuple of it.
            "state_dict_ema": ({name: 0 * tensor for name, tensor in WEIGHTS.items()},),
        },
        "official.pth",
    ),
    "plain.safetensors": lambda: save_file(WEIGHTS, "plain.safetensors"),
}


@pytest.mark.parametrize("file", CONTAINERS)
@torch.no_grad()
def test_official_weights_give_the_official_logits_from_any_file(file: str) -> None:
    CONTAINERS[file]()
    main([f"{file},r=6,fusion_layers=[1,2,3,4]", "--output", "made", *TWO_HEADS])
    model = AutoModelForImageClassification.from_pretrained("made")
    assert type(model) is MCTFViTForImageClassification
    for case, r in (("deit_paper", 6), ("deit_paper_r9", 9), ("deit_off", 0)):
        logits = model(GOLDEN[f"{case}/pixel_values"], r=r).logits
        torch.testing.assert_close(logits, GOLDEN[f"{case}/logits"], **EXACT)
    assert {name: getattr(model.config, name) for name in TINY} == TINY
    assert model.config.id2label[4] == "LABEL_4"


@pytest.mark.parametrize("case", ["deit_precise", "deit_past", "deit_pool_max", "deit_fast"])
@torch.no_grad()
def test_settings_of_fusion_are_kept(case: str) -> None:
    CONTAINERS["official.pth"]()
    given = GOLDEN.cases[case]
    layers = [layer for layer in given["layers"] if layer < 5]
    words = f"official.pth,fusion_layers={layers},".replace(" ", "") + ",".join(
        f"{name}={given[name]}" for name in ("r", "one_step_ahead", "pooling")
    )
    main([words, "--source", "mctf", "--output", "made", *TWO_HEADS])
    model = MCTFViTForImageClassification.from_pretrained("made")
    logits = model(GOLDEN[f"{case}/pixel_values"]).logits
    torch.testing.assert_close(logits, GOLDEN[f"{case}/logits"], **EXACT)


def test_what_was_read_is_told(capsys: pytest.CaptureFixture) -> None:
    CONTAINERS["official.pth"]()
    main(["official.pth,r=auto:0.8", "--output", "made", *TWO_HEADS])
    told = re.sub(" +", " ", capsys.readouterr().out)
    config = MCTFViTForImageClassification.from_pretrained("made").config
    assert config.r == r_for_budget(config, 0.8)[1]
    plain, fused = describe(config).unfused / 1e9, multiply_accumulates(config) / 1e9
    for line in (
        "read 68 weights of official.pth, entry 'model'",
        "left out 'optimizer', 'args', 'state_dict_ema'",
        "architecture 24 wide, 5 layers, 2 heads, MLP 96, 5 labels",
        "images 3 x 32 x 32, patches of 4 x 4",
        f"{fused:.4f} GMACs, {plain:.4f} without (-21%)",
        "written made",
    ):
        assert f"{line}\n" in told, line


def test_the_entry_can_be_named() -> None:
    CONTAINERS["official.pth"]()
    main(["official.pth", "--entry", "state_dict_ema", "--output", "made", *TWO_HEADS])
    model = MCTFViTForImageClassification.from_pretrained("made")
    assert all((weight == 0).all() for weight in model.parameters())
    assert "no entry 'ema': it has ['model', 'optimizer'" in refused(
        "official.pth", "--entry", "ema"
    )
    assert "no weights in its entry 'args'" in refused("official.pth", "--entry", "args")
    message = refused("official.pth", "--entry", "optimizer")
    assert "official.pth holds something else than weights in its entry 'optimizer'" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@torch.no_grad()
def test_an_architecture_is_told_from_its_shapes(dtype: torch.dtype, images: Tensor) -> None:
    shape = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "intermediate_size": 192,
        "num_hidden_layers": 11,  # two digits, which sort otherwise than they count
        "image_size": 48,
        "patch_size": 8,
        "num_channels": 1,
        "qkv_bias": False,
        "num_labels": 3,
    }
    model = tiny_model(**shape, r=4).to(dtype)
    weights = in_timm_names(model.state_dict())
    assert weights["blocks.10.attn.qkv.weight"].shape == (384, 128)
    config = infer_config(weights, "timm", r=4)
    assert {name: getattr(config, name) for name in shape} == shape
    converted = build_model(weights, "timm", config)
    images = torch.randn(2, 1, 48, 48, dtype=dtype)
    assert torch.equal(converted(images).logits, model(images).logits)


def test_heads_are_asked_for_where_nothing_tells_them() -> None:
    torch.save(WEIGHTS, "w.pth")
    told = "w.pth: num_heads is not set, and 24 channels do not determine it"
    assert told in refused("w.pth")
    for heads in ("5", "0", "-2"):
        message = refused("w.pth", "--num_heads", heads)
        assert f"w.pth: num_heads={heads} is not allowed: it must divide the 24 channels" in message
    with torch.device("meta"):  # ViT-H has 80 channels per head
        huge = in_timm_names(tiny_model(hidden_size=1280, num_attention_heads=16).state_dict())
    unknown = "num_heads is not set, and 1280 channels do not determine it"
    with pytest.raises(ValueError, match=unknown):
        infer_config(huge, "timm")
    assert infer_config(huge, "timm", num_heads=16).num_attention_heads == 16


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("pre_logits.fc.weight", "a hidden layer before the head"),
        ("fc_norm.weight", "a head on the mean of the tokens"),
        ("blocks.3.ls1.gamma", "LayerScale"),
        ("reg_token", "register tokens"),
        ("norm_pre.bias", "a LayerNorm before the first layer"),
        ("blocks.0.attn.q_norm.weight", "LayerNorms within the attention"),
        ("vit.layernorm.weight", "names of transformers: convert the folder"),
    ],
)
def test_other_architectures_are_named(name: str, meaning: str) -> None:
    positions = torch.ones(1, 66, 24)  # such models have one more, or none at all
    torch.save({**WEIGHTS, "pos_embed": positions, name: torch.ones(24)}, "w.pth")
    message = refused("w.pth", *TWO_HEADS)
    assert message.startswith(f"w.pth: weights of a model that is not supported: {meaning}")
    assert message.endswith(f"['{name}']")


def test_all_that_does_not_fit_is_told_at_once() -> None:
    weights = {**WEIGHTS, "x": torch.ones(1), "blocks.2.extra.weight": torch.ones(1)}
    weights |= {"head.bias": torch.ones(6), "norm.bias": torch.ones(24, dtype=torch.int64)}
    weights["blocks.1.attn.qkv.bias"] = torch.ones(70)
    del weights["blocks.4.norm1.weight"], weights["cls_token"]
    torch.save(weights, "w.pth")
    assert refused("w.pth", *TWO_HEADS) == (
        "w.pth: the weights do not fit a ViT: unknown: ['x', 'blocks.2.extra.weight']; "
        "missing: ['cls_token', 'blocks.4.norm1.weight']; misshapen: "
        "['blocks.1.attn.qkv.bias [70] float32, not [72]', 'head.bias [6] float32, not [5]', "
        "'norm.bias [24] int64, not [24]']"
    )


def test_settings_that_need_weights_that_the_file_lacks() -> None:
    torch.save(WEIGHTS, "w.pth")
    message = refused("w.pth,multi_scale=[2]", *TWO_HEADS)
    assert "missing: ['vit.embeddings." in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None, "x": torch.ones(1)}, "unknown: ['x']; missing or misshapen: "),
        ({"pos_embed": torch.ones(1, 64, 24)}, "pos_embed has no position for the class token"),
        ({"pos_embed": torch.ones(1, 51, 24)}, "pos_embed has 51 positions: those beside"),
        ({"patch_embed.proj.weight": torch.ones(24, 3, 4, 8)}, "patches of 4 x 8 pixels are not"),
        ({"patch_embed.proj.weight": torch.ones(24, 48)}, "['patch_embed.proj.weight']"),
        ({"blocks.4.norm1.bias": None, "blocks.7.norm1.bias": torch.ones(24)}, "layers"),
    ],
)
def test_shapes_that_tell_no_vit(change: dict[str, Any], message: str) -> None:
    weights = {**WEIGHTS, **change}
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, "w.pth")
    told = refused("w.pth", *TWO_HEADS)
    assert message in told if message != "layers" else "missing: ['blocks.4.norm1.bias'" in told


class Malicious:
    def __init__(self, file: str):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.path.abspath(self.file),)


class Harmless:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_none(zipped: bool) -> None:
    for contents in ({"model": WEIGHTS, "args": Malicious("ran")}, Malicious("ran")):
        torch.save(contents, "evil.pth", _use_new_zipfile_serialization=zipped)
        message = refused("evil.pth", *TWO_HEADS)
        assert re.match(r"evil.pth is refused: reading it would call \w+.mkdir, which", message)
        assert "nothing was called" in message
    Path("evil.bin").write_bytes(pickle.dumps(Malicious("ran"), protocol=5))
    assert "nothing in it was run" in refused("evil.bin")
    torch.save({"model": WEIGHTS, "args": Harmless()}, "odd.pth")
    assert "would call tests.test_conversion.Harmless, which" in refused("odd.pth")
    assert not Path("ran").exists()
    torch.load("evil.pth", weights_only=False)  # it would have
    assert Path("ran").is_dir()


def test_a_namespace_is_let_in_for_reading_only() -> None:
    CONTAINERS["official.pth"]()
    assert load_checkpoint("official.pth").keys() == WEIGHTS.keys()
    with pytest.raises(pickle.UnpicklingError, match="argparse.Namespace"):
        torch.load("official.pth", weights_only=True)


@pytest.mark.parametrize("file", ["plain.pth", "old.pth", "plain.safetensors"])
def test_damaged_files_are_told_in_a_line(file: str) -> None:
    CONTAINERS[file]()
    whole = Path(file).read_bytes()
    for length in (0, 1, 10, 100, 1000, len(whole) // 2, len(whole) - 1):
        Path(file).write_bytes(whole[:length])
        assert refused(file).startswith(f"{file} cannot be read: it is damaged or holds no weights")
    generator = np.random.default_rng(0)
    for length in (1, 7, 100, 5000):
        Path(file).write_bytes(generator.bytes(length))
        assert refused(file).startswith(f"{file} cannot be read")


def test_a_pickle_may_end_anywhere() -> None:
    for zipped in (True, False):
        torch.save({"w": torch.ones(2)}, "w.pth", _use_new_zipfile_serialization=zipped)
        whole = Path("w.pth").read_bytes()
        for length in range(0, len(whole), 3):
            Path("w.pth").write_bytes(whole[:length])
            with pytest.raises(ValueError, match="w.pth (cannot be read|is refused)"):
                load_checkpoint("w.pth")


def test_files_of_something_else() -> None:
    torch.save([torch.ones(1)], "list.pth")
    assert refused("list.pth") == "list.pth holds a list, not weights by name"
    torch.save({**WEIGHTS, "epoch": 3}, "mixed.pth")
    assert refused("mixed.pth") == "mixed.pth holds something else than weights: ['epoch']"
    assert refused("lost.pth") == "lost.pth: there is no such file or folder"
    assert refused("weights/lost.pth") == "weights/lost.pth: there is no such file or folder"
    Path("google.npz").write_bytes(b"")
    assert "google.npz is not allowed: a checkpoint's name ends in" in refused("google.npz")
    message = refused("lost.pth,speed=3")
    assert "setting 'speed' of 'lost.pth,speed=3' is not known" in message
    assert (
        "source='keras' is not allowed: it must be one of timm, mctf, deit_distilled, "
        in refused("lost.pth", "--source", "keras")
    )
    torch.save(WEIGHTS, "w.pth")
    assert "source='hf' reads a folder or a Hub id" in refused("w.pth", "--source", "hf")
    with pytest.raises(StrictDataclassError, match="r=-1 is not allowed"):
        main(["w.pth,r=-1", "--output", "made", *TWO_HEADS])
    assert not Path("made").exists()
    assert "r=3 has no effect" in refused("w.pth,reduction=none,r=3", *TWO_HEADS)


def test_a_folder_of_something_else_is_left_alone() -> None:
    torch.save(WEIGHTS, "w.pth")
    Path("made").mkdir()
    Path("made", "thesis.txt").write_text("mine")
    assert "made holds something else than a model" in refused("w.pth", *TWO_HEADS)
    assert "made holds something else" in refused("lost.pth")  # before anything is read


def test_saving_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ViTImageProcessorPil

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    torch.save(WEIGHTS, "w.pth")
    monkeypatch.setattr(ViTImageProcessorPil, "save_pretrained", fail)
    assert "no space left" in refused("w.pth", *TWO_HEADS)


@pytest.mark.parametrize("names", ["new", "old", "pickled"])
@torch.no_grad()
def test_a_folder_of_transformers_converts_bit_for_bit(
    names: str, tiny_folder: Path, images: Tensor
) -> None:
    plain = ViTForImageClassification.from_pretrained(tiny_folder).eval()
    shutil.copytree(tiny_folder, "plain")
    assert any("encoder.layer.0" in name for name in load_file("plain/model.safetensors"))
    if names == "new":
        save_file(plain.state_dict(), "plain/model.safetensors", {"format": "pt"})
    if names == "pickled":
        Path("plain/model.safetensors").unlink()
        torch.save(plain.state_dict(), "plain/pytorch_model.bin")
    main(["plain,r=3", "--output", "made"])
    exact = {"skip_unread": False}
    model = AutoModelForImageClassification.from_pretrained("made", **exact)
    assert (type(model), model.config.r) == (MCTFViTForImageClassification, 3)
    assert torch.equal(model(images, r=0).logits, plain(images).logits)
    assert not torch.equal(model(images).logits, plain(images).logits)
    assert Path("made/preprocessor_config.json").read_text() == (
        (tiny_folder / "preprocessor_config.json").read_text()
    )
    main(["made,tau_info=7", "--output", "again"])  # one of ours
    again = AutoModelForImageClassification.from_pretrained("again", **exact)
    assert (again.config.r, again.config.tau_info) == (3, 7)
    assert torch.equal(again(images, r=0).logits, plain(images).logits)


@needs_shared("checkpoints/deit-tiny-cifar10")
@needs_shared("data/cifar10")
@torch.no_grad()
def test_real_weights_convert_from_either_side() -> None:
    folder = SHARED / "checkpoints" / "deit-tiny-cifar10"
    rows = load_dataset(str(SHARED / "data" / "cifar10"), split="test[:16]")
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = processor(rows["image"][:], return_tensors="pt")["pixel_values"]
    plain = ViTForImageClassification.from_pretrained(folder).eval()
    torch.save({"model": in_timm_names(plain.state_dict())}, "timm.pth")
    Path("labels.txt").write_text("\n".join(plain.config.id2label.values()) + "\n")
    main([f"{folder},r=5", "--output", "a"])
    main(["timm.pth,r=5", "--output", "b", "--processor", str(folder), "--labels", "labels.txt"])
    exact = {"skip_unread": False}
    official = MCTFViTForImageClassification.from_pretrained(folder, r=5, **exact).eval()
    for made in ("a", "b"):
        model = MCTFViTForImageClassification.from_pretrained(made, **exact)
        assert torch.equal(model(images, r=0).logits, plain(images).logits)
        assert torch.equal(model(images).logits, official(images).logits)
        assert model.config.id2label == plain.config.id2label
        found = AutoImageProcessor.from_pretrained(made, backend="pil")
        assert torch.equal(found(rows["image"][:], return_tensors="pt")["pixel_values"], images)


def test_folders_that_do_not_fit(tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, "bad")
    weights = load_file("bad/model.safetensors")
    del weights["classifier.bias"]
    weights |= {"vit.pooler.dense.bias": torch.ones(24), "classifier.weight": torch.ones(7, 24)}
    save_file(weights, "bad/model.safetensors", {"format": "pt"})
    assert refused("bad") == (
        "the weights do not fit a ViT: unknown: ['vit.pooler.dense.bias']; "
        "missing: ['classifier.bias']; misshapen: ['classifier.weight [7, 24], not [10, 24]']"
    )
    whole = (tiny_folder / "model.safetensors").read_bytes()
    Path("bad/model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert refused("bad").startswith("bad cannot be read: it is damaged")
    Path("bad/model.safetensors").unlink()
    assert "no file named model.safetensors" in refused("bad")
    torch.save({"model": Malicious("ran")}, "bad/pytorch_model.bin")
    assert refused("bad").startswith("bad is refused: reading it would call")
    assert not Path("ran").exists()
    whole = Path("bad/pytorch_model.bin").read_bytes()
    Path("bad/pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    assert refused("bad").startswith("bad cannot be read: it is damaged")
    message = refused(tiny_folder, "--num_heads", "2")
    assert "num_heads=2 is for files of weights" in message
    Path(shutil.copytree(tiny_folder, "bare"), "preprocessor_config.json").unlink()
    assert "bare has no image processor that could be read: set processor" in refused("bare")
    for settings, told in (
        ({"model_type": "swin"}, "bad holds a model of type 'swin'"),
        ({"architecture": "vit_tiny_patch16_224"}, "its config.json has no model_type: if it is"),
    ):
        Path("bad/config.json").write_text(json.dumps(settings))
        assert told in refused("bad")


def pixels_by_hand(image: Image.Image, size: int, shortest: int | None) -> np.ndarray:
    """Bicubic, centre crop, ImageNet's mean and deviation, with PIL and numpy alone."""
    width, height = image.size
    if shortest is None:
        resized = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        short = min(width, height)
        edges = (width * shortest // short, height * shortest // short)
        resized = image.resize(edges, Image.Resampling.BICUBIC)
        left, top = (edges[0] - size) // 2, (edges[1] - size) // 2
        resized = resized.crop((left, top, left + size, top + size))
    return ((np.asarray(resized) / 255 - MEAN) / DEVIATION).transpose(2, 0, 1)


def photograph(width: int, height: int) -> Image.Image:
    """Twelve handwritten digits in a row, in three colours, at the given size."""
    rows = load_dataset(DIGITS, split="test[:12]")["image"][:]
    row = np.concatenate([np.asarray(image.convert("L")) for image in rows], axis=1)
    colours = np.stack([row, 255 - row, row // 2], axis=-1)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


@pytest.mark.parametrize(
    ("size", "shortest"), [(224, 256), (96, 109), (384, 438), (64, None), (32, None)]
)
def test_images_are_prepared_as_for_the_evaluation_of_deit(size: int, shortest: int | None) -> None:
    patch = size // 4
    weights = in_timm_names(
        tiny_model(image_size=size, patch_size=patch, num_hidden_layers=1).state_dict()
    )
    save_file(weights, "w.safetensors")
    main(["w.safetensors", "--output", "made", *TWO_HEADS])
    processor = AutoImageProcessor.from_pretrained("made", backend="pil")
    for width, height in ((500, 333), (240, 420), (200, 150)):
        image = photograph(width, height)
        made = processor(image, return_tensors="np")["pixel_values"][0]
        assert made.shape == (3, size, size)
        np.testing.assert_allclose(made, pixels_by_hand(image, size, shortest), atol=1e-5)


@needs_shared("data/imagenet_sample")
def test_photographs_are_prepared_so_too() -> None:
    model = tiny_model(image_size=224, patch_size=56, num_hidden_layers=1)
    save_file(in_timm_names(model.state_dict()), "w.safetensors")
    main(["w.safetensors", "--output", "made", *TWO_HEADS])
    processor = AutoImageProcessor.from_pretrained("made", backend="pil")
    for row in load_dataset(str(SHARED / "data" / "imagenet_sample"), split="validation[:8]"):
        image = row["image"].convert("RGB")
        made = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(made, pixels_by_hand(image, 224, 256), atol=1e-5)


def test_training_crops_to_what_the_processor_makes() -> None:
    model = tiny_model(image_size=96, patch_size=24, num_hidden_layers=1, num_labels=10)
    save_file(in_timm_names(model.state_dict()), "w.safetensors")
    main(["w.safetensors", "--output", "made", *TWO_HEADS])
    processor = AutoImageProcessor.from_pretrained("made", backend="pil")
    data = HFImageDataModule(DIGITS, crop="resized", batch_size=4, num_workers=0)
    data.open("fit", ImageTask(processor, 10))
    images = data.training_loader().dataset
    assert isinstance(images, LabelledImages)
    assert images[(0, 3)]["pixel_values"].shape == (3, 96, 96)


def test_an_image_processor_can_be_taken_from_elsewhere(tiny_folder: Path) -> None:
    torch.save(WEIGHTS, "w.pth")
    main(["w.pth", "--output", "made", "--processor", str(tiny_folder), *TWO_HEADS])
    made = AutoImageProcessor.from_pretrained("made", backend="pil")
    assert list(made.image_mean) == [0.5, 0.5, 0.5]
    weights = in_timm_names(tiny_model(image_size=64).state_dict())
    torch.save(weights, "large.pth")
    message = refused("large.pth", "--processor", tiny_folder, *TWO_HEADS)
    assert "makes images of 3 x 32 x 32, the model takes 3 x 64 x 64: set processor" in message
    Path("empty").mkdir()
    assert "empty has no image processor" in refused("w.pth", "--processor", "empty", *TWO_HEADS)
    torch.save(in_timm_names(tiny_model(num_channels=1).state_dict()), "grey.pth")
    message = refused("grey.pth", *TWO_HEADS)
    assert "images of 1 channels have no usual image processor: set processor" in message
    tuned = json.loads((tiny_folder / "preprocessor_config.json").read_text())
    tuned |= {"image_mean": [0.5], "image_std": [0.5]}
    Path("empty/preprocessor_config.json").write_text(json.dumps(tuned))
    main(["grey.pth", "--output", "grey", "--processor", "empty", *TWO_HEADS])
    grey = AutoImageProcessor.from_pretrained("grey", backend="pil")
    pixels = grey(Image.new("L", (40, 50)), return_tensors="pt")["pixel_values"]
    assert MCTFViTForImageClassification.from_pretrained("grey")(pixels).logits.shape == (1, 5)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("labels.txt", "cat\ndog\nblue whale\n crane \ncrane\n\n"),
        ("labels.json", '["cat", "dog", "blue whale", "crane", "crane"]'),
        (
            "labels.json",
            '{"4": "crane", "0": "cat", "2": "blue whale", "3": "crane", "1": "dog"}',
        ),
    ],
)
def test_classes_are_named(file: str, text: str, tiny_folder: Path) -> None:
    torch.save(WEIGHTS, "w.pth")
    Path(file).write_text(text)
    main(["w.pth", "--output", "made", "--labels", file, *TWO_HEADS])
    config = MCTFViTForImageClassification.from_pretrained("made").config
    assert list(config.id2label.values()) == ["cat", "dog", "blue whale", "crane", "crane"]
    assert config.label2id["blue whale"] == 2
    message = refused(tiny_folder, "--labels", file)
    assert f"labels='{file}' holds 5 names, the model has 10" in message


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("labels.txt", "a\n\nb\nc\nd\n", "none of them empty"),
        ("labels.json", '["a", "b"', "labels='labels.json' cannot be read"),
        ("labels.json", "3", "is not allowed: it must hold a name per line"),
        ("labels.json", "[1, 2, 3, 4, 5]", "is not allowed: it must hold a name per line"),
        ("labels.json", '{"1": "a", "2": "b", "3": "c"}', "is not allowed: it must hold a name"),
        ("labels.yaml", "", "the file's name ends in .txt or .json"),
        ("lost.txt", None, "No such file"),
    ],
)
def test_labels_that_are_none(file: str, text: str | None, message: str) -> None:
    torch.save(WEIGHTS, "w.pth")
    if text is not None:
        Path(file).write_text(text)
    assert message in refused("w.pth", "--labels", file, *TWO_HEADS)


@torch.no_grad()
def test_timm_names() -> None:
    converted = convert_state_dict(WEIGHTS, source="timm")
    report = tiny_model().load_state_dict(converted, strict=False)
    assert not report.missing_keys and not report.unexpected_keys
    query, key, value = WEIGHTS["blocks.2.attn.qkv.weight"].chunk(3)
    for part, expected in (("q", query), ("k", key), ("v", value)):
        assert torch.equal(converted[f"vit.layers.2.attention.{part}_proj.weight"], expected)


def test_what_conversion_does_not_know_is_listed() -> None:
    weights = {"cls_token": torch.zeros(1, 1, 4), "y.bias": torch.zeros(2), "x": torch.ones(1)}
    with pytest.raises(ValueError, match=r"\['y.bias', 'x'\]"):
        convert_state_dict(weights, source="timm")
    with pytest.raises(
        ValueError, match=r"a distilled DeiT: source='deit_distilled' \['head_dist.bias'\]"
    ):
        convert_state_dict({"head_dist.bias": torch.zeros(2)}, source="timm")
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.bias of shape \(7,\) cannot be split"):
        convert_state_dict({"blocks.0.attn.qkv.bias": torch.zeros(7)}, source="timm")
    with pytest.raises(
        ValueError, match="source='keras' is not allowed: it must be one of timm, mctf"
    ):
        convert_state_dict(weights, source="keras")

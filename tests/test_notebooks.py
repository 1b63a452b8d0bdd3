"""The notebooks run from top to bottom, on small models and on images that are here."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from mctf_hf.reducers import REDUCERS
from tests.helpers import DIGITS, REPOSITORY, TINY

NOTEBOOKS = REPOSITORY / "notebooks"
IMAGES = [str(REPOSITORY / "docs" / "pictures" / f"{name}.jpg") for name in ("pagoda", "dahlia")]
SIZE = {"height": 32, "width": 32}


def run(name: str, **parameters: Any) -> dict[str, Any]:
    """What a notebook's cells leave behind, with other values for those of its first one."""
    book = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    first, *others = [cell for cell in book.cells if cell.cell_type == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(first.source, names)
    assert set(parameters) <= set(names)
    names |= parameters
    for number, cell in enumerate(others, 2):
        exec(compile(cell.source, f"{name}, cell {number}", "exec"), names)
    return names


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_are_whole_and_hold_no_outputs(file: Path) -> None:
    book = nbformat.read(file, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code[0].metadata.tags == ["parameters"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert book.cells[0].source.startswith("# ")
    assert f"notebooks/{file.name}" in (REPOSITORY / "docs" / "notebooks.md").read_text()


def test_classify_and_look(tiny_folder: Path) -> None:
    found = run("classify_and_look", MODEL=str(tiny_folder), IMAGES=IMAGES, R=8)
    assert found["left"] == [65, 65, 57, 49, 41, 33]
    assert [one.tokens_left for one in found["seen"][-1]] == [33, 33]
    assert found["unfused"] == found["classify"](0)
    assert found["picture"].width > 4 * 448


def test_dinov2_retrieval() -> None:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=4, image_size=32, patch_size=4
    )
    Dinov2Model(config).save_pretrained("dinov2")
    ViTImageProcessorPil(size=SIZE).save_pretrained("dinov2")
    found = run("dinov2_retrieval", MODEL="dinov2", DATASET=DIGITS, KNOWN=300, ASKED=40, R=[0, 8])
    (right, same), (fused_right, fused_same) = found["results"].values()
    assert same == 1.0 and 0.3 < fused_same <= 1.0
    assert right > 0.4 and fused_right > 0.4  # one of ten by chance
    assert found["picture"].width > 3 * 96


def test_clip_zero_shot() -> None:
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{one}</w>" for one in letters)]
    Path("clip").mkdir()
    Path("clip/vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    Path("clip/merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained("clip")
    small = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**small, **ends, "num_hidden_layers": 2, "vocab_size": len(words)},
        vision_config={**small, "num_hidden_layers": 4, "image_size": 32, "patch_size": 4},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained("clip")
    tokenizer.save_pretrained("clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIZE).save_pretrained("clip")
    found = run("clip_zero_shot", MODEL="clip", IMAGES=IMAGES, R=[0, 8])
    assert found["differences"][0] == 0 < found["differences"][8] < 1
    for scores in found["results"].values():
        assert scores.shape == (2, len(found["CLASSES"]))
        assert torch.allclose(scores.sum(1), torch.ones(2))
    assert not torch.equal(found["texts"]["input_ids"][0], found["texts"]["input_ids"][1])


def test_finetune() -> None:
    torch.manual_seed(0)
    small = {**TINY, "image_size": 16, "hidden_size": 32, "num_hidden_layers": 3}
    ViTForImageClassification(ViTConfig(**small, initializer_range=0.2)).save_pretrained("vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained("vit")
    settings = {"R": 3, "EPOCHS": 2, "LEARNING_RATE": 0.1}
    found = run("finetune", MODEL="vit", DATASET=DIGITS, **settings)
    model = AutoModelForImageClassification.from_pretrained("finetuned")
    assert model.config.r == 3 and model.config.num_labels == 10
    assert found["accuracies"][3] > 0.3  # one of ten by chance


@pytest.fixture
def own_modules() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("by_distance", None)
    REDUCERS.pop("by_distance", None)


def test_your_own_method(tiny_folder: Path, own_modules: None) -> None:
    found = run("your_own_method", MODEL=str(tiny_folder), IMAGES=IMAGES)
    assert set(found["losses"]) == {"by_distance", "tome"}
    assert all(loss > 0 for loss in found["losses"].values())
    assert found["losses"]["by_distance"] != found["losses"]["tome"]
    assert Path("vit-by-distance/by_distance.py").exists()
    assert TINY["num_hidden_layers"] == found["models"]["tome"].config.num_hidden_layers

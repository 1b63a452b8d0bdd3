"""A method of reduction from user code: registered, run, counted, saved and loaded by strangers."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from cli.main import main
from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification
from mctf_hf.cost import multiply_accumulates
from mctf_hf.hub import load_image_processor, loadable_files, save
from mctf_hf.model_card import make_card
from mctf_hf.reducers import REDUCERS, Reducer
from tests.helpers import DIGITS, REPOSITORY, TINY, count, tiny_model
from tests.strangers import load_as_stranger, run_as_stranger

EXAMPLES = re.findall(
    r"```python\n(.*?)```", (REPOSITORY / "docs" / "methods" / "own.md").read_text(), re.DOTALL
)
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture
def by_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Reducer]]:
    """The class of the documentation, in the file that it names."""
    (tmp_path / "by_norm.py").write_text(EXAMPLES[0])
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("by_norm").NormReducer
    del REDUCERS["by_norm"], sys.modules["by_norm"]


def test_the_documented_example_runs(by_norm: type[Reducer], images: Tensor) -> None:
    small = "hidden_size=24, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2, r=8"
    exec(EXAMPLES[1].replace("r=8", small), {})
    model = MCTFViTForImageClassification.from_pretrained("vit-by-norm")
    assert (model.config.reduction, model.config.r) == ("by_norm", 8)
    assert Path("vit-by-norm/by_norm.py").exists()
    assert load_image_processor("vit-by-norm").size == {"height": 224, "width": 224}


@torch.no_grad()
def test_it_is_a_setting_like_the_others(by_norm: type[Reducer], images: Tensor) -> None:
    config = MCTFViTConfig(**TINY, reduction="by_norm", r=6, attn_implementation="eager")
    model = MCTFViTForImageClassification(config).eval()
    assert multiply_accumulates(config) == count(model, images[:1])
    output = model(images, output_fusion=True, output_hidden_states=True)
    assert output.token_sizes.shape == (3, 65 - 4 * 6)
    assert torch.equal(output.token_sizes.sum(1), torch.full((3,), 65.0))
    lengths = torch.linalg.vector_norm(model.vit.layers[0](output.hidden_states[0]), dim=-1)
    first = model(images, r=[6, 0, 0, 0, 0], output_fusion=True)
    merged = lengths[:, 1:].argsort(1)[:, :6] + 1
    sizes = first.token_sizes.gather(1, first.assignment.gather(1, merged))
    assert (sizes >= 2).all()
    small = tiny_model(reduction="by_norm", r=6, num_hidden_layers=2)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, small(images).logits)


@torch.no_grad()
def test_strangers_load_it(by_norm: type[Reducer], images: Tensor, tmp_path: Path) -> None:
    model = tiny_model(reduction="by_norm", r=6)
    folder = save(model, PROCESSOR, tmp_path / "model")
    names = {file.name for file in loadable_files(folder)}
    assert {"by_norm.py", "model_with_by_norm.py", "reducers.py", "selection.py"} <= names
    assert "mctf_hf" not in (folder / "by_norm.py").read_text()
    other = save(tiny_model(r=4), PROCESSOR, tmp_path / "other")
    (found, of_ours), _ = load_as_stranger([folder, other], images, tmp_path)
    assert torch.equal(of_ours["logits"], tiny_model(r=4)(images).logits)
    assert torch.equal(found["logits"], model(images).logits)
    assert torch.equal(found["resaved"], found["logits"])
    assert torch.equal(found["hidden"], model.vit(images).last_hidden_state)

    known = AutoModelForImageClassification.from_pretrained(folder).eval()  # it is registered
    assert torch.equal(known(images).logits, model(images).logits)
    (folder / "by_norm.py").unlink()
    with pytest.raises(ValueError, match=r"loads anywhere: by_norm\.py missing"):
        loadable_files(folder)


def test_without_its_module_the_method_is_unknown(by_norm: type[Reducer], tmp_path: Path) -> None:
    folder = save(tiny_model(reduction="by_norm", r=6), PROCESSOR, tmp_path / "model")
    known = REDUCERS.pop("by_norm")
    try:
        with pytest.raises(StrictDataclassError, match="'by_norm' is not allowed: .*trust_remote"):
            AutoModelForImageClassification.from_pretrained(folder)
    finally:
        REDUCERS["by_norm"] = known


BROKEN = {
    "import mctf_hf.fusion": "'import mctf_hf.fusion' names no module that goes with the weights",
    "from mctf_hf import MCTFViTConfig": "'from mctf_hf import MCTFViTConfig' names no module that",
    "from mctf_hf.losses import mix_seed": "'from mctf_hf.losses import mix_seed' names no module",
    "from .helpers import x": "'from .helpers import x', where all has to be in one file",
    "from neighbour import x": "'from neighbour import x' is a file beside it, where all has to be",
}


@pytest.mark.parametrize("line", BROKEN)
def test_what_cannot_travel_is_refused_before_anything_is_written(
    line: str, by_norm: Any, tmp_path: Path
) -> None:
    (tmp_path / "neighbour.py").write_text("x = 1\n")
    model = tiny_model(reduction="by_norm")
    (tmp_path / "by_norm.py").write_text(f"{line}\n{EXAMPLES[0]}")
    reason = re.escape(f"by_norm.py, which defines NormReducer: {BROKEN[line]}")
    with pytest.raises(ValueError, match=reason):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=reason):
        save(model, PROCESSOR, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# Ways to write a module that registers ``odd``: its file, the name it is imported by, its imports.
ODD = [
    ("by-odd.py", "by-odd", "\ufeff# é\nx = 'é'; import os, mctf_hf.fusion as f; f.Reduction"),
    (
        "class/__init__.py",
        "class",
        "from mctf_hf import fusion as f, matching\nimport os.path",
    ),
    (
        "pack/odd.py",
        "pack.odd",
        "from  mctf_hf .fusion import (  # what it is\n    Reduction,\n)",
    ),
]
BODY = """
from mctf_hf.reducers import Reducer, Stage, register  # and keep "from mctf_hf.x import y" as it is

TEXT = \'\'\'
from mctf_hf.fusion import nothing
\'\'\'


@register("odd")
class Odd(Reducer):
    stage = Stage.AFTER_MLP

    def __call__(self, seen, r):
        raise NotImplementedError

    def multiply_accumulates(self, num_patches, r, width, heads):
        return 0
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What writes a module and imports it."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(file: str, name: str, text: str) -> Any:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
        return importlib.import_module(name).Odd

    yield write
    REDUCERS.pop("odd", None)
    for name in {*sys.modules} - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_however_it_is_written_strangers_load_it(odd: Any, tmp_path: Path) -> None:
    folders = []
    for file, name, imports in ODD:
        odd(file, name, f"{imports}\n{BODY}")
        folders.append(save(tiny_model(reduction="odd", r=0), PROCESSOR, tmp_path / f"to-{name}"))
        del REDUCERS["odd"]
    run_as_stranger(OF_STRANGER, *folders)
    kept = """register  # and keep "from mctf_hf.x import y" as it is

TEXT = \'\'\'
from mctf_hf.fusion import nothing
"""
    for folder, name in zip(folders, ("by_odd", "_class", "odd"), strict=True):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        assert f"from .reducers import Reducer, Stage, {kept}" in text


OF_STRANGER = """
import sys

from transformers import AutoModel

for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert model.config.reduction == "odd"
"""
UNFIT = {
    "import importlib; importlib.import_module('mctf_hf.fusion')": "cannot be loaded (ModuleNotFou",
    "import os; os.environ['ONLY_MINE']": "cannot be loaded (KeyError: 'ONLY_MINE')",
    "from pack.other import x": "'from pack.other import x' is a file beside it",
    "from .fusion import x": "'from .fusion import x', where all has to be in one file",
    "import elsewhere": "'import elsewhere' is a file beside it, where all has to be in one file",
}


@pytest.mark.parametrize("line", UNFIT)
def test_what_a_stranger_cannot_load_is_refused(
    line: str, odd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONLY_MINE", "1")
    (tmp_path / "pack").mkdir()
    for name in ("pack/other.py", "pack/fusion.py", "apart/elsewhere.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "apart")
    odd("pack/odd.py", "pack.odd", f"{line}\n{BODY}")
    monkeypatch.delenv("ONLY_MINE")
    with pytest.raises(ValueError, match="odd.py, which defines Odd: ") as refused:
        save(tiny_model(reduction="odd", r=0), PROCESSOR, tmp_path / "model")
    assert UNFIT[line] in str(refused.value) and not (tmp_path / "model").exists()


def test_a_module_that_takes_forever_is_refused(
    odd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mctf_hf.own_reducers._SECONDS", 0.01)
    odd("odd.py", "odd", f"{BODY}\n# slow")
    with pytest.raises(ValueError, match="odd.py, which defines Odd: importing it takes more than"):
        save(tiny_model(reduction="odd", r=0), PROCESSOR, tmp_path / "model")


def test_what_is_only_talked_of_is_no_import(by_norm: Any, tmp_path: Path) -> None:
    (tmp_path / "by_norm.py").write_text(f'"""\nimport mctf_hf\n"""\n{EXAMPLES[0]}')
    tiny_model(reduction="by_norm").save_pretrained(tmp_path / "model")


def test_code_that_a_model_no_longer_needs_goes(by_norm: Any, tmp_path: Path) -> None:
    folder = save(tiny_model(reduction="by_norm"), PROCESSOR, tmp_path / "model")
    (folder / "notes.py").write_text("# mine")
    save(tiny_model(), PROCESSOR, folder)
    assert not list(folder.glob("*by_norm*")) and (folder / "notes.py").exists()
    assert (folder / "reducers.py").exists()


def test_commands_import_it(
    by_norm: Any, tmp_path: Path, capsys: pytest.CaptureFixture, tiny_folder: Path
) -> None:
    known = REDUCERS.pop("by_norm"), sys.modules.pop("by_norm")
    words = ["visualize", f"{tiny_folder},reduction=by_norm,r=6", "--images", DIGITS]
    words += ["--output", "o.png", "--count", "1"]
    with pytest.raises(SystemExit):
        main(words)
    assert "reduction='by_norm' is not allowed" in capsys.readouterr().err
    main(["--import", "by_norm", *words])
    assert "65 -> 41 tokens" in capsys.readouterr().out
    REDUCERS["by_norm"], sys.modules["by_norm"] = known
    with pytest.raises(SystemExit):
        main(["--import", "by_nrom", *words])
    assert "--import by_nrom: No module named 'by_nrom'" in capsys.readouterr().err


def test_a_card_names_it(by_norm: Any) -> None:
    card = str(make_card("me/model", tiny_model(reduction="by_norm").config, license="mit"))
    assert "a\nmethod of its own (`by_norm`, in the code beside the weights)" in card


@pytest.mark.parametrize("reduction", [name for name in REDUCERS if name != "by_norm"])
def test_a_card_cites_a_method_of_this_library(reduction: str) -> None:
    card = str(make_card("me/model", tiny_model(reduction=reduction).config, license="mit"))
    assert "method of its own" not in card
    (paper,) = re.findall(r"that fuses tokens as it goes \(\*.+\*,\n\[arXiv ([\d.]+)\]", card)
    assert f"https://arxiv.org/abs/{paper}" in card and "author" in card


def test_what_is_defined_in_a_script_or_named_like_a_module_of_ours_is_refused(
    by_norm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(reduction="by_norm")
    with pytest.raises(ValueError, match="push_to_hub=True is not allowed with reduction='by_norm"):
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    monkeypatch.setattr(by_norm, "__module__", "__main__")
    with pytest.raises(ValueError, match="NormReducer is defined in __main__, .* of its own"):
        model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(by_norm, "__module__", "by_norm")
    by_norm.__qualname__ = "make.<locals>.NormReducer"
    with pytest.raises(ValueError, match="the class is to stand at the module's top level"):
        model.save_pretrained(tmp_path / "model")
    by_norm.__qualname__ = "NormReducer"
    (tmp_path / "fusion.py").write_text(EXAMPLES[0])
    monkeypatch.setattr(sys.modules["by_norm"], "__file__", str(tmp_path / "fusion.py"))
    with pytest.raises(ValueError, match="fusion.py, .*: a module of this library has that name"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_models_of_this_librarys_methods_bring_no_more(tmp_path: Path) -> None:
    tiny_model(reduction="evit").save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").glob("model_with_*"))
    auto_map = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert auto_map == dict(MCTFViTConfig.auto_classes)

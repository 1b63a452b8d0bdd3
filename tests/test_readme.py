"""What README and docs show runs as it stands, but for the models that it downloads."""

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from cli.commands import COMMANDS
from cli.main import main
from mctf_hf.hub import load_image_processor, save
from mctf_hf.registry import BACKBONES
from tests.helpers import REPOSITORY, TINY, Golden, in_timm_names, tiny_model
from tests.tiny_models import save_with_words

PAGES = (
    "README.md",
    *sorted(str(page.relative_to(REPOSITORY)) for page in (REPOSITORY / "docs").rglob("*.md")),
)
# What troubleshooting.md shows is to fail: tests/test_troubleshooting.py runs it.
RUNNING = tuple(page for page in PAGES if page != "docs/troubleshooting.md")

# What stands in for what would be downloaded, or would take long.
INSTEAD = {
    "facebook/deit-tiny-patch16-224": "plain",
    "facebook/dinov2-small": "dinov2",
    "openai/clip-vit-base-patch32": "clip",
    "ethz/food101": "data/digits",
    "uoft-cs/cifar10": "data/digits",
    "my/deit-tiny-cifar10": "outputs/digits/model",
    "--model.num_labels 101": "--model.num_labels 10",
    "export outputs/digits/model ": "export flat ",
    "export deit_s,": "export flat,",
    "deit_s_diffrate_2.9 ": "deep,reduction=diffrate,r=2 ",
    "deit_s ": "deep ",
    "deit_s,": "deep,",
    "deit_s.onnx": "deit_s.pt2",
    "--split test --labels true": "--split test --labels true --num_images 24",
    "1,16,64": "1,2",
    "slice=16": "slice=2",
    "1,16": "1,2",
}
SHORTENED = {
    "fit": "--trainer.max_epochs 2 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1 "
    "--data.batch_size 8 --data.eval_batch_size 8 --data.num_workers 0",
    "test": "--trainer.limit_test_batches 1 --data.num_workers 0",
    "predict": "--data.num_workers 0",
    "benchmark": "--rounds 1",
    "benchmark-data": "--batches 2 --warmup 1 --data.num_workers 0",
    "convert": "--num_heads 2",
    "embed": "--trainer.accelerator cpu --num-workers 0",
    "export": "--count 3",
    "push": "--rounds 1 --max_images 8",
    "tune": "--methods tome --trials 2",
}
# By the words that they contain: lines whose options are read, and what they would do is not done.
ONLY_READ = {"_imagenet.yaml": "ImageNet is not here"}
# Lines that are left out.
LEFT_OUT = {
    "make ": "sets up an environment, and `make test` is this",
    "pip install": "installs what is installed",
    "benchmarks.gpu": "measures a GPU, and tests/test_gpu_benchmark.py runs it without one",
    "benchmarks/cpu.sh": "measures for half an hour with `mctf benchmark`, which is run",
    "jupyter lab": "tests/test_notebooks.py runs the notebooks",
    "--as-is": "needs the Hub, and tests/e2e/test_hub.py has one",
    "--aot_inductor": "compiles for long, and tests/test_export.py does so",
    ",aot": "compiles for minutes, and tests/test_benchmark.py does so for a smaller model",
    "torchrun ": "starts processes, and tests/test_embedding.py has them",
    "srun ": "is of a batch system",
    "s3://": "needs a store, and tests/test_embedding.py has a local one",
    "--engine ray": "needs Ray, and tests/test_embedding.py has it where it is installed",
    "status=$?": "of a batch system's script",
    "if [ $status": "of a batch system's script",
    "exit $status": "of a batch system's script",
}


def shown_commands(page: str) -> list[str]:
    """The lines of a page's console blocks, and commands with all their words within its text."""
    text = (REPOSITORY / page).read_text().replace("\\\n", " ")
    blocks = r"^```(?:console|bash|sh|shell)\n(.*?)^```"
    lines = "".join(re.findall(blocks, text, re.MULTILINE | re.DOTALL)).splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`(mctf\s[^`]+)`", prose)]
    whole = [code for code in inline if "…" not in code and "--" in code]
    lines += [code for code in whole if not code.split()[-1].startswith("--")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for what the pages download."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare()
    return folder


def prepare() -> None:
    dino = Dinov2Config(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=4, image_size=32, patch_size=4
    )
    Dinov2Model(dino).save_pretrained("dinov2")
    for folder, layers in (("deep", 12), ("flat", 2)):
        config = ViTConfig(**{**TINY, "num_hidden_layers": layers})
        ViTForImageClassification(config).save_pretrained(folder)
    for folder in ("deep", "flat", "dinov2"):
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    for name, r in (("digits_base", 0), ("digits", 8)):
        save(tiny_model(num_labels=10, r=r), load_image_processor("flat"), f"outputs/{name}/model")
    save_with_words("CLIP", Path("clip"))
    Path("labels.txt").write_text("a cat\na dog\n")
    Path("photos").mkdir()
    for i in range(4):
        Image.effect_noise((40, 40), 60 + i).convert("RGB").save(f"photos/{i}.png")
    weights = in_timm_names(Golden("deit").weights("deit/model."))
    torch.save(weights, "deit_small_patch16_224.pth")
    names = [f"class {i}" for i in range(len(weights["head.bias"]))]
    Path("imagenet_classes.txt").write_text("\n".join(names))


@pytest.fixture
def checkout(prepared: Path, tiny_folder: Path) -> Iterator[None]:
    """A folder with what a checkout has, and the stand-ins."""
    shutil.copytree(prepared, ".", dirs_exist_ok=True)
    for name in ("configs", "data"):
        Path(name).symlink_to(REPOSITORY / name)
    Path("plain").symlink_to(tiny_folder)
    yield
    for name in ("configs", "data", "plain"):
        Path(name).unlink()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [page for page in RUNNING if shown_commands(page)])
def test_the_commands_run(
    page: str, checkout: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in shown_commands(page):
        if any(part in line for part in LEFT_OUT):
            continue
        for shown, used in INSTEAD.items():
            line = line.replace(shown, used)
        words = shlex.split(line, comments=True)
        start = words.index("mctf") + 1
        words = words[start:]
        (command, *_) = (word for word in words if word in COMMANDS)
        only_read = any(part in line for part in ONLY_READ)
        if command == "web":  # which runs until somebody interrupts it
            monkeypatch.setattr("cli.web_page.wait", lambda: None)
        added = "--print_config" if only_read else SHORTENED.get(command, "")
        try:
            main([*words, *shlex.split(added)])
        except SystemExit as stopped:
            assert only_read and not stopped.code, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(
    "page", [page for page in RUNNING if page != "README.md" and python_blocks(page)]
)
def test_the_code_in_docs_runs(page: str, checkout: None, images: torch.Tensor) -> None:
    instead = INSTEAD | {
        "facebook/deit-small-patch16-224": "plain",
        "224, 224": "32, 32",
        "num_train_epochs=30": "max_steps=1, report_to=[]",
        "trials=200": "trials=2",
    }
    rows = [{"pixel_values": image, "labels": 1} for image in images]
    names: dict[str, object] = {"dataset": rows, "model": tiny_model(), "pixel_values": images}
    Dataset.from_dict({"vector": [[0.5] * 24]}).to_parquet("vectors/vectors-000000.parquet")
    for block in python_blocks(page):
        if "by_norm" in block:  # tests/test_own_reducers.py runs it
            continue
        for shown, used in instead.items():
            block = block.replace(shown, used)
        exec(compile(block, page, "exec"), names)


def test_no_shell_takes_a_word_for_a_pattern() -> None:
    for page in PAGES:
        for line in shown_commands(page):
            bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
            assert "if [" in line or not re.search(r"[][*?{}]", bare.replace("$?", "")), line


def test_the_code_of_the_readme_runs(tiny_folder: Path) -> None:
    blocks = python_blocks("README.md")
    assert len(blocks) == 3
    dino = Dinov2Config(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=2, image_size=32, patch_size=4
    )
    Dinov2Model(dino).save_pretrained("dinov2")
    names: dict[str, object] = {}
    for block in blocks:
        code = block.replace("facebook/deit-small-patch16-224", str(tiny_folder))
        code = code.replace("facebook/dinov2-small", "./dinov2")
        exec(compile(code, "README.md", "exec"), names)


def test_numbers_in_comments_are_true() -> None:
    (block,) = python_blocks("docs/settings.md")
    names: dict[str, object] = {}
    exec(block, names)
    stated = re.findall(r"^(\S.*?)\s+# (\(.*\)|[\d.]+)$", block, re.MULTILINE)
    assert len(stated) == 3
    for expression, value in stated:
        found = eval(expression, names)
        assert (round(found, 3) if isinstance(found, float) else found) == eval(value)


def test_every_setting_is_told_with_its_default() -> None:
    told = {}
    text = (REPOSITORY / "docs" / "settings.md").read_text()
    for settings, defaults in re.findall(r"^\| (`.*?`) \| (.*?) \|", text, re.MULTILINE):
        names, values = re.findall(r"`(\w+)`", settings), defaults.replace("`", "").split(", ")
        told |= zip(names, values if len(values) > 1 else values * len(names), strict=True)
    for entry in BACKBONES.values():
        of_transformers = {
            field.name
            for base in entry.config.__mro__
            if base.__module__.startswith("transformers.") and is_dataclass(base)
            for field in fields(base)
        }
        for name in {field.name for field in fields(entry.config)} - of_transformers:
            default = getattr(entry.config(), name)
            if default is None or (name == "restore" and not entry.classifies):  # told in words
                assert name in told
            else:
                assert yaml.safe_load(told[name]) == default, name


def test_nothing_is_left_to_fill_in() -> None:
    for page in PAGES:
        assert "<!--" not in (REPOSITORY / page).read_text(), page


def test_the_recipes_that_they_name_exist() -> None:
    named = {
        config
        for page in PAGES
        for config in re.findall(r"configs/\w+\.yaml", (REPOSITORY / page).read_text())
    }
    assert len(named) > 5
    for config in named:
        assert (REPOSITORY / config).exists(), config

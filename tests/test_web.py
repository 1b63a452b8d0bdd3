"""``mctf web``: what the demo page shows, in a browser too, and the Space that it is written as."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ViTImageProcessorPil,
)

from cli import web_page
from cli.main import main
from cli.models import load
from cli.web_looks import OWN, Answer, Viewed
from cli.web_page import EXAMPLES, open_examples
from cli.web_tables import answers_table
from mctf_hf.cost import multiply_accumulates
from mctf_hf.problems import MULTI
from mctf_hf.visualization import fused_tokens
from tests.helpers import REPOSITORY, tiny_model

# Flags of a browser that asks for nothing by itself.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
# A module that Python imports when it starts: it writes down whom a process asks for.
WATCH = """
import sys
def watch(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host not in (None, "localhost", "127.0.0.1", "::1", "0.0.0.0", b"127.0.0.1"):
        with open({file!r}, "a") as file:
            print(host, file=file)
sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def examples() -> dict[str, Image.Image]:
    return open_examples()


@pytest.fixture
def encoder() -> str:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=4, image_size=32, patch_size=4
    )
    Dinov2Model(config).save_pretrained("dinov2")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("dinov2")
    return "dinov2"


def test_the_examples_that_ship_are_small_and_credited(examples: dict[str, Image.Image]) -> None:
    credits = (EXAMPLES / "CREDITS.md").read_text()
    files = sorted(EXAMPLES.glob("*.jpg"))
    assert [file.stem for file in files] == list(examples) and len(files) >= 6
    assert sum(file.stat().st_size for file in files) < 150_000
    for file in files:
        assert re.search(rf"`{file.name}` \| .+ \| .*(public domain|CC0|CC BY 2.0)", credits)


def test_scores_without_fusion_are_those_of_transformers(
    tiny_folder: Path, examples: dict[str, Image.Image]
) -> None:
    look = Viewed(str(tiny_folder), examples).look(examples["cat"], "mctf", 0.4)
    plain = AutoModelForImageClassification.from_pretrained(tiny_folder).eval()
    pixels = AutoImageProcessor.from_pretrained(tiny_folder)(examples["cat"], return_tensors="pt")
    with torch.no_grad():
        expected = plain(**pixels).logits.softmax(-1)[0]
    for answer in look.answers:
        index = plain.config.label2id[answer.name]
        assert answer.plain == pytest.approx(expected[index].item(), abs=1e-5)
    assert any(abs(answer.plain - answer.fused) > 1e-4 for answer in look.answers)
    assert len(look.answers) == 5 and min(look.seconds) > 0


def test_what_a_look_shows_is_what_commands_do_with_its_words(
    tiny_folder: Path, examples: dict[str, Image.Image]
) -> None:
    viewed = Viewed(str(tiny_folder), examples)
    assert {"mctf", "tome", "evit", "token_mergence"} < set(viewed.methods)
    for method in viewed.methods:
        look = viewed.look(examples["flower"], method, 0.3)
        model, processor = load(look.words)
        (seen,) = fused_tokens(model, processor, [examples["flower"]])
        assert np.array_equal(seen.groups, look.layers[-1].groups)
        assert look.tokens[0] == 65 and look.tokens[-1] == seen.tokens_left < 65
        assert look.tokens == sorted(look.tokens, reverse=True)
        assert look.cost[1] == multiply_accumulates(model)
        assert 0.65 < look.cost[1] / look.cost[0] <= 0.7
    assert viewed.model.config.reduction == load(str(tiny_folder))[0].config.reduction


def test_nothing_is_saved_at_0(tiny_folder: Path, examples: dict[str, Image.Image]) -> None:
    look = Viewed(str(tiny_folder), examples).look(examples["coffee"], "tome", 0)
    assert look.cost[0] == look.cost[1] and set(look.tokens) == {65}
    assert all(answer.plain == answer.fused for answer in look.answers)


def test_a_model_that_fuses_by_itself_is_shown_as_configured(
    tiny_folder: Path, examples: dict[str, Image.Image]
) -> None:
    viewed = Viewed(f"{tiny_folder},r=7,reduction=tome", examples)
    assert viewed.methods[0] == OWN
    assert viewed.look(examples["cat"], OWN, 0.1).tokens == [65, 58, 51, 44, 37, 30]
    assert viewed.look(examples["cat"], "mctf", 0.4).tokens[-1] < 30
    assert OWN not in Viewed(str(tiny_folder), examples).methods


@pytest.mark.parametrize("method", ["tome", "evit", "mctf", OWN])
@pytest.mark.parametrize("saved", [0, 0.3])
def test_words_of_a_model_with_settings_load(
    method: str, saved: float, tiny_folder: Path, examples: dict[str, Image.Image]
) -> None:
    for settings in ("r=(4,-1),tau_info=10", "reduction=pitome,margin=0.5,r=4,restore=true"):
        look = Viewed(f"{tiny_folder},{settings}", examples).look(examples["cat"], method, saved)
        model, processor = load(look.words)
        (seen,) = fused_tokens(model, processor, [examples["cat"]])
        assert np.array_equal(seen.groups, look.layers[-1].groups)


def test_an_encoder_tells_the_nearest_examples(
    encoder: str, examples: dict[str, Image.Image]
) -> None:
    viewed = Viewed(encoder, examples)
    assert not viewed.classifies
    look = viewed.look(examples["temple"], "mctf", 0.3)
    assert look.answers[0].name == "temple" and look.answers[0].plain == pytest.approx(1, abs=1e-5)
    assert look.answers[0].fused < 1 - 1e-5
    assert {answer.name for answer in look.answers} < set(examples)


def test_several_labels_have_a_probability_each(examples: dict[str, Image.Image]) -> None:
    tiny_model(problem_type=MULTI).save_pretrained("several")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("several")
    look = Viewed("several,r=0", examples).look(examples["cat"], "mctf", 0.3)
    assert abs(sum(answer.plain for answer in look.answers) - 1) > 0.1


def test_an_image_of_another_size_than_the_models(examples: dict[str, Image.Image]) -> None:
    tiny_model().save_pretrained("free")
    ViTImageProcessorPil(do_resize=False).save_pretrained("free")
    look = Viewed("free,r=0", {}).look(examples["cat"].resize((64, 32)), "mctf", 0.3)
    assert look.tokens[0] == 129 and look.layers[0].groups.shape == (8, 16)
    assert look.cost[1] <= 0.7 * look.cost[0]


def test_names_are_no_html() -> None:
    table = answers_table([Answer("<script>&", 0.5, 0.25)], "class", {}, parts=True)
    assert "&lt;script&gt;&amp;" in table and "<script" not in table
    assert "50.0%" in table and "25.0%" in table


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_the_command_serves_the_page_until_it_is_interrupted(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    port, pages = free_port(), []

    def visit() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
            pages.append(page.read().decode())
        raise KeyboardInterrupt

    monkeypatch.setattr(web_page, "wait", visit)
    with pytest.raises(SystemExit) as stopped:
        main(["web", f"{tiny_folder},r=8", str(tiny_folder), "--port", str(port)])
    assert stopped.value.code == 130
    assert "Token fusion" in pages[0] and f"{tiny_folder},r=8" in pages[0]
    assert f"http://127.0.0.1:{port}/" in capsys.readouterr().out
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["broken"], "broken/config.json cannot be read as JSON"),
        (["no/where/at/all"], "no/where/at/all"),
        (["{tiny},speed=9"], "setting 'speed' of .* is not known"),
        (["{tiny}", "--images", "text.jpg"], "text.jpg holds no readable image"),
        (["{tiny}", "--port", "{taken}"], r"port=\d+ of 127.0.0.1 cannot be had: .*in use"),
        (["{tiny}", "--port", "70000"], "port=70000 of 127.0.0.1 cannot be had"),
        (["{tiny}", "--device", "tpu"], "device='tpu' is not allowed"),
        (["{tiny}", "--space", "broken"], "broken is not empty: name a new folder"),
        (["{tiny}", "broken", "--space", "new"], "broken/config.json cannot be read as JSON"),
        (["{tiny}", "--space", "new", "--port", "80"], "--port is not allowed beside --space"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tiny_folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    Path("text.jpg").write_text("no image")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["web", *(w.format(tiny=tiny_folder, taken=taken.getsockname()[1]) for w in words)])
    told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(told) == 1 and re.search(message, told[0])
    assert not Path("new").exists() and not list(Path().glob(".draft-*"))


def test_a_space_has_what_the_hub_wants(
    tiny_folder: Path,
    encoder: str,
    examples: dict[str, Image.Image],
    capsys: pytest.CaptureFixture,
) -> None:
    for name in ("a b", "a-b"):
        examples["cat"].save(f"{name}.png")
    main(["web", f"{tiny_folder},r=8", encoder, "a/b,r=4", "--images", ".", "--space", "new/s"])
    assert len(open_examples("new/s/examples")) == 2
    _, header, _ = Path("new/s/README.md").read_text(encoding="utf-8").split("---\n")
    told = yaml.safe_load(header)
    assert (told["sdk"], told["app_file"], told["models"]) == ("gradio", "app.py", ["a/b"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", told["sdk_version"])
    assert len(told["short_description"]) <= 60
    requirements = Path("new/s/requirements.txt").read_text().splitlines()
    assert requirements[0] == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+\+cpu", requirements[1])
    assert re.fullmatch(r"mctf-hf\[web\]==\d+\.\d+\.\d+", requirements[2])
    app = Path("new/s/app.py").read_text()
    shown = ["models/1-tiny-vit", "models/2-dinov2", "a/b,r=4"]
    assert f"serve({shown!r}, images='examples')" in app
    assert "new/s" in capsys.readouterr().out
    assert load("new/s/models/1-tiny-vit")[0].config.r == 8
    assert Viewed("new/s/models/2-dinov2", open_examples("new/s/examples")).classifies is False
    assert sorted(path.name for path in Path("new").iterdir()) == ["s"]


@contextmanager
def started_space(folder: Path) -> Iterator[str]:
    """A Space as the Hub starts it: its program, in a process of its own. Yields its address."""
    Path("watch").mkdir()
    asked = Path("watch/asked.txt").absolute()
    Path("watch/sitecustomize.py").write_text(WATCH.format(file=str(asked)))
    Path("watch/mctf_cli").symlink_to(REPOSITORY / "cli")  # as it is called where it is installed
    port = free_port()
    places = [str(Path("watch").absolute()), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(places),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(Path("uploads").absolute()),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str((folder / "app.py").absolute())],
        cwd=Path("watch"),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        # Who was started in the background ignores SIGINT, and what it starts would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert not asked.exists(), asked.read_text()
    assert not list(Path("uploads").rglob("upload.png"))


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.fail(
            "no Chromium is here to show the page in: install the package chromium, or leave out "
            "what needs it by make test BROWSER=no",
            pytrace=False,
        )
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        try:
            yield started
        finally:
            started.close()


SHOWN = """
window.text = part => document.querySelector(part)?.innerText ?? "";
window.bars = "#chart .layers > div > div:first-child";
window.shown = () => ({
  answers: text("#answers table"),
  figures: text("#figures table"),
  tokens: [...document.querySelectorAll(bars)].map(bar => Number(bar.innerText)),
  picture: document.querySelector("#picture img")?.src ?? "",
});
"""


class Visit:
    """The page as somebody sees it.

    Attributes:
        foreign: addresses elsewhere that the page has asked for.
        problems: of its scripts.
    """

    def __init__(self, started: Any, url: str, width: int, scheme: str):
        context = started.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=width < 500
        )
        self.page = context.new_page()
        self.foreign: list[str] = []
        self.problems: list[str] = []
        own = (url, "data:", "blob:")
        self.page.on(
            "request",
            lambda one: None if one.url.startswith(own) else self.foreign.append(one.url),
        )
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.add_init_script(SHOWN)
        self.page.goto(url)
        self.page.wait_for_selector("#figures table", timeout=60_000)
        self.page.wait_for_selector("#picture img", timeout=60_000)

    def shown(self) -> dict[str, Any]:
        """The picture's address, and all numbers."""
        return self.page.evaluate("shown()")

    def after(self, act: Callable[[], object], *changed: str) -> dict[str, Any]:
        """What is shown when some of it has become other than before an act."""
        before = self.shown()
        act()
        differs = "([before, names]) => names.every(name => `${shown()[name]}` != before[name])"
        texts = {
            name: value if isinstance(value, str) else ",".join(map(str, value))
            for name, value in before.items()
        }
        self.page.wait_for_function(differs, arg=[texts, changed], polling=200, timeout=60_000)
        return self.shown()

    def colour(self, name: str) -> float:
        """How light something is, from 0 to 255, by the style that it ends up with."""
        style = f"getComputedStyle(document.body).{name}"
        return float(
            np.mean([int(part) for part in re.findall(r"\d+", self.page.evaluate(style))[:3]])
        )


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_space_in_a_browser(tiny_folder: Path, examples: dict[str, Image.Image]) -> None:
    main(["web", str(tiny_folder), "--space", "space"])
    examples["temple"].save("upload.png")
    Path("text.png").write_text("no image")
    with started_space(Path("space")) as url, browser() as started:
        wide = Visit(started, url, 1280, "light")
        first = wide.shown()
        assert len(first["tokens"]) == 5 and "(-40%)" in first["figures"]

        amount = wide.page.locator("#saved input[type=range]")
        less = wide.after(lambda: amount.fill("20"), "picture", "figures", "tokens")
        assert less["tokens"][-1] > first["tokens"][-1] and "(-20%)" in less["figures"]
        layer = wide.page.locator("#layer input[type=range]")
        early = wide.after(lambda: layer.fill("0"), "picture")
        assert early["tokens"] == less["tokens"]

        file = wide.page.locator("#photo input[type=file]").first
        upload = wide.after(lambda: file.set_input_files("upload.png"), "picture")
        assert upload["tokens"] == less["tokens"]
        expected = Viewed(str(tiny_folder), {}).look(examples["temple"], "mctf", 0.2)
        assert [row.split("\t") for row in upload["answers"].splitlines()[1:]] == [
            [one.name, f"{one.plain:.1%}", f"{one.fused:.1%}"] for one in expected.answers
        ]
        wide.page.locator("#photo input[type=file]").first.set_input_files("text.png")
        told = wide.page.locator(".toast-body")
        told.wait_for(timeout=60_000)
        assert "text.png holds no readable image: its format is unknown" in told.inner_text()

        narrow = Visit(started, url, 390, "dark")
        page = narrow.page
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for part in ("photo", "saved", "picture", "layer", "chart", "answers", "figures"):
            box = page.locator(f"#{part}").bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= 390, part
        assert narrow.colour("backgroundColor") < 60 < 200 < narrow.colour("color")
        assert wide.colour("color") < 60 < 200 < wide.colour("backgroundColor")
        assert not wide.foreign + narrow.foreign and not wide.problems + narrow.problems

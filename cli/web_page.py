"""The demo page: a model with and without fusion on an image, side by side."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from mctf_hf.images import decode
from mctf_hf.problems import REGRESSION, problem_type

from .measuring import machine_name
from .models import captions_of
from .paths import open_images
from .web_looks import OWN, ROUNDS, Look, Viewed
from .web_tables import CSS, answers_table, figures_table, layers_chart

EXAMPLES = Path(__file__).parent / "examples"
MOST_EXAMPLES = 12
MOST_SAVED, SAVED = 75, 40  # percent: the maximum, and the initial value
KEPT = (3600, 86400)  # seconds: interval between deletions of uploaded files, and their maximum age
ABOUT = """# Token fusion
How a Vision Transformer fuses the tokens of an image, layer by layer. Regions with the same fill
and border are one token. More fusion costs less: see what it changes."""


def serve(
    models: Sequence[str],
    images: str | None = None,
    host: str | None = None,
    port: int | None = None,
    device: str = "cpu",
) -> None:
    """Show the page until the process is interrupted.

    Args:
        models: ``NAME[,setting=value…]``, see :func:`.models.load`.
        images: examples, see :func:`open_examples`.
        host: address to listen on; ``None`` for ``GRADIO_SERVER_NAME``, or else localhost.
        port: port to listen on; ``None`` for ``GRADIO_SERVER_PORT``, or else the first free one
            from 7860 on.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError, OSError: see :class:`.web_looks.Viewed`; OSError also if the port is taken.
    """
    page = build(models, images, device)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        footer_links=[],
        quiet=True,
        run_history=False,
        share=False,
        ssr_mode=False,
        prevent_thread_lock=True,
    )
    print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
    try:
        wait()
    finally:
        page.close(verbose=False)


def wait() -> None:
    """Wait until the process is interrupted."""
    threading.Event().wait()


def open_examples(images: str | None = None) -> dict[str, Image.Image]:
    """Open example images, by name.

    Args:
        images: image file, folder of images, dataset folder or dataset id on the Hub; evenly spaced
            images are used. ``None`` for the images that ship with this library.

    Raises:
        ValueError, OSError: see :func:`.paths.open_images`.
    """
    if images is None:
        return {file.stem: decode(file, file.name) for file in sorted(EXAMPLES.glob("*.jpg"))}
    found = open_images(images, MOST_EXAMPLES, exactly=False)
    short = [
        Path(name).stem if Path(name).exists() else name.partition(" of ")[0] for name in found
    ]
    names = short if len({*short}) == len(short) else list(found)
    return dict(zip(names, found.values(), strict=True))


def build(models: Sequence[str], images: str | None = None, device: str = "cpu") -> gr.Blocks:
    """Build the page with Gradio; see :func:`serve` for the arguments."""
    examples = open_examples(images)
    viewed = {words: Viewed(words, examples, device) for words in models}
    first = viewed[models[0]]
    with gr.Blocks(title="Token fusion", analytics_enabled=False, delete_cache=KEPT) as page:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(min_width=320):
                photo = gr.Image(
                    next(iter(examples.values())),
                    label="Image",
                    format="png",
                    sources=["upload", "webcam", "clipboard"],
                    height=280,
                    elem_id="photo",
                )
                gr.Examples([[image] for image in examples.values()], photo, label="Examples")
                model = gr.Dropdown(
                    list(zip(captions_of(models), models, strict=True)),
                    label="Model",
                    visible=len(viewed) > 1,
                    elem_id="model",
                )
                method = gr.Dropdown(first.methods, label="Method", elem_id="method")
                saved = gr.Slider(
                    0, MOST_SAVED, SAVED, step=1, label="Cost saved by fusion (%)", elem_id="saved"
                )
            with gr.Column(min_width=320):
                picture = gr.Image(
                    format="png",
                    show_label=False,
                    buttons=[],
                    interactive=False,
                    elem_id="picture",
                    alt_text="The image with its fused tokens",
                )
                layer = _layers_of(first)
                chart = gr.HTML(elem_id="chart", apply_default_css=False)
            with gr.Column(min_width=320):
                answers = gr.HTML(elem_id="answers", apply_default_css=False)
                figures = gr.HTML(elem_id="figures", apply_default_css=False)
        seen = gr.State()

        def show(
            file: dict[str, Any] | None, words: str, method: str, saved: float, layer: int
        ) -> Sequence[Any]:
            if file is None:
                return [gr.skip()] * 5
            look = _look(viewed[words], file, method, saved)
            tables = (layers_chart(look.tokens), *_tables(viewed[words], look, examples))
            return look, look.layers[layer].picture(), *tables

        update: dict[str, Any] = {
            "fn": show,
            "inputs": [photo, model, method, saved, layer],
            "outputs": [seen, picture, chart, answers, figures],
            "preprocess": False,  # images are read as in all commands
            "concurrency_id": "model",  # one at a time: calls change settings and measure time
            "trigger_mode": "always_last",
        }
        gr.on([page.load, photo.change, method.input, saved.change], **update)
        model.input(
            lambda words: (
                gr.Dropdown(viewed[words].methods, value=viewed[words].methods[0]),
                _layers_of(viewed[words]),
            ),
            model,
            [method, layer],
        ).then(**update)
        method.change(lambda method: gr.Slider(interactive=method != OWN), method, saved)
        layer.input(
            lambda look, layer: look.layers[layer].picture(),
            [seen, layer],
            picture,
            trigger_mode="always_last",
            show_progress="hidden",
        )
    return page


def _layers_of(viewed: Viewed) -> gr.Slider:
    last = viewed.model.config.num_hidden_layers - 1
    return gr.Slider(
        0, last, last, step=1, precision=0, label="Fused tokens after layer", elem_id="layer"
    )


def _look(viewed: Viewed, file: Mapping[str, Any], method: str, saved: float) -> Look:
    name = file["orig_name"] or "the image"
    try:
        return viewed.look(decode(file["path"], name), method, saved / 100, name)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _tables(viewed: Viewed, look: Look, examples: Mapping[str, Image.Image]) -> tuple[str, str]:
    threads = "" if viewed.device == "cuda" else f", threads: {torch.get_num_threads()}"
    measured = f"The median of {ROUNDS} runs on {machine_name(viewed.device)}{threads}."
    return (
        answers_table(
            look.answers,
            "class" if viewed.classifies else "nearest example (cosine)",
            {} if viewed.classifies else examples,
            parts=viewed.classifies and problem_type(viewed.model.config) != REGRESSION,
        ),
        figures_table(look, measured),
    )

"""Tables and bars of the demo page, as HTML in the colours of Gradio's theme."""

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from .web_looks import Answer, Look

CSS = """
.fusion table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.fusion { color: var(--body-text-color); line-height: 1.5; }
.fusion th, .fusion td { padding: 5px 6px; text-align: right; vertical-align: middle;
  border-bottom: 1px solid var(--border-color-primary); }
.fusion th { font-weight: 500; opacity: 0.75; }
.fusion td { white-space: nowrap; }
.fusion th:first-child, .fusion td:first-child { text-align: left; white-space: normal;
  overflow-wrap: break-word; }
.fusion img { display: inline-block; width: 40px; height: 40px; margin: 0 8px 0 0;
  object-fit: cover; border-radius: 4px; vertical-align: middle; }
.fusion .bar { background: linear-gradient(90deg, var(--color-accent) var(--part),
  transparent var(--part)) left bottom / 100% 3px no-repeat; }
.fusion .layers { display: flex; gap: 3px; align-items: flex-end; overflow-x: auto; }
.fusion .layers > div { flex: 1 0 22px; text-align: center; font-size: 11px; line-height: 1.5; }
.fusion .layers .tokens { background: var(--color-accent); border-radius: 3px 3px 0 0; }
.fusion p { margin: 6px 0 0; font-size: 12px; opacity: 0.75; }
.fusion code { overflow-wrap: anywhere; white-space: normal; }
"""
BAR_HEIGHT = 90  # pixels of a bar for all tokens


def answers_table(
    answers: Sequence[Answer], heading: str, pictures: Mapping[str, Image.Image], *, parts: bool
) -> str:
    """A table of the model's answers, without and with fusion.

    Args:
        heading: heading of the column of names.
        pictures: pictures by name, to show beside the names.
        parts: whether the values are fractions, shown as percentages.
    """
    shown = "{:.1%}" if parts else "{:.3f}"

    def cell(value: float) -> str:
        return f'<td class="bar" style="--part: {value:.1%}">' if parts else "<td>"

    rows = [
        f"<tr><td>{_thumbnail(pictures.get(one.name))}{escape(one.name)}</td>"
        + "".join(f"{cell(value)}{shown.format(value)}</td>" for value in (one.plain, one.fused))
        for one in answers
    ]
    return _table([escape(heading), "without fusion", "with fusion"], rows)


def layers_chart(tokens: Sequence[int]) -> str:
    """A bar chart of the number of tokens after each layer."""
    bars = [
        f'<div><div>{count}</div><div class="tokens" '
        f'style="height: {BAR_HEIGHT * count / tokens[0]:.0f}px"></div>'
        f"<div>{layer}</div></div>"
        for layer, count in enumerate(tokens[1:])
    ]
    return (
        f'<div class="fusion"><div class="layers">{"".join(bars)}</div>'
        f"<p>Tokens after each layer, of {tokens[0]}.</p></div>"
    )


def figures_table(look: Look, measured: str) -> str:
    """A table of tokens, cost and time, without and with fusion.

    Args:
        measured: text about how and on which machine time was measured.
    """
    plain, fused = look.seconds
    cost = look.cost
    rows = {
        "tokens at the end": (f"{look.tokens[0]}", f"{look.tokens[-1]}"),
        "GMACs": (
            f"{cost[0] / 1e9:.3g}",
            f"{cost[1] / 1e9:.3g} ({cost[1] / cost[0] - 1:+.0%})",
        ),
        "ms per image": (f"{1000 * plain:.1f}", f"{1000 * fused:.1f} ({plain / fused:.2f}x)"),
    }
    cells = [f"<tr><td>{k}</td><td>{one}</td><td>{two}</td></tr>" for k, (one, two) in rows.items()]
    note = f"<p>{escape(measured)}</p><p><code>{escape(shlex.quote(look.words))}</code></p>"
    return _table(["", "without fusion", "with fusion"], cells, note)


def _table(headings: Sequence[str], rows: Sequence[str], note: str = "") -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return f'<div class="fusion"><table><tr>{head}</tr>{"".join(rows)}</table>{note}</div>'


def _thumbnail(picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    small, file = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((80, 80))
    small.save(file, format="JPEG")
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'

"""``mctf neighbours``: finds the images of a collection that are nearest to an image or a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_modules.image_sources import open_source
from lightning_modules.nearest import Neighbour, nearest
from lightning_modules.vector_folder import VectorFolder
from mctf_hf.checks import check_range
from mctf_hf.embedding import Embedder, digest
from mctf_hf.files import replace
from mctf_hf.images import ImageReader, decode, is_image_name
from mctf_hf.texts import TextEncoder
from mctf_hf.visualization import contact_sheet

from .models import load_encoder, parse
from .options import parser_of, read
from .paths import check_output

EDGE = 224  # edge of a thumbnail, in pixels
COLUMNS = 6


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`neighbours`."""
    folder = {"help": "the folder that `mctf embed` has written."}
    settings, _ = read(parser_of("neighbours", neighbours, folder=folder), args)
    neighbours(**settings)


def neighbours(
    folder: str, query: str, count: int = 11, output: str | None = "neighbours.png"
) -> None:
    """Find the images of a collection that are nearest to an image or to a text.

    `mctf embed` has written the vectors of the collection. The nearest images have the largest
    cosine similarity. They are printed as a table and drawn as a picture.

    Args:
        folder: folder that `mctf embed` has written.
        query: an image file; for vectors of a CLIP or a SigLIP, also a text.
        count: number of images.
        output: PNG file to draw; null draws none.
    """
    check_range(1, count=count)
    file = None if output is None else check_output(output, ".png")
    vectors = VectorFolder(folder)
    manifest = vectors.manifest()
    shown, vector = _read_query(query, manifest, folder)
    found = nearest(vectors, vector, count)
    if not found:
        raise ValueError(f"{folder} has no vectors yet: run mctf embed to its end")
    so_far = "" if manifest["status"] == "finished" else " (mctf embed is not at its end)"
    Console().print(_table(found, f"nearest to {query} in {folder}{so_far}"))
    if file is None:
        return
    pictures = _pictures(found, manifest)
    if shown is not None:
        pictures = [(f"query: {Path(query).name}", shown), *pictures]
    sheet = _sheet(pictures)
    replace(file, lambda draft: sheet.save(draft, format="PNG"))
    print(f"wrote {file}")


def _read_query(
    query: str, manifest: dict[str, Any], folder: str
) -> tuple[Image.Image | None, Tensor]:
    """The image of a query, ``None`` for a text, and its vector, (d)."""
    settings = manifest["settings"]
    if Path(query).is_file():
        model, processor = load_encoder(settings["model"])
        if digest(model) != settings["weights"]:
            raise ValueError(
                f"{settings['model']} is not what {folder} was made with: its weights are others"
            )
        reader = ImageReader(processor, model.config.num_channels)
        image = reader.read(query, query)
        embedder = Embedder(model, settings["vector"]).eval()
        return decode(query, query), embedder(reader(image)[None]).vectors[0].cpu()
    if is_image_name(query):
        raise FileNotFoundError(f"query={query!r}: there is no such file")
    name, _ = parse(settings["model"])
    try:
        encoder = TextEncoder(name)
    except ValueError as error:
        raise ValueError(f"query={query!r} is no file, and as a text: {error}") from error
    if settings["vector"] != "pooled":
        raise ValueError(
            f"query={query!r} is not allowed: {folder} holds vectors of the kind "
            f"{settings['vector']}, and texts are near to pooled ones"
        )
    return None, encoder([query])[0]


def _pictures(
    found: Sequence[Neighbour], manifest: dict[str, Any]
) -> list[tuple[str, Image.Image]]:
    """Captions and images of neighbours, read from the source that was embedded."""
    opened, settings = manifest["source"], manifest["settings"]
    source = open_source(**opened, unit_size=settings["shard_size"])
    if source.digest() != settings["collection"]:
        raise ValueError(
            f"{opened['images']} is not what was embedded: files have changed since, and rows "
            "would name others. --output null leaves the picture out"
        )
    images = {}
    for unit in {one.unit for one in found}:
        wanted = {one.row["id"] for one in found if one.unit == unit}
        for image in source.read(unit):
            if image.id in wanted:
                images[unit, image.id] = decode(image.stored, image.id)
                wanted.remove(image.id)
            if not wanted:
                break
    return [
        (f"{one.cosine:.3f}\n{_short(one.row['id'])}", images[one.unit, one.row["id"]])
        for one in found
    ]


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"…{text[-23:]}"


def _sheet(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """A picture of captioned thumbnails, in rows."""
    rows = [pictures[i : i + COLUMNS] for i in range(0, len(pictures), COLUMNS)]
    sheets = [
        contact_sheet(
            [caption for caption, _ in row],
            [[ImageOps.pad(image, (EDGE, EDGE), color="white") for _, image in row]],
        )
        for row in rows
    ]
    whole = Image.new(
        "RGB", (max(one.width for one in sheets), sum(one.height for one in sheets)), "white"
    )
    top = 0
    for one in sheets:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def _table(found: Sequence[Neighbour], title: str) -> Table:
    table = Table(title=title)
    table.add_column("cosine", justify="right")
    for name in found[0].row:
        table.add_column(name, overflow="fold")
    for one in found:
        table.add_row(f"{one.cosine:.4f}", *map(_cell, one.row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value[:4])) + (", …" if len(value) > 4 else "")
    return str(value)

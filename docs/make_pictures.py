"""Draw the pictures of the documentation: what each method makes of one photograph.

``python docs/make_pictures.py [MODEL [FOLDER]]`` writes them to ``docs/pictures``, or to FOLDER.
MODEL is a DINOv2-small: a folder, or an id on the Hub.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cli.models import load
from mctf_hf.files import replace
from mctf_hf.visualization import contact_sheet, enlarge, fused_tokens

DOCS = Path(__file__).parent
MODEL = "facebook/dinov2-small"
SIDE = 200  # pixels of a column, small so that captions can be read where it is narrow
# All leave 60% of the multiply-accumulates.
METHODS = {
    "mctf": "reduction=mctf,r=auto:0.6",
    "mctf_after_attention": "reduction=mctf,one_step_ahead=present,r=auto:0.6",
    "tome": "reduction=tome,r=auto:0.6",
    "pitome": "reduction=pitome,r=auto:0.6",
    "diffrate": "reduction=diffrate,r=auto:0.6,dropped=0.5,restore=false",
    "evit": "reduction=evit,keep_rate=auto:0.6",
    "token_mergence": "reduction=token_mergence,keep_rate=auto:0.6",
    "own": "reduction=by_norm,r=auto:0.6",
}


def draw(words: str, photographs: Sequence[Image.Image]) -> Image.Image:
    """Photographs, one in a row, beside their tokens after some layers of a model."""
    model, processor = load(words)
    layers = [model.config.num_hidden_layers * third // 3 for third in (1, 2, 3)]
    by_layer = [fused_tokens(model, processor, photographs, layer - 1) for layer in layers]
    before = by_layer[0][0].num_tokens
    captions = [f"{before} tokens"]
    captions += [
        f"after layer {layer}: {seen[0].tokens_left}"
        for layer, seen in zip(layers, by_layer, strict=True)
    ]
    rows = [
        [enlarge(one[0].view, 2), *(tokens.picture(2) for tokens in one)]
        for one in zip(*by_layer, strict=True)
    ]
    return contact_sheet(captions, [[_shrunk(picture) for picture in row] for row in rows])


def _shrunk(picture: Image.Image) -> Image.Image:
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main(model: str = MODEL, folder: str | Path = DOCS / "pictures") -> None:
    """Write one picture for each method."""
    Path(folder).mkdir(exist_ok=True)
    example = re.findall(r"```python\n(.*?)```", (DOCS / "methods/own.md").read_text(), re.DOTALL)
    exec(example[0], {"__name__": "by_norm"})  # registers the method that the page shows
    photographs = [Image.open(DOCS / "pictures" / f"{name}.jpg") for name in ("pagoda", "dahlia")]
    for name, settings in METHODS.items():
        picture = draw(f"{model},{settings}", photographs)
        file = Path(folder, f"{name}.webp")
        replace(file, lambda draft, picture=picture: picture.save(draft, "WEBP", quality=85))
        print(f"wrote {file.name}: {picture.width} x {picture.height} pixels")


if __name__ == "__main__":
    main(*sys.argv[1:])

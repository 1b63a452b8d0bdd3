"""``mctf visualize``: draws the tokens that models have fused, side by side."""

from collections.abc import Iterable, Sequence

from mctf_hf.checks import check_range
from mctf_hf.files import replace
from mctf_hf.visualization import FusedTokens, contact_sheet, enlarge, fused_tokens

from .models import captions_of, load
from .options import parser_of, read
from .paths import check_output, open_images


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`visualize`."""
    models = {
        "nargs": "+",
        "help": "NAME[,setting=value…]: a folder or a Hub id, with settings of fusion (r=16, "
        "r=auto:0.56, reduction=tome, fusion_layers=[3,6,9], …).",
    }
    settings, _ = read(parser_of("visualize", visualize, models=models), args)
    visualize(**settings)


def visualize(
    models: list[str],
    images: str,
    output: str,
    count: int | None = None,
    layer: int | None = None,
    scale: int | None = None,
) -> None:
    """Draw images with their fused tokens, one column per model.

    Each group of patches is filled with its mean colour. Regions with the same fill and border
    colour are one token. A patch without a coloured border is a token of its own.

    Args:
        models: the models, as :func:`main` describes them.
        images: image file, folder of images, dataset folder or dataset id on the Hub; evenly spaced
            images are used.
        output: PNG file to write.
        count: number of images. If unset, up to 4.
        layer: zero-based layer after which the tokens are shown. If unset, the last.
        scale: pixels of the picture per image pixel. If unset, as many as fit into 448 pixels.
    """
    check_range(1, count=count, scale=scale)
    file = check_output(output, ".png")
    pictures = open_images(images, count or 4, exactly=count is not None)
    seen: list[list[FusedTokens]] = []
    for words in models:
        seen.append(fused_tokens(*load(words), pictures.values(), layer))
        _check_views(models[0], seen[0], words, seen[-1])
    after = "" if layer is None else f" after layer {layer}"
    captions = [
        f"{label}\n{_count(by_image)}{after}"
        for label, by_image in zip(captions_of(models), seen, strict=True)
    ]
    rows = [
        [enlarge(by_model[0].view, scale), *(tokens.picture(scale) for tokens in by_model)]
        for by_model in zip(*seen, strict=True)
    ]
    sheet = contact_sheet(["original", *captions], rows)
    replace(file, lambda draft: sheet.save(draft, format="PNG"))
    for caption in captions:
        print(caption.replace("\n", ": "))
    print(f"shown: {'; '.join(pictures)}\nwrote {file}")


def _check_views(
    first: str, of_first: Sequence[FusedTokens], words: str, of_other: Sequence[FusedTokens]
) -> None:
    """Raise ValueError unless two models see the images in the same sizes."""
    for one, other in zip(of_first, of_other, strict=True):
        if one.view.size != other.view.size:
            raise ValueError(
                f"{words} sees an image as {other.view.height} x {other.view.width} pixels, "
                f"{first} as {one.view.height} x {one.view.width}: all models of a picture must "
                "see the same"
            )


def _count(by_image: Iterable[FusedTokens]) -> str:
    """Text with the tokens before and after fusion; the default font has no arrow."""
    before, after = zip(*((one.num_tokens, one.tokens_left) for one in by_image), strict=True)
    return f"{_span(before)} -> {_span(after)} tokens"


def _span(counts: Sequence[int]) -> str:
    return "-".join(str(count) for count in sorted({min(counts), max(counts)}))

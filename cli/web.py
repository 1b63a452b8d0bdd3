"""``mctf web``: a page in the browser that shows what fusion makes of images, or a Space of it."""

import socket
from collections.abc import Sequence

import torch

from .options import parser_of, read, refuse

DEFAULT = "facebook/deit-small-patch16-224"


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`web`."""
    models = {
        "nargs": "*",
        "default": [DEFAULT],
        "help": "NAME[,setting=value…]: a folder or a Hub id, with settings of fusion (r=16, …).",
    }
    parser = parser_of("web", web, models=models)
    settings, given = read(parser, args)
    if settings["space"] is not None:
        refuse(given, {"host", "port", "device"}, "beside --space, which shows nothing here")
    web(**settings)


def web(
    models: list[str],
    images: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str = "cpu",
    space: str | None = None,
) -> None:
    """Show in the browser what fusion makes of an image, or write a Space that does.

    The page shows the fused tokens after each layer, the prediction, cost and time, beside the
    model without fusion.

    Args:
        models: see above; several are chosen from on the page.
        images: an image, a folder of images or of a dataset, or a dataset's id on the Hub, of which
            twelve evenly spaced ones are examples; unset, those that ship with this library.
        host: address to listen at; 0.0.0.0 shows the page to other machines, too.
        port: to listen at; unset, the first free one from 7860 on.
        device: cpu or cuda.
        space: folder to write a Space of the Hugging Face Hub to, instead of showing the page.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        allowed = "cpu or cuda" if torch.cuda.is_available() else "cpu, as there is no GPU"
        raise ValueError(f"device={device!r} is not allowed: it is {allowed}")
    if port is not None:
        _check_free(host, port)
    if space is not None:
        from .web_space import write_space

        write_space(space, models, images)
        print(f"wrote {space}; it goes up by: hf upload NAME {space} --repo-type space")
    else:
        from .web_page import serve

        serve(models, images, host, port, device)


def _check_free(host: str, port: int) -> None:
    """Raise OSError unless nothing else listens at a port."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise OSError(f"port={port} of {host} cannot be had: {error}") from error

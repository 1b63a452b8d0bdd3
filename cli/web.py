"""``mctf web``: shows in the browser what fusion changes, or writes a Space that does."""

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
    """Show in the browser what fusion changes for an image, or write a Space that does.

    The page shows the fused tokens after each layer. It compares prediction, cost and time with
    the model without fusion.

    Args:
        models: the models to choose from on the page, as :func:`main` describes them.
        images: image file, folder of images, dataset folder or dataset id on the Hub; up to twelve
            evenly spaced images are the examples. If unset, those that ship with this library.
        host: address to listen on; 0.0.0.0 makes the page available to other machines.
        port: port to listen on. If unset, the first free one from 7860 on.
        device: cpu or cuda.
        space: folder to write a Space of the Hugging Face Hub to, instead of showing the page.
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        allowed = "cpu or cuda" if torch.cuda.is_available() else "cpu, as there is no GPU"
        raise ValueError(f"device={device!r} is not allowed: it must be {allowed}")
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
    """Raise OSError if the port is not free."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise OSError(f"port={port} of {host} cannot be had: {error}") from error

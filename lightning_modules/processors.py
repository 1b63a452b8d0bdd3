"""What an image processor does to images, as numbers."""

from typing import Any


def output_size(processor: Any) -> tuple[int, int]:
    """Height and width of what an image processor returns, in pixels."""
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    edge = size.get("shortest_edge")
    return (edge, edge) if edge else (size["height"], size["width"])


def settle_size(config: Any, processor: Any) -> dict[str, Any]:
    """Settings of a model that takes images of any size, for those that a processor makes.

    Args:
        config: of a model of this library, which is told, too.
    """
    if not config.any_size or config.input_size is not None:
        return {}
    config.input_size = output_size(processor)
    return {"input_size": config.input_size}

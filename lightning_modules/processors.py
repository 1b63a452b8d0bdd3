"""Output sizes of image processors."""

from typing import Any


def output_size(processor: Any) -> tuple[int, int]:
    """Height and width of the images that a processor outputs, in pixels.

    Raises:
        ValueError: for a processor without a fixed output size.
    """
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    edge = size.get("shortest_edge")
    if not edge and not (size.get("height") and size.get("width")):
        raise ValueError(
            f"size={dict(size)!r} of the image processor is not allowed: images of a batch are of "
            "one size, so it has height and width, or a shortest_edge"
        )
    return (edge, edge) if edge else (size["height"], size["width"])


def fit_shape(processor: Any) -> bool:
    """Let a processor that keeps the aspect ratio crop the centre, so that images have one size.

    Returns:
        Whether the processor was changed.
    """
    if processor.size.get("shortest_edge") is None or getattr(processor, "do_center_crop", None):
        return False
    height, width = output_size(processor)
    processor.do_center_crop, processor.crop_size = True, {"height": height, "width": width}
    return True


def settle_size(config: Any, processor: Any) -> dict[str, Any]:
    """Set an unset ``input_size`` of a model for any image size; return it as a setting.

    Args:
        config: configuration of this library, which is changed.
    """
    if not config.any_size or config.input_size is not None:
        return {}
    config.input_size = output_size(processor)
    return {"input_size": config.input_size}

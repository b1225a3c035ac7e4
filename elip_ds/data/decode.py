"""Encoded bytes -> an RGB image."""

import io

from PIL import Image


def decode_image(data: bytes) -> Image.Image:
    """RGB, transparency put on white. Raises OSError or ValueError for bytes that are no image."""
    image = Image.open(io.BytesIO(data))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image if image.mode == "RGB" else image.convert("RGB")

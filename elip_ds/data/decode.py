"""Encoded bytes -> an RGB image."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from elip_ds.data.record import BadSample


def decode_image(data: bytes) -> Image.Image:
    """RGB of 8 bits, transparency put on white. Raises BadSample for bytes that are no image."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()  # Pillow decodes no sooner than it must
        return to_rgb(image)
    except UnidentifiedImageError:
        raise BadSample(f"no image format has these {len(data)} bytes") from None
    except Exception as error:  # broken files make the decoders raise all sorts, struct.error say
        raise BadSample(f"cannot be decoded: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB of 8 bits, transparency put on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scaling
        levels = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")

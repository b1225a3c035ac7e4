"""An image as it goes into a shard: as it came where it can, made smaller where that is wanted."""

import io
import warnings
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from elip_ds.data.decode import to_rgb
from elip_ds.data.record import BadSample

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"Formats that shards hold; any other becomes a JPEG."


class Stored(NamedTuple):
    """size, original_size: width, height in pixels, as encoded; the second one before resizing."""

    data: bytes
    extension: str
    size: tuple[int, int]
    original_size: tuple[int, int]


def store_image(
    data: bytes, short_side: int | None = None, quality: int = 90, check: bool = True
) -> Stored:
    """short_side: of an image whose short side is longer.  check: decode what is copied, too.

    An image that is small enough is copied byte for byte. Raises BadSample for what is no image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd EXIF and the like; the pixels are what counts
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _store(data, short_side, quality, check)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise BadSample(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from None
        except UnidentifiedImageError:
            raise BadSample("no image") from None
        except Exception as error:  # broken files make the decoders raise all sorts
            raise BadSample(f"cannot be decoded: {error}") from None


def _store(data: bytes, short_side: int | None, quality: int, check: bool) -> Stored:
    image: Image.Image = Image.open(io.BytesIO(data))
    extension, size = EXTENSIONS.get(image.format or ""), image.size
    shrink = 1.0 if short_side is None else min(1.0, short_side / min(size))
    if extension is not None and shrink == 1:
        if check:
            image.load()
        return Stored(data, extension, size, size)
    # A JPEG decodes to a half, a quarter, ... in a fraction of the time; from twice the wanted size
    # on the resampling sees all that it needs.
    image.draft(None, (round(2 * size[0] * shrink), round(2 * size[1] * shrink)))
    image = to_rgb(ImageOps.exif_transpose(image))
    if shrink < 1:
        assert short_side is not None
        ratio = short_side / min(image.size)
        wanted = (max(short_side, round(side * ratio)) for side in image.size)
        image = image.resize((next(wanted), next(wanted)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Stored(buffer.getvalue(), "jpg", image.size, size)

"""Encoded bytes -> an RGB image. The header is read first, so that what is too large is not decoded
at all, and what is larger than a crop needs not whole.

JPEGs go through libjpeg-turbo's own interface (simplejpeg), which gives the levels that Pillow
gives, sooner, and can leave out the finer frequencies. What it does not take (inks, other formats,
harmless oddities) goes through Pillow.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from elip_ds.config.schema import DataConfig
from elip_ds.data.record import BadSample

SHRINKS = (1, 2, 4, 8)
"What a JPEG's sides can be divided by as it is decoded."
EXIF_REACH = 2**17
"Bytes in which a JPEG's orientation is looked for: it stands in one of the first segments."


class EncodedImage:
    """An image whose header was read; its pixels are decoded when asked for.

    width, height: of the upright image, in pixels.
    """

    def __init__(
        self, data: bytes, *, max_pixels: int = DataConfig.max_pixels, min_side: int = 1
    ) -> None:
        """Raises BadSample for bytes that are no image, and for too many pixels or too few."""
        self._data = data
        with _bad_sample(data):
            size = _jpeg_size(data)
            self._image = None if size else _open(data)
            width, height = size or self._image.size  # type: ignore[union-attr]
            if width * height > max_pixels:
                raise BadSample(f"more than {max_pixels} pixels", "size")
            if min(width, height) < min_side:
                raise BadSample(f"a side of less than {min_side} pixels", "size")
            # Only now: a PNG is decoded, which may have its tags behind its pixels.
            tagged = self._image or (_open(data) if b"Exif\0\0" in data[:EXIF_REACH] else None)
            self._orientation = _orientation(tagged) if tagged else 1
        lies = self._orientation >= 5
        self.width, self.height = (height, width) if lies else (width, height)

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """(H, W, 3) uint8, upright, transparency put on white.

        shrink: one of SHRINKS, which a JPEG's sides are divided by, rounded up. What is no JPEG
        comes whole, and so does a turned one whose sides it does not divide: the rounding would lie
        on the wrong side. Raises BadSample for damage, and for a JPEG that stops early.
        """
        assert shrink in SHRINKS, shrink
        with _bad_sample(self._data):
            if self._image is None:
                try:
                    return upright(self._decode_jpeg(shrink), self._orientation)
                except ValueError as error:
                    _check_whole(str(error))
            return np.array(to_rgb(self._image or _open(self._data)))

    def _decode_jpeg(self, shrink: int) -> np.ndarray:
        """As it lies. Raises ValueError for whatever libjpeg warns of."""
        turned = self._orientation > 1
        if shrink == 1 or (turned and (self.width % shrink or self.height % shrink)):
            return simplejpeg.decode_jpeg(self._data)
        sides = (-(-self.width // shrink), -(-self.height // shrink))
        width, height = sides[::-1] if self._orientation >= 5 else sides
        return simplejpeg.decode_jpeg(
            self._data, min_width=width, min_height=height, min_factor=shrink
        )


def decode_image(data: bytes) -> Image.Image:
    """RGB of 8 bits, upright, transparency put on white. Raises BadSample as EncodedImage does."""
    return Image.fromarray(EncodedImage(data).pixels())


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB of 8 bits, upright, transparency put on white."""
    orientation = _orientation(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scaling
        levels = np.asarray(image).astype(np.int64).clip(0, 2**16 - 1) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if orientation == 1 else Image.fromarray(upright(np.asarray(image), orientation))


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) as stored -> as it is to be seen. orientation: EXIF's, 1 to 8."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


@contextlib.contextmanager
def _bad_sample(data: bytes) -> Iterator[None]:
    try:
        yield
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, by the header
        raise BadSample(f"cannot be decoded: {error}", "size") from None
    except UnidentifiedImageError:
        raise BadSample(f"no image format has these {len(data)} bytes") from None
    except Exception as error:  # broken files make the decoders raise all sorts, struct.error say
        raise BadSample(f"cannot be decoded: {error}") from None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height, as stored, of a JPEG that simplejpeg makes RGB; None for all else."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # it is strict; Pillow may take it
        return None
    return (width, height) if colours in ("YCbCr", "RGB", "Gray") else None


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where there is none that makes sense."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # what a camera wrote badly is no reason to lose the picture
        return 1
    return orientation if orientation in range(1, 9) else 1


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():  # the caller has its own limit of pixels
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data))


def _check_whole(warning: str) -> None:
    """Raises BadSample for those of libjpeg's warnings after which a part of the image is grey.

    Pillow heeds none of them; what is left for it are bytes too many and odd headers.
    """
    if "remature end" in warning or "Huffman" in warning:
        raise BadSample(f"cannot be decoded: {warning}")

"""Every image becomes RGB."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_shards import png
from PIL import Image

from elip_ds.data.decode import decode_image
from elip_ds.data.record import BadSample

ORANGE = (200, 100, 50)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(data: bytes) -> tuple[int, ...]:
    """The colour of the picture's first pixel."""
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_colours_survive(kind: str) -> None:
    data = encode(Image.new("RGB", (8, 8), ORANGE), kind)
    assert colour(data) == pytest.approx(ORANGE, abs=6)


def test_grey_becomes_three_equal_channels() -> None:
    assert colour(encode(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert colour(encode(Image.new("1", (4, 4), 1))) == (255, 255, 255)


def test_ink_becomes_light() -> None:
    image = Image.new("RGB", (8, 8), ORANGE).convert("CMYK")
    assert colour(encode(image, "JPEG")) == pytest.approx(ORANGE, abs=6)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_put_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    assert colour(encode(image)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128)).convert(mode)
    assert colour(encode(half)) == pytest.approx((127, 127, 127), abs=1)


def test_a_palette_is_looked_up() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *ORANGE])
    assert colour(encode(image)) == ORANGE
    assert colour(encode(image, transparency=1)) == (255, 255, 255)
    assert colour(encode(image, transparency=0)) == ORANGE


def test_a_colour_may_be_declared_transparent() -> None:
    image = Image.new("RGB", (4, 4), ORANGE)
    assert colour(encode(image, transparency=ORANGE)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("level", "grey"), [(0, 0), (255, 0), (256, 1), (32768, 128), (65535, 255)]
)
def test_sixteen_bits_are_scaled_to_eight(level: int, grey: int) -> None:
    image = Image.fromarray(np.full((4, 4), level, dtype=np.uint16))
    assert image.mode == "I;16"
    assert colour(encode(image)) == (grey, grey, grey)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def test_sixteen_bits_a_colour_are_scaled_to_eight() -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    pixel = png_chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 51200, 25600, 12800)))
    data = b"\x89PNG\r\n\x1a\n" + header + pixel + png_chunk(b"IEND", b"")
    assert colour(data) == pytest.approx((200, 100, 50), abs=1)


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image(data: bytes) -> None:
    with pytest.raises(BadSample):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_image(kind: str) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    data = encode(image, kind)
    with pytest.raises(BadSample):
        decode_image(data[: len(data) // 2])


def test_an_image_too_large_to_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSample, match="decompression bomb"):
        decode_image(png(0))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=40), st.sampled_from(["PNG", "JPEG"]))
def test_a_damaged_image_is_an_image_or_a_bad_sample(at: int, data: bytes, kind: str) -> None:
    whole = encode(Image.new("RGB", (16, 16), ORANGE), kind)
    at %= len(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert decode_image(whole[:at] + data + whole[at + len(data) :]).mode == "RGB"
        except BadSample as error:
            assert str(error)

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
from PIL import Image, ImageOps

from elip_ds.data.decode import SHRINKS, EncodedImage, decode_image
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


def test_an_image_too_large_for_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSample, match="decompression bomb"):
        decode_image(png(0))


def claimed(width: int, height: int) -> dict[str, bytes]:
    """Images of a few bytes that say they are of such a size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    jpeg = bytearray(encode(Image.new("RGB", (8, 8), ORANGE), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", height, width)
    png_bytes = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"")
    return {"PNG": png_bytes, "JPEG": bytes(jpeg)}


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_of_too_many_pixels_is_refused_by_its_header(kind: str) -> None:
    with pytest.raises(BadSample, match="more than 24000000 pixels"):
        EncodedImage(claimed(12000, 9000)[kind])  # Pillow alone would warn
    with pytest.raises(BadSample, match="more than 5000 pixels"):
        EncodedImage(claimed(100, 51)[kind], max_pixels=5000)
    image = EncodedImage(claimed(100, 50)[kind], max_pixels=5000)
    assert (image.width, image.height) == (100, 50)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_of_too_few_pixels_is_refused(kind: str) -> None:
    data = encode(Image.new("RGB", (7, 100), ORANGE), kind)
    with pytest.raises(BadSample, match="a side of less than 8 pixels"):
        EncodedImage(data, min_side=8)
    assert EncodedImage(data, min_side=7).width == 7


def picture(width: int, height: int) -> Image.Image:
    """Smooth, and like none of its mirrors and turns."""
    small = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 30},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"keep_rgb": True},
        {"restart_marker_rows": 1},
    ],
    ids=str,
)
def test_a_jpeg_has_the_levels_that_pillow_gives(options: dict[str, object]) -> None:
    for mode in ("RGB", "L"):
        if mode == "L" and "keep_rgb" in options:
            continue
        data = encode(picture(61, 45).convert(mode), "JPEG", **options)
        theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (EncodedImage(data).pixels() == theirs).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_turned_image_is_put_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(40, 24), kind, exif=exif)
    image = EncodedImage(data)
    theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (image.width, image.height) == theirs.size
    assert (image.pixels() == np.asarray(theirs.convert("RGB"))).all()


def test_an_orientation_that_makes_no_sense_is_none() -> None:
    for value in (0, 9, 77):
        exif = Image.Exif()
        exif[0x0112] = value
        assert EncodedImage(encode(picture(40, 24), "JPEG", exif=exif)).width == 40
    data = encode(picture(40, 24), "JPEG", exif=b"Exif\0\0what is this")
    assert EncodedImage(data).pixels().shape == (24, 40, 3)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(SHRINKS), st.integers(1, 8))
def test_the_sides_of_a_jpeg_are_divided(
    width: int, height: int, shrink: int, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = EncodedImage(encode(picture(width, height), "JPEG", exif=exif))
    whole, divided = width % shrink or height % shrink, image.pixels(shrink).shape
    if orientation > 1 and whole:
        assert divided == (image.height, image.width, 3)
    else:
        assert divided == (-(-image.height // shrink), -(-image.width // shrink), 3)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("shrink", SHRINKS)
def test_a_shrunken_jpeg_is_the_mean_of_its_pixels(shrink: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = EncodedImage(encode(picture(400, 320), "JPEG", quality=95, exif=exif))
    high, wide = image.height // shrink, image.width // shrink
    blocks = image.pixels().reshape(high, shrink, wide, shrink, 3)
    assert np.abs(image.pixels(shrink) - blocks.mean((1, 3))).mean() < 1


def test_what_is_no_jpeg_comes_whole() -> None:
    assert EncodedImage(encode(picture(40, 24))).pixels(4).shape == (24, 40, 3)
    ink = encode(picture(40, 24).convert("CMYK"), "JPEG")
    assert EncodedImage(ink).pixels(4).shape == (24, 40, 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("shrink", [1, 2])
def test_a_jpeg_that_stops_early_is_no_grey_half(
    share: float, progressive: bool, shrink: int
) -> None:
    data = encode(picture(200, 160), "JPEG", quality=95, progressive=progressive)
    cut = data[: int(len(data) * share)]
    for cut_data in (cut, cut + b"\xff\xd9"):  # Pillow takes the second one
        if not progressive or cut_data == cut:
            with pytest.raises(BadSample, match="cannot be decoded"):
                EncodedImage(cut_data).pixels(shrink)


def test_bytes_too_many_do_no_harm() -> None:
    data = encode(picture(40, 24), "JPEG")
    whole = EncodedImage(data).pixels()
    for longer in (data + b"and more", data[:-2] + b"\0\0and more" + data[-2:]):
        assert (EncodedImage(longer).pixels() == whole).all()


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

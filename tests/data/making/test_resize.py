"""Images on their way into a shard."""

import io

import numpy as np
import pytest
from data.made_shards import png
from data.raw_files import jpeg
from PIL import Image

from elip_ds.data.making.resize import store_image
from elip_ds.data.record import BadSample


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_what_is_small_enough_is_copied(form: str) -> None:
    data = encoded(opened(png(0, (40, 30))), form)
    for short_side in (None, 30, 31):
        stored = store_image(data, short_side)
        assert stored == (data, {"JPEG": "jpg"}.get(form, form.lower()), (40, 30), (40, 30))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((40, 30), (27, 20)), ((30, 40), (20, 27)), ((21, 900), (20, 857)), ((21, 21), (20, 20))],
)
def test_a_larger_one_keeps_its_aspect(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    stored = store_image(jpeg(0, size), 20)
    assert (stored.size, stored.original_size, stored.extension) == (wanted, size, "jpg")
    image = opened(stored.data)
    assert (image.size, image.format, image.mode) == (wanted, "JPEG", "RGB")


def test_the_shortcut_in_decoding_is_not_seen() -> None:
    down, across = np.mgrid[0:480, 0:640]
    waves = 127 + 60 * np.sin(across / 25) + 60 * np.cos(down / 40)
    image = Image.fromarray(np.stack([waves] * 3, -1).astype(np.uint8))
    stored = store_image(encoded(image, "JPEG", quality=95), 60, quality=95)
    plain = image.resize((80, 60), Image.Resampling.LANCZOS)
    difference = np.asarray(opened(stored.data), int) - np.asarray(plain, int)
    assert np.abs(difference).mean() < 1.0 and np.abs(difference).max() <= 8


def test_quality_decides_the_bytes_of_what_is_made_anew() -> None:
    small, large = (store_image(jpeg(0, (64, 64)), 32, quality) for quality in (30, 95))
    assert len(small.data) < len(large.data)


def test_a_turned_photo_is_stored_upright() -> None:
    image = Image.new("RGB", (60, 40), "white")
    image.paste("black", (0, 0, 60, 10))  # its top, which is the right side when it is turned
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    stored = store_image(encoded(image, "JPEG", exif=exif), 20)
    assert stored.size == (20, 30)
    pixels = np.asarray(opened(stored.data).convert("L"))
    assert pixels[:, -3:].max() < 60 and pixels[:, :10].min() > 200
    assert opened(stored.data).getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(("form", "mode"), [("GIF", "P"), ("BMP", "RGB"), ("TIFF", "I;16")])
def test_other_formats_become_jpegs(form: str, mode: str) -> None:
    data = encoded(Image.new(mode, (30, 20)), form)
    stored = store_image(data)
    assert (stored.extension, stored.size) == ("jpg", (30, 20))
    assert opened(stored.data).format == "JPEG"


def test_transparency_lies_on_white() -> None:
    data = encoded(Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "PNG")
    assert np.asarray(opened(store_image(data, 20).data)).min() > 250


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "no image"), (b"<html>404</html>", "no image"), (jpeg(0)[:-200], "cannot be decoded: ")],
)
def test_what_is_no_image_is_told(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        store_image(data)


def test_without_a_check_only_the_header_is_read() -> None:
    broken = jpeg(0, (100, 100))[:-500]
    assert store_image(broken, check=False).data == broken
    with pytest.raises(BadSample, match="cannot be decoded"):
        store_image(broken, 50, check=False)


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [jpeg(0, size) for size in ((24, 16), (100, 100))]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    for image in images:
        with pytest.raises(BadSample, match="more than 300 pixels"):
            store_image(image, check=False)

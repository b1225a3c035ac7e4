"""Crops and mirrors that depend on their key alone."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from elip_ds.config.schema import DataConfig, RandAugmentConfig
from elip_ds.data.augment import (
    BANNER,
    Box,
    eval_image,
    keyed_generator,
    random_box,
    shrink_for,
    shrunk,
    sized,
    train_image,
)
from elip_ds.data.decode import EncodedImage
from elip_ds.data.rand_augment import rand_augment

SIDES = st.integers(1, 300)
SCALES = st.sampled_from([[0.2, 1.0], [0.9, 1.0], [0.01, 0.02], [1.0, 1.0]])


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> EncodedImage:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return EncodedImage(buffer.getvalue())


def config(**changed: object) -> DataConfig:
    return replace(DataConfig(), **changed)


@settings(deadline=None, derandomize=True)
@given(SIDES, SIDES, SCALES, st.integers(0, 10**6))
def test_a_crop_lies_inside_the_image(
    width: int, height: int, scale: list[float], seed: int
) -> None:
    left, top, right, bottom = random_box(width, height, keyed_generator(seed), scale)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_a_crop_keeps_to_its_area_and_aspect() -> None:
    rng = keyed_generator(0)
    for _ in range(200):
        left, top, right, bottom = random_box(300, 300, rng, [0.2, 0.5])
        width, height = right - left, bottom - top
        assert 0.19 < width * height / 300**2 < 0.51
        assert 0.74 < width / height < 1.35


def test_an_image_too_narrow_for_any_crop_is_cut_in_its_middle() -> None:
    assert random_box(10, 1000, keyed_generator(0), [1.0, 1.0]) == (0, 493, 10, 506)
    assert random_box(1000, 10, keyed_generator(0), [1.0, 1.0]) == (493, 0, 506, 10)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(SIDES, SIDES, st.integers(0, 10**6), st.booleans(), st.sampled_from(["fast", "exact"]))
def test_both_transforms_give_squares(
    width: int, height: int, seed: int, flip: bool, decode: str
) -> None:
    image = gradient(width, height)
    options = config(flip=flip, decode=decode)
    train = train_image(encoded(image), (16, 16), keyed_generator(seed), options)
    for pixels in (train, eval_image(image, (16, 16))):
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize("resize", ["squash", "center_crop"])
def test_sizes_are_height_and_width(resize: str) -> None:
    image = gradient(90, 60)
    assert eval_image(image, (12, 30), resize).shape == (12, 30, 3)
    for scale in ([0.2, 1.0], None):
        options = config(crop_scale=scale, resize=resize)
        pixels = train_image(encoded(image), (12, 30), keyed_generator(0), options)
        assert pixels.shape == (12, 30, 3)


@pytest.mark.slow  # torchvision takes its time to load
@settings(deadline=None, derandomize=True, max_examples=100)
@given(SIDES, SIDES, st.integers(1, 64), st.integers(0, 10**6))
@example(69, 292, 225, 0)
@example(250, 15, 225, 0)
def test_a_test_image_is_cropped_as_torchvision_does(
    width: int, height: int, size: int, seed: int
) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    if max(width, height) > BANNER * min(width, height):
        return
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])(image)
    assert (eval_image(image, (size, size), "center_crop") == np.asarray(theirs)).all()


@settings(deadline=None, derandomize=True, max_examples=50)
@given(SIDES, SIDES, st.integers(1, 48), st.integers(1, 48))
def test_a_crop_keeps_the_aspect_and_the_middle(
    width: int, height: int, high: int, wide: int
) -> None:
    pixels = eval_image(gradient(width, height), (high, wide), "center_crop").astype(int)
    assert pixels.shape == (high, wide, 3)
    if min(width, height, high, wide) > 8:
        red, green = pixels[0, [0, -1], 0], pixels[[0, -1], 0, 1]
        assert abs(red.sum() - 255) < 26 and abs(green.sum() - 255) < 26


def test_a_squashed_image_is_whole() -> None:
    image = gradient(90, 30)
    squashed = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert (eval_image(image, (16, 16)) == squashed).all()
    cropped = eval_image(image, (16, 16), "center_crop").astype(int)
    assert np.ptp(cropped[..., 0]) < 100 < np.ptp(squashed[..., 0].astype(int))


def test_a_banner_is_not_scaled_whole() -> None:
    image = gradient(1, 30000)
    pixels = eval_image(image, (224, 224), "center_crop")
    assert pixels.shape == (224, 224, 3) and abs(int(pixels[112, 0, 1]) - 127) <= 1


def test_without_a_crop_training_images_are_sized_as_test_images() -> None:
    image = gradient(90, 30)
    for resize in ("squash", "center_crop"):
        plain = eval_image(image, (16, 16), resize)
        options = config(crop_scale=None, resize=resize, decode="exact")
        shown = [
            train_image(
                encoded(image), (16, 16), keyed_generator(seed), replace(options, flip=seed > 9)
            )
            for seed in range(20)
        ]
        assert all((pixels == plain).all() for pixels in shown[:10])
        mirrored = [not (pixels == plain).all() for pixels in shown[10:]]
        assert any(mirrored) and not all(mirrored)


def test_half_of_the_images_are_mirrored() -> None:
    image, mirrored = encoded(gradient(64, 64)), 0
    flipping = config(crop_scale=[0.9, 1.0])
    for seed in range(200):
        pixels = train_image(image, (16, 16), keyed_generator(seed), flipping)
        mirrored += int(pixels[8, 0, 0] > pixels[8, -1, 0])
        straight = train_image(
            image, (16, 16), keyed_generator(seed), replace(flipping, flip=False)
        )
        assert straight[8, 0, 0] < straight[8, -1, 0]
    assert 70 < mirrored < 130


def test_a_generator_depends_on_all_its_words() -> None:
    draws = [keyed_generator(*words).random() for words in ((1, 2), (2, 1), (1, -2), (1,), (1, 2))]
    assert len(set(draws)) == 4 and draws[0] == draws[-1]


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Box, tuple[int, int]]:
    """A box and the size of an image that it lies in, width and height."""
    width, height = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    box = left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    return box, (width, height)


@settings(deadline=None, derandomize=True)
@given(boxes(), st.tuples(st.integers(1, 400), st.integers(1, 400)))
def test_a_shrunken_box_sees_the_same_within_half_a_target_pixel(
    drawn: tuple[Box, tuple[int, int]], size: tuple[int, int]
) -> None:
    box, (width, height) = drawn
    shrink = shrink_for(box, size)
    small = shrunk(box, shrink)
    assert 0 <= small[0] < small[2] <= -(-width // shrink)
    assert 0 <= small[1] < small[3] <= -(-height // shrink)
    if shrink > 1:
        across, down = (box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]
        assert min(across, down) >= shrink
        for edge, found, pixel in zip(box, small, (across, down, across, down), strict=True):
            assert abs(found * shrink - edge) <= pixel / 2
    twice = 2 * shrink
    fits = (box[3] - box[1]) / twice >= size[0] and (box[2] - box[0]) / twice >= size[1]
    assert shrink == 8 or not fits


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SIDES, SIDES, st.integers(1, 64), st.integers(1, 64), st.integers(0, 10**6))
def test_torch_sizes_as_pillow_does(width: int, height: int, h: int, w: int, seed: int) -> None:
    box = random_box(width, height, keyed_generator(seed), [0.2, 1.0])
    pixels = noise(width, height) // 3 + 80  # bicubic overshoots, but not as far as to be clipped
    fast, exact = (sized(pixels, box, (h, w), fast=fast).astype(int) for fast in (True, False))
    assert np.abs(fast - exact).max() <= 2


def test_nothing_outside_the_box_has_a_part() -> None:
    inside, outside = noise(60, 60), noise(60, 60)
    outside[:10], outside[:, 40:] = 0, 255
    for fast in (True, False):
        a, b = (sized(pixels, (5, 10, 40, 60), (16, 16), fast=fast) for pixels in (inside, outside))
        assert (a == b).all()


@pytest.mark.slow  # torchvision takes its time to load
@settings(deadline=None, derandomize=True, max_examples=100)
@given(SIDES, SIDES, st.integers(1, 64), st.integers(0, 10**6))
def test_an_exact_crop_is_that_of_torchvision(
    width: int, height: int, size: int, seed: int
) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    pixels = noise(width, height)
    left, top, right, bottom = random_box(width, height, keyed_generator(seed), [0.2, 1.0])
    theirs = resized_crop(
        Image.fromarray(pixels),
        *(top, left, bottom - top, right - left),
        [size, size],
        InterpolationMode.BICUBIC,
    )
    ours = train_image(
        encoded(Image.fromarray(pixels)),
        (size, size),
        keyed_generator(seed),
        config(flip=False, decode="exact"),
    )
    assert (ours == np.asarray(theirs)).all()


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(100, 300), st.integers(100, 300), st.integers(0, 10**6), st.integers(1, 8))
def test_a_shrunken_photograph_shows_what_the_exact_one_does(
    width: int, height: int, seed: int, orientation: int
) -> None:
    """On a gradient half a pixel of the target is few levels, and a wrong place or turn many."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encoded(gradient(width, height), "JPEG", quality=95, exif=exif)
    options = config(crop_scale=[0.5, 1.0])
    fast, exact = (
        train_image(image, (24, 24), keyed_generator(seed), replace(options, decode=decode))
        for decode in ("fast", "exact")
    )
    assert np.abs(fast.astype(int) - exact).max() <= 8


@pytest.mark.parametrize("kind", ["albef", "meter"])
@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_a_key_alone_decides_what_is_shown(kind: str, decode: str) -> None:
    options = config(rand_augment=RandAugmentConfig(kind=kind), decode=decode)
    image = encoded(Image.fromarray(noise(90, 60)), "JPEG")
    shown = [train_image(image, (16, 24), keyed_generator(seed), options) for seed in (1, 2, 1)]
    assert (shown[0] == shown[2]).all() and not (shown[0] == shown[1]).all()
    assert shown[0].shape == (16, 24, 3) and shown[0].dtype == np.uint8


@pytest.mark.parametrize("kind", ["albef", "meter"])
def test_changes_come_after_the_mirror_or_before_the_sizing(kind: str) -> None:
    pixels, size = noise(90, 60), (16, 24)
    changes = RandAugmentConfig(kind=kind, ops=3)
    options = config(crop_scale=None, rand_augment=changes, decode="exact")
    for seed in range(10):
        rng, expected = keyed_generator(seed), pixels
        if kind == "meter":
            expected = rand_augment(expected, rng, **vars(changes))
        expected = eval_image(Image.fromarray(expected), size)
        expected = expected[:, ::-1] if rng.random() < 0.5 else expected
        if kind == "albef":
            expected = rand_augment(expected, rng, **vars(changes))
        image = encoded(Image.fromarray(pixels))
        assert (train_image(image, size, keyed_generator(seed), options) == expected).all()

"""Crops and mirrors that depend on their key alone."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from elip_ds.data.augment import BANNER, eval_image, keyed_generator, random_box, train_image

SIDES = st.integers(1, 300)
SCALES = st.sampled_from([[0.2, 1.0], [0.9, 1.0], [0.01, 0.02], [1.0, 1.0]])


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


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
@given(SIDES, SIDES, st.integers(0, 10**6), st.booleans())
def test_both_transforms_give_squares(width: int, height: int, seed: int, flip: bool) -> None:
    image = gradient(width, height)
    train = train_image(image, (16, 16), keyed_generator(seed), scale=[0.2, 1.0], flip=flip)
    for pixels in (train, eval_image(image, (16, 16))):
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize("resize", ["squash", "center_crop"])
def test_sizes_are_height_and_width(resize: str) -> None:
    image = gradient(90, 60)
    assert eval_image(image, (12, 30), resize).shape == (12, 30, 3)
    for scale in ([0.2, 1.0], None):
        rng = keyed_generator(0)
        pixels = train_image(image, (12, 30), rng, scale=scale, flip=True, resize=resize)
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
        shown = [
            train_image(image, (16, 16), keyed_generator(s), scale=None, flip=s > 9, resize=resize)
            for s in range(20)
        ]
        assert all((pixels == plain).all() for pixels in shown[:10])
        mirrored = [not (pixels == plain).all() for pixels in shown[10:]]
        assert any(mirrored) and not all(mirrored)


def test_half_of_the_images_are_mirrored() -> None:
    image, mirrored = gradient(64, 64), 0
    for seed in range(200):
        pixels = train_image(image, (16, 16), keyed_generator(seed), scale=[0.9, 1.0], flip=True)
        mirrored += int(pixels[8, 0, 0] > pixels[8, -1, 0])
        straight = train_image(image, (16, 16), keyed_generator(seed), scale=[0.9, 1.0], flip=False)
        assert straight[8, 0, 0] < straight[8, -1, 0]
    assert 70 < mirrored < 130


def test_a_generator_depends_on_all_its_words() -> None:
    draws = [keyed_generator(*words).random() for words in ((1, 2), (2, 1), (1, -2), (1,), (1, 2))]
    assert len(set(draws)) == 4 and draws[0] == draws[-1]

"""Crops and mirrors that depend on their key alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from elip_ds.data.augment import eval_image, keyed_generator, random_box, train_image

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
    train = train_image(image, 16, keyed_generator(seed), scale=[0.2, 1.0], flip=flip)
    for pixels in (train, eval_image(image, 16)):
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8


def test_half_of_the_images_are_mirrored() -> None:
    image, mirrored = gradient(64, 64), 0
    for seed in range(200):
        pixels = train_image(image, 16, keyed_generator(seed), scale=[0.9, 1.0], flip=True)
        mirrored += int(pixels[8, 0, 0] > pixels[8, -1, 0])
        straight = train_image(image, 16, keyed_generator(seed), scale=[0.9, 1.0], flip=False)
        assert straight[8, 0, 0] < straight[8, -1, 0]
    assert 70 < mirrored < 130


def test_a_generator_depends_on_all_its_words() -> None:
    draws = [keyed_generator(*words).random() for words in ((1, 2), (2, 1), (1, -2), (1,), (1, 2))]
    assert len(set(draws)) == 4 and draws[0] == draws[-1]

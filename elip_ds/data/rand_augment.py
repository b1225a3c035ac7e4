"""RandAugment as the published code draws it: some operations, each of a set strength.

"albef" is ALBEF's and BLIP's, after crop and mirror; "meter" is METER's clip_randaug, before the
image is sized. The operations are Pillow's, or equal to Pillow's. Source: the forks' randaugment
modules, by the project's model specification.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = (128, 128, 128)

Operation = Callable[[Image.Image, float], Image.Image]


def identity(image: Image.Image, _: float) -> Image.Image:
    return image


def autocontrast(image: Image.Image, _: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, _: float) -> Image.Image:
    return ImageOps.equalize(image)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def colour(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Pillow's ImageEnhance.Sharpness to the bit, four times as fast; the border stays.

    # differs from ALBEF: levels above 255 stay there, and do not begin at 0 again.
    """
    pixels = np.array(image)
    if min(pixels.shape[:2]) < 3:
        return image
    wide = pixels.astype(np.uint16)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    middle = wide[1:-1, 1:-1]
    around = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * middle
    smooth = ((around + 6) // 13).astype(np.float32)
    pixels[1:-1, 1:-1] = np.clip(smooth + np.float32(factor) * (middle - smooth), 0, 255)
    return Image.fromarray(pixels)


def posterize(image: Image.Image, bits: float) -> Image.Image:
    return ImageOps.posterize(image, max(1, int(bits)))


def solarize(image: Image.Image, threshold: float) -> Image.Image:
    return ImageOps.solarize(image, math.ceil(threshold))


def solarize_add(image: Image.Image, addition: float) -> Image.Image:
    """Lighter by so many levels, and then those from 128 on reversed."""
    lighter = [min(255, int(level + addition)) for level in range(256)]
    return image.point([level if level < 128 else 255 - level for level in lighter] * 3)


def shear_x(image: Image.Image, slope: float) -> Image.Image:
    """Rows shifted to the right in proportion to their number, on grey, between pixels.

    As OpenCV's warpAffine within a level. Pillow's transform takes four times as long and does not
    mix the edge with the grey.
    """
    return Image.fromarray(_sheared(np.asarray(image), slope))


def shear_y(image: Image.Image, slope: float) -> Image.Image:
    """Columns shifted down in proportion to their number, as in shear_x."""
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    return shear_x(turned, slope).transpose(Image.Transpose.TRANSPOSE)


def _sheared(pixels: np.ndarray, slope: float) -> np.ndarray:
    """(H, W, 3) uint8, its row i moved by slope * i."""
    height, width, _ = pixels.shape
    shifts = slope * np.arange(height)
    whole = np.floor(shifts).astype(np.int64)
    part = np.rint((shifts - whole) * 256).astype(np.uint16)[:, None, None]
    room = int(np.abs(whole).max()) + 1
    wide = np.full((height, width + 2 * room, 3), GREY, dtype=np.uint8)
    wide[:, room : room + width] = pixels
    cut = np.empty((height, width + 1, 3), dtype=np.uint16)
    steps = [0, *(np.flatnonzero(np.diff(whole)) + 1), height]
    for first, last in itertools.pairwise(steps):  # rows that move by the same whole pixels
        left = room - 1 - whole[first]
        cut[first:last] = wide[first:last, left : left + width + 1]
    mixed = cut[:, 1:] * (256 - part) + cut[:, :-1] * part
    return ((mixed + 128) >> 8).astype(np.uint8)


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """About the middle, counter-clockwise, on grey, between pixels."""
    return image.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=GREY)


def translate_x(image: Image.Image, pixels: float) -> Image.Image:
    """To the right, by whole pixels, on grey."""
    return _shifted(image, round(pixels), 0)


def translate_y(image: Image.Image, pixels: float) -> Image.Image:
    """Down, by whole pixels, on grey."""
    return _shifted(image, 0, round(pixels))


def _shifted(image: Image.Image, right: int, down: int) -> Image.Image:
    shifted = Image.new("RGB", image.size, GREY)
    shifted.paste(image, (right, down))
    return shifted


# METER's, on black, of the nearest pixel. The numbers say which place a pixel's level comes from.


def rotate_nearest(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees)


def shear_x_nearest(image: Image.Image, slope: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, slope, 0, 0, 1, 0))


def shear_y_nearest(image: Image.Image, slope: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, slope, 1, 0))


def translate_x_nearest(image: Image.Image, pixels: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, pixels, 0, 1, 0))


def translate_y_nearest(image: Image.Image, pixels: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, pixels))


class Drawn(NamedTuple):
    """strength: from low to high, as magnitude goes from 0 to its most; negative half of the time
    if signed.
    """

    operation: Operation
    low: float = 0
    high: float = 0
    signed: bool = False


KINDS: dict[str, tuple[list[Drawn], int, float]] = {
    "albef": (
        [
            Drawn(identity),
            Drawn(autocontrast),
            Drawn(equalize),
            Drawn(brightness, 0.1, 1.9),
            Drawn(sharpness, 0.1, 1.9),
            Drawn(shear_x, 0, 0.3, True),
            Drawn(shear_y, 0, 0.3, True),
            Drawn(translate_x, 0, 10, True),
            Drawn(translate_y, 0, 10, True),
            Drawn(rotate, 0, 30, True),
        ],
        10,
        0.5,
    ),
    "meter": (
        [
            Drawn(autocontrast),
            Drawn(equalize),
            Drawn(rotate_nearest, 0, 30, True),
            Drawn(posterize, 0, 4),
            Drawn(solarize, 0, 256),
            Drawn(solarize_add, 0, 110),
            Drawn(colour, 0.1, 1.9),
            Drawn(contrast, 0.1, 1.9),
            Drawn(brightness, 0.1, 1.9),
            Drawn(sharpness, 0.1, 1.9),
            Drawn(shear_x_nearest, 0, 0.3, True),
            Drawn(shear_y_nearest, 0, 0.3, True),
            Drawn(translate_x_nearest, 0, 100, True),
            Drawn(translate_y_nearest, 0, 100, True),
        ],
        30,
        1.0,
    ),
}
"What is drawn from, the largest magnitude, and the probability that a drawn operation is applied."


def rand_augment(
    pixels: np.ndarray, rng: np.random.Generator, *, kind: str, ops: int, magnitude: float
) -> np.ndarray:
    """(H, W, 3) uint8 -> the same shape, by so many operations drawn from a kind's."""
    choices, most, probability = KINDS[kind]
    drawn = [choices[i] for i in rng.integers(len(choices), size=ops)]
    chance, sign = rng.random((2, ops))
    applied, negative = chance < probability, sign < 0.5
    if not applied.any():
        return pixels
    image = Image.fromarray(pixels)
    for i in np.flatnonzero(applied):
        operation, low, high, signed = drawn[i]
        strength = low + (high - low) * magnitude / most
        image = operation(image, -strength if signed and negative[i] else strength)
    return np.array(image)

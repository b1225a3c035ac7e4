"""Image transforms: a random crop and mirror for training, a plain resize for testing.

Images stay uint8; normalisation happens on the device (batch.py). Randomness comes from a generator
that the caller keys by sample and epoch, so it does not depend on workers or ranks.
"""

import math

import numpy as np
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"CLIP's statistics, which ALBEF, BLIP, METER and CLIP all use."


def keyed_generator(*words: int) -> np.random.Generator:
    """A generator that depends on nothing but these numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([w % 2**64 for w in words])))


def train_image(
    image: Image.Image, size: int, rng: np.random.Generator, *, scale: list[float], flip: bool
) -> np.ndarray:
    """A crop of random area (share in scale) and aspect (3/4..4/3) -> (size, size, 3) uint8."""
    box = random_box(image.width, image.height, rng, scale)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def eval_image(image: Image.Image, size: int) -> np.ndarray:
    """Resized to exactly (size, size, 3) uint8, whatever its aspect, as ALBEF and BLIP do."""
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC))


def random_box(
    width: int, height: int, rng: np.random.Generator, scale: list[float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) as RandomResizedCrop draws it: ten tries, then a central crop."""
    smallest, largest = scale
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * rng.uniform(smallest, largest)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h

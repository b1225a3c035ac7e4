"""Image transforms: a random crop and mirror for training, a plain resize or crop for testing.

Images stay uint8; normalisation happens on the device (batch.py). Randomness comes from a generator
that the caller keys by sample and epoch, so it does not depend on workers or ranks.
"""

import math

import numpy as np
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"CLIP's statistics, which ALBEF, BLIP, METER and CLIP all use."

BANNER = 100
"Of an image longer than so many times its other side only the middle is scaled: memory is finite."


def keyed_generator(*words: int) -> np.random.Generator:
    """A generator that depends on nothing but these numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([w % 2**64 for w in words])))


def train_image(
    image: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: list[float] | None,
    flip: bool,
    resize: str = "squash",
) -> np.ndarray:
    """A crop of random area (share in scale) and aspect (3/4..4/3), half of them mirrored.

    size: height, width.  scale: None crops nothing at random and sizes as eval_image does.
    Returns (H, W, 3) uint8.
    """
    if scale is None:
        pixels = eval_image(image, size, resize)
    else:
        box = random_box(image.width, image.height, rng, scale)
        pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box))
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def eval_image(image: Image.Image, size: tuple[int, int], resize: str = "squash") -> np.ndarray:
    """An RGB image -> (H, W, 3) uint8. size: height, width.

    resize: "squash" gives up the aspect, as ALBEF and BLIP do; "center_crop" scales the image until
    it just covers the size and cuts off the rest on both sides, as METER and CLIP do.
    """
    if resize == "squash":
        return np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))
    assert resize == "center_crop", resize
    h, w = size
    width, height = min(image.width, BANNER * image.height), min(image.height, BANNER * image.width)
    image = _cut_center(image, width, height)
    # One side as wanted, the other as long as the aspect makes it, rounded down: torchvision's way.
    fits = w * height >= h * width
    scaled = (w, w * height // width) if fits else (h * width // height, h)
    return np.array(_cut_center(image.resize(scaled, Image.Resampling.BICUBIC), w, h))


def _cut_center(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


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

"""Image transforms: a random crop and mirror for training, a plain resize or crop for testing.

Images stay uint8; normalisation happens on the device (batch.py). Randomness comes from a generator
that the caller keys by sample and epoch, so it does not depend on workers or ranks.

Test images are decoded whole and sized by Pillow, as the published transforms do it, to the last
bit. Training images need not be (data.decode): fast, a JPEG that is larger than its crop asks for
is decoded at a half, a quarter or an eighth, and torch sizes it.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from elip_ds.config.schema import DataConfig
from elip_ds.data.decode import SHRINKS, EncodedImage
from elip_ds.data.rand_augment import rand_augment

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"CLIP's statistics, which ALBEF, BLIP, METER and CLIP all use."

BANNER = 100
"Of an image longer than so many times its other side only the middle is scaled: memory is finite."

Box = tuple[int, int, int, int]
"Left, top, right, bottom, in pixels."


def keyed_generator(*words: int) -> np.random.Generator:
    """A generator that depends on nothing but these numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([w % 2**64 for w in words])))


def train_image(
    image: EncodedImage, size: tuple[int, int], rng: np.random.Generator, config: DataConfig
) -> np.ndarray:
    """A crop of random area and aspect (3/4..4/3), half of them mirrored, with RandAugment.

    size: height, width.  config: which of these, and how. With crop_scale null nothing is cropped
    at random, and the size comes about as in eval_image.
    Returns (H, W, 3) uint8. Raises BadSample as EncodedImage does.
    """
    fast, changes = config.decode == "fast", config.rand_augment
    before = changes is not None and changes.kind == "meter"
    if config.crop_scale is not None:
        box, scaled = random_box(image.width, image.height, rng, config.crop_scale), size
    else:
        box, scaled = frame(image.width, image.height, size, config.resize)
    shrink = shrink_for(box, scaled) if fast and not before else 1
    pixels = image.pixels(shrink)
    if pixels.shape[1] < image.width:  # else it came whole
        box = shrunk(box, shrink)
    if changes is not None and before:
        pixels = rand_augment(pixels, rng, **vars(changes))
    pixels = _middle(sized(pixels, box, scaled, fast=fast), size)
    if config.flip and rng.random() < 0.5:
        pixels = torch.from_numpy(pixels).flip(1).numpy()  # numpy mirrors byte by byte
    if changes is not None and not before:
        pixels = rand_augment(pixels, rng, **vars(changes))
    return pixels


def eval_image(image: Image.Image, size: tuple[int, int], resize: str = "squash") -> np.ndarray:
    """An RGB image -> (H, W, 3) uint8. size: height, width.

    resize: "squash" gives up the aspect, as ALBEF and BLIP do; "center_crop" scales the image until
    it just covers the size and cuts off the rest on both sides, as METER and CLIP do.
    """
    box, scaled = frame(image.width, image.height, size, resize)
    return _middle(sized(np.asarray(image), box, scaled, fast=False), size)


def sized(pixels: np.ndarray, box: Box, size: tuple[int, int], *, fast: bool) -> np.ndarray:
    """The box of (H, W, 3) uint8, bicubic with antialiasing, nothing outside the box having a part.

    size: height, width.  fast: by torch, within two levels of Pillow, or more where black and white
    lie side by side: between the two directions both clip what overshoots.
    """
    left, top, right, bottom = box
    cut = np.ascontiguousarray(pixels[top:bottom, left:right])  # a view takes torch longer
    if not fast:
        return np.array(Image.fromarray(cut).resize(size[::-1], Image.Resampling.BICUBIC))
    # As a batch of one in this order of memory; torch then works, and answers, in the same.
    channels = torch.from_numpy(cut)[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(channels, size=size, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def shrink_for(box: Box, size: tuple[int, int]) -> int:
    """The largest of SHRINKS after which the box has no fewer pixels than size on both sides."""
    left, top, right, bottom = box
    enough = min((bottom - top) / size[0], (right - left) / size[1])
    return max(shrink for shrink in SHRINKS if shrink <= max(enough, 1))


def shrunk(box: Box, shrink: int) -> Box:
    """The box on an image of sides divided by shrink, its edges at most half a pixel away there."""
    left, top, right, bottom = (int(edge / shrink + 0.5) for edge in box)
    return left, top, right, bottom


def frame(
    width: int, height: int, size: tuple[int, int], resize: str
) -> tuple[Box, tuple[int, int]]:
    """What of an image is scaled, and to which height and width.

    center_crop: all but the ends of a banner; one side as wanted and the other as long as the
    aspect makes it, rounded down, which is torchvision's way.
    """
    if resize == "squash":
        return (0, 0, width, height), size
    assert resize == "center_crop", resize
    h, w = size
    wide, high = min(width, BANNER * height), min(height, BANNER * width)
    left, top = round((width - wide) / 2), round((height - high) / 2)
    scaled = (w * high // wide, w) if w * high >= h * wide else (h, h * wide // high)
    return (left, top, left + wide, top + high), scaled


def _middle(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) -> size around its centre."""
    top, left = round((pixels.shape[0] - size[0]) / 2), round((pixels.shape[1] - size[1]) / 2)
    return pixels[top : top + size[0], left : left + size[1]]


def random_box(width: int, height: int, rng: np.random.Generator, scale: list[float]) -> Box:
    """As RandomResizedCrop draws it: ten tries, then a central crop."""
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

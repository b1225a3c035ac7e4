"""The built-in source: pictures of one to three shapes, with captions that are true of them.

In: a split, a count and a seed; no files.  Out: Records with JPEG bytes, one or two captions each,
and in `meta` what was drawn and where, so that pruning can be checked against the boxes.

A scene is a set of objects, each with a shape, colour, size and texture, on a grey background with
gradient, noise and strokes that no caption mentions.  Objects never overlap and no two of a scene
share both colour and shape.  A caption names every object by colour and shape, never leaves out a
texture other than plain, leaves out a size now and then, and states one spatial relation.

The splits are disjoint by construction: a hash of a scene's objects, which no seed changes, puts
every set of objects into exactly one split, so not even a rearrangement crosses over.  Within val
no description (objects and relations) comes twice.

Source: our own; the idea of drawn shapes with relations is that of CLEVR, arXiv:1612.06890.
"""

import hashlib
import io
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from elip_ds.data.record import Record

SPLITS = ("train", "val")
MIN_IMAGE_SIZE = 48  # pixels; below this a small object has no texture and hardly a shape
MAX_WORDS = 24

# The first word is the canonical one, as found in meta; captions use any of them.
COLOURS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
}
SHAPES = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
    "diamond": ("diamond", "rhombus"),
}
SIZES = {"large": ("large", "big", "huge"), "small": ("small", "tiny", "little")}
TEXTURES = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "with stripes"),
    "dotted": ("dotted", "spotted", "with dots"),
}
RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
CONVERSES = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}

RGB = {
    "red": (214, 32, 44),
    "orange": (250, 138, 24),
    "yellow": (242, 220, 48),
    "green": (36, 152, 62),
    "cyan": (64, 214, 220),
    "blue": (36, 72, 214),
    "purple": (124, 40, 172),
    "pink": (248, 136, 190),
}
DIAMETERS = {"large": (0.26, 0.38), "small": (0.14, 0.19)}  # longer side of the box / image side

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom excluded
Relation = tuple[int, str, int]  # objects[i] is <word> objects[j]

_OBJECT_COUNTS, _OBJECT_COUNT_WEIGHTS = (1, 2, 3), (15, 65, 20)
_TEXTURE_WEIGHTS = (2, 1, 1)
_SAY_SIZE_RATIO = 0.85
_SAY_PLAIN_RATIO = 0.3
_SECOND_CAPTION_RATIO = 0.7
_MARGIN = 2  # pixels of background kept around every object

_ONE = ("{a}", "there is {a}", "only {a}", "one shape: {a}", "a picture of {a}")
_TWO = (
    "{a} {relation} {b}",
    "there is {a} {relation} {b}",
    "{relation} {b} there is {a}",
    "{b} and {beside} {a}",
    "two shapes: {a} {relation} {b}",
    "a picture of {a} {relation} {b}",
)
_THREE = (
    "{a} {relation} {b}, also {c}",
    "{c}, and {a} {relation} {b}",
    "there is {c}, and {relation} {b} is {a}",
    "{b} and {beside} {a}, also {c}",
    "three shapes: {c}, and {a} {relation} {b}",
)
_BESIDE = {
    "left of": ("to its left", "on its left"),
    "right of": ("to its right", "on its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it", "beneath it"),
}


@dataclass(frozen=True)
class SceneObject:
    """What captions can say of an object, in canonical words."""

    size: str
    colour: str
    texture: str
    shape: str


def scenes(
    split: str, count: int, *, seed: int = 0, image_size: int = 96, start: int = 0
) -> Iterator[Record]:
    """The first `count` records of a split; a longer run starts with the records of a shorter one.

    start: of these, how many are left out at the beginning.

    image_size: side of the square picture in pixels, at least 48.
    At one image_size, record i of train depends on (seed, i) alone.  So does record i of val, but
    it is drawn again while its description is that of an earlier record.
    meta: "objects", a list of {size, colour, texture, shape, box}, box as [left, top, right,
    bottom] in pixels, tight, right and bottom excluded; "relations", a list of [i, word, j] for
    every pair that is clearly beside or above each other; "description", canonical; "licence".
    Raises ValueError for an unknown split or too small an image.
    """
    check_scenes(split, image_size)
    return _scenes(split, count, seed, image_size, start)


def check_scenes(split: str, image_size: int) -> None:
    """Raises ValueError for what cannot be drawn."""
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise ValueError(f"unknown split {split!r} of the synthetic source; known: {known}")
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size={image_size} is too small; at least {MIN_IMAGE_SIZE}")


def describe(objects: list[SceneObject], relations: list[Relation]) -> str:
    """The canonical description: the same for every order of objects and direction of relations."""
    names = [_name(o) for o in objects]
    facts = []
    for i, word, j in relations:
        if word in ("right of", "below"):
            i, word, j = j, CONVERSES[word], i
        facts.append(f"{names[i]} {word} {names[j]}")
    return "; ".join(sorted(names) + sorted(facts))


def split_of(objects: list[SceneObject]) -> str:
    """The split that owns this set of objects, in any arrangement: val for one set in ten."""
    key = describe(objects, [])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") % 10 == 0 else "train"


def _name(o: SceneObject) -> str:
    return f"{o.size} {o.colour} {o.texture} {o.shape}"


def _scenes(split: str, count: int, seed: int, image_size: int, start: int) -> Iterator[Record]:
    seen: set[str] = set()
    # What the first of val are decides which come later, even if they are not wanted.
    for index in range(0 if split == "val" else start, count):
        rng = random.Random(f"elip_ds synthetic {seed} {split} {index}")
        while True:
            objects = _draw_objects(rng, split)
            masks = [_draw_mask(rng, o, image_size) for o in objects]
            boxes = _place(rng, [mask.size for mask in masks], image_size)
            relations = _relations(boxes)
            description = describe(objects, relations)
            if boxes and description not in seen:
                break
        if split == "val":
            seen.add(description)
        if index < start:
            continue

        image = _draw_background(rng, image_size)
        for o, mask, box in zip(objects, masks, boxes, strict=True):
            _paint(rng, image, o, mask, box)
        yield Record(
            key=f"{split}-{index:06d}",
            image=_encode(image),
            extension="jpg",
            captions=_captions(rng, objects, relations),
            meta={
                "objects": [
                    asdict(o) | {"box": list(box)} for o, box in zip(objects, boxes, strict=True)
                ],
                "relations": [list(relation) for relation in relations],
                "description": description,
                "licence": "CC0-1.0",
            },
        )


def _draw_objects(rng: random.Random, split: str) -> list[SceneObject]:
    """Draws until the split owns the set; their number is drawn once, so splits agree in it."""
    num_objects = rng.choices(_OBJECT_COUNTS, _OBJECT_COUNT_WEIGHTS)[0]
    while True:
        objects = [
            SceneObject(
                size=rng.choice(tuple(SIZES)),
                colour=rng.choice(tuple(COLOURS)),
                texture=rng.choices(tuple(TEXTURES), _TEXTURE_WEIGHTS)[0],
                shape=rng.choice(tuple(SHAPES)),
            )
            for _ in range(num_objects)
        ]
        distinct = len({(o.colour, o.shape) for o in objects}) == num_objects
        if distinct and split_of(objects) == split:
            return objects


# Where things are


def _place(rng: random.Random, sizes: list[tuple[int, int]], image_size: int) -> list[Box]:
    """Boxes of these sizes (width, height), apart, the first two in a clear relation.

    Empty if the objects are too big for that to be found soon.
    """
    for _ in range(200):
        boxes = []
        for width, height in sizes:
            left = rng.randint(_MARGIN, image_size - _MARGIN - width)
            top = rng.randint(_MARGIN, image_size - _MARGIN - height)
            boxes.append((left, top, left + width, top + height))
        apart = all(max(_gaps(a, b)) >= _MARGIN for a, b in combinations(boxes, 2))
        if apart and (len(boxes) == 1 or _relation(boxes[0], boxes[1])):
            return boxes
    return []


def _gaps(a: Box, b: Box) -> tuple[int, int]:
    """Pixels between two boxes sidewise and lengthwise; negative where they overlap."""
    return max(a[0], b[0]) - min(a[2], b[2]), max(a[1], b[1]) - min(a[3], b[3])


def _relations(boxes: list[Box]) -> list[Relation]:
    pairs = ((i, _relation(boxes[i], boxes[j]), j) for i, j in combinations(range(len(boxes)), 2))
    return [(i, word, j) for i, word, j in pairs if word]


def _relation(a: Box, b: Box) -> str | None:
    """What a is to b, or None if that is a matter of taste, as on a diagonal."""
    across, down = a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]
    gap_across, gap_down = _gaps(a, b)
    if gap_across >= _MARGIN and abs(across) > 1.5 * abs(down):
        return "left of" if across < 0 else "right of"
    if gap_down >= _MARGIN and abs(down) > 1.5 * abs(across):
        return "above" if down < 0 else "below"
    return None


# What they look like


def _spokes(radii: tuple[float, ...], num_points: int, start_degrees: float = 0.0) -> np.ndarray:
    angles = np.radians(start_degrees) + np.arange(num_points) * 2 * math.pi / num_points
    lengths = np.resize(radii, num_points)
    return np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1)


_ARM = 0.36  # half the width of a cross's arm
_CROSS = [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]

# Outlines (points, 2), x to the right and y down, of any scale.
_OUTLINES = {
    "circle": _spokes((1.0,), 40),
    "square": _spokes((1.0,), 4, 45),
    "triangle": _spokes((1.0,), 3, -90),
    "star": _spokes((1.0, 0.42), 10, -90),
    "cross": np.array(_CROSS + [(-x, -y) for x, y in _CROSS]),
    "ring": _spokes((1.0,), 40),
    "heart": _heart(),
    "diamond": _spokes((1.0, 0.72), 4, -90),
}


def _draw_mask(rng: random.Random, o: SceneObject, image_size: int) -> Image.Image:
    """The silhouette, mode "L", as small as its box; drawn twice as big, for smooth edges."""
    diameter = image_size * rng.uniform(*DIAMETERS[o.size])
    angle = math.radians(rng.uniform(-10, 10))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = _OUTLINES[o.shape] @ turn
    points -= points.min(0)
    points *= (2 * diameter - 1) / points.max()
    width, height = np.ceil((points.max(0) + 1) / 2).astype(int).tolist()
    mask = Image.new("L", (2 * width, 2 * height))
    draw = ImageDraw.Draw(mask)
    draw.polygon(points.ravel().tolist(), fill=255)
    if o.shape == "ring":
        centre = points.max(0) / 2
        draw.polygon((centre + (points - centre) * 0.52).ravel().tolist(), fill=0)
    return mask.reduce(2)


def _paint(
    rng: random.Random, image: Image.Image, o: SceneObject, mask: Image.Image, box: Box
) -> None:
    rgb = tuple(min(255, max(0, c + rng.randint(-10, 10))) for c in RGB[o.colour])
    image.paste(rgb, box, mask)
    if o.texture == "plain":
        return
    period = max(4, round(max(mask.size) / 5))
    left, top = rng.randrange(period), rng.randrange(period)
    pattern = _pattern(o.texture, period).crop((left, top, left + mask.width, top + mask.height))
    image.paste(_shade(rgb), box, ImageChops.multiply(mask, pattern))


def _shade(rgb: tuple[int, ...]) -> tuple[int, ...]:
    """The colour of stripes and dots: darker on a bright colour, lighter on a dark one."""
    bright = sum(rgb) > 375  # between purple and orange, wider than the jitter
    return tuple(c * 2 // 5 if bright else 255 - (255 - c) * 3 // 10 for c in rgb)


@lru_cache(maxsize=256)
def _pattern(texture: str, period: int) -> Image.Image:
    """Mode "L", eight periods wide and high: diagonal stripes or dots on a square grid."""
    side = 8 * period
    across, down = np.meshgrid(
        np.arange(2 * side) / (2 * period), np.arange(2 * side) / (2 * period)
    )
    if texture == "striped":
        painted = (across + down) % 1 < 0.5
    else:
        painted = np.hypot(across % 1 - 0.5, down % 1 - 0.5) < 0.34
    return Image.fromarray((painted * 255).astype(np.uint8)).reduce(2)


def _draw_background(rng: random.Random, image_size: int) -> Image.Image:
    """A grey gradient with a slight tint, faint strokes and noise: what a pruned token may lose."""
    ramp = np.linspace(-0.5, 0.5, image_size, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-40, 40), rng.uniform(-40, 40)
    grey = rng.uniform(90, 180) + slope_x * ramp[None, :] + slope_y * ramp[:, None]
    tint = np.array([rng.uniform(-8, 8) for _ in range(3)], dtype=np.float32)
    noise = np.frombuffer(rng.randbytes(3 * image_size**2), np.uint8) % 17
    pixels = grey[:, :, None] + tint + noise.reshape(image_size, image_size, 3)
    image = Image.fromarray(pixels.astype(np.uint8))

    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 7)):
        x, y, end_x, end_y = (rng.randrange(image_size) for _ in range(4))
        level = round(float(grey[y, x])) + rng.choice((-1, 1)) * rng.randint(10, 28)
        fill = (level, level, level)
        if rng.random() < 0.5:
            draw.line((x, y, end_x, end_y), fill, width=rng.randint(1, 3))
        else:
            start = rng.randrange(360)
            bounds = (min(x, end_x), min(y, end_y), max(x, end_x), max(y, end_y))
            draw.arc(bounds, start, start + rng.randint(60, 200), fill, width=rng.randint(1, 3))
    return image


def _encode(image: Image.Image) -> bytes:
    """JPEG with full colour resolution: halving it washes out the small objects."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


# What is said of them


def _captions(
    rng: random.Random, objects: list[SceneObject], relations: list[Relation]
) -> tuple[str, ...]:
    """One or two different captions of the same scene."""
    num_captions = 2 if rng.random() < _SECOND_CAPTION_RATIO else 1
    captions: list[str] = []
    while len(captions) < num_captions:
        caption = _caption(rng, objects, relations)
        if caption not in captions and len(caption.split()) <= MAX_WORDS:
            captions.append(caption)
    return tuple(captions)


def _caption(rng: random.Random, objects: list[SceneObject], relations: list[Relation]) -> str:
    phrases = [_noun_phrase(rng, o) for o in objects]
    if len(objects) == 1:
        return rng.choice(_ONE).format(a=phrases[0])
    i, word, j = rng.choice(relations)
    if rng.random() < 0.5:
        i, word, j = j, CONVERSES[word], i
    return rng.choice(_TWO if len(objects) == 2 else _THREE).format(
        a=phrases[i],
        b=phrases[j],
        c=phrases[3 - i - j] if len(objects) == 3 else "",
        relation=rng.choice(RELATIONS[word]),
        beside=rng.choice(_BESIDE[word]),
    )


def _noun_phrase(rng: random.Random, o: SceneObject) -> str:
    """Colour and shape always, texture unless plain, size mostly: "a large striped red circle"."""
    size = rng.choice(SIZES[o.size]) if rng.random() < _SAY_SIZE_RATIO else ""
    colour = rng.choice(COLOURS[o.colour])
    texture = rng.choice(TEXTURES[o.texture])
    if o.texture == "plain" and rng.random() >= _SAY_PLAIN_RATIO:
        texture = ""
    shape = rng.choice(SHAPES[o.shape])
    if texture.startswith("with"):
        words = [size, colour, shape, texture]
    else:
        words = [size, *rng.choice(((texture, colour), (colour, texture))), shape]
    phrase = " ".join(filter(None, words))
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"

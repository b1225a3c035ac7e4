"""RandAugment's operations by closed forms, and how they are drawn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from elip_ds.data import rand_augment as ops
from elip_ds.data.augment import keyed_generator
from elip_ds.data.rand_augment import GREY, KINDS, Drawn, rand_augment

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)
SMOOTH = IMAGE.resize((60, 40), Image.Resampling.BICUBIC)


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


DRAWN = [
    pytest.param(drawn, kind, id=f"{kind}-{drawn.operation.__name__}")
    for kind, (choices, _, _) in KINDS.items()
    for drawn in choices
]


@pytest.mark.parametrize(("drawn", "kind"), DRAWN)
def test_an_operation_keeps_size_and_mode(drawn: Drawn, kind: str) -> None:
    for strength in (drawn.low, drawn.high, *([-drawn.high] if drawn.signed else [])):
        for image in (IMAGE, Image.new("RGB", (1, 1), GREY), Image.new("RGB", (2, 50))):
            changed = drawn.operation(image, strength)
            assert (changed.size, changed.mode) == (image.size, "RGB")


@pytest.mark.parametrize(("drawn", "kind"), DRAWN)
def test_a_move_by_nothing_changes_nothing(drawn: Drawn, kind: str) -> None:
    if drawn.signed:
        assert (levels(drawn.operation(IMAGE, 0)) == PIXELS).all()


def test_brightness_multiplies() -> None:
    for factor in (0.1, 1.0, 1.36):
        expected = np.floor(PIXELS * np.float32(factor)).clip(0, 255)
        assert np.abs(levels(ops.brightness(IMAGE, factor)) - expected).max() <= 1


def test_of_five_blip_leaves_brightness_and_sharpness_alone() -> None:
    for operation in (ops.brightness, ops.sharpness):
        drawn = next(d for d in KINDS["albef"][0] if d.operation is operation)
        strength = drawn.low + (drawn.high - drawn.low) * 5 / 10
        assert strength == pytest.approx(1)
        assert (levels(operation(IMAGE, strength)) == PIXELS).all()


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.36, 1.9])
def test_sharpness_is_that_of_pillow(factor: float) -> None:
    theirs = ImageEnhance.Sharpness(IMAGE).enhance(factor)
    assert (levels(ops.sharpness(IMAGE, factor)) == levels(theirs)).all()


def test_contrast_spreads_each_channel_over_all_levels() -> None:
    dull = Image.fromarray((PIXELS // 4 + 90).astype(np.uint8))
    spread = levels(ops.autocontrast(dull, 0))
    assert (spread.min((0, 1)) == 0).all() and (spread.max((0, 1)) >= 254).all()
    flat = levels(ops.equalize(Image.fromarray(np.square(PIXELS // 16).astype(np.uint8)), 0))
    assert abs(flat.mean() - 127) < 20 < np.square(PIXELS // 16).mean()


def slow_shear(image: np.ndarray, slope: float) -> np.ndarray:
    """Row by row, pixel by pixel, in real numbers."""
    height, width, _ = image.shape
    sheared = np.empty(image.shape)
    for y in range(height):
        for x in range(width):
            at = x - slope * y
            near, part = int(np.floor(at)), at - np.floor(at)
            a, b = (image[y, i] if 0 <= i < width else np.array(GREY) for i in (near, near + 1))
            sheared[y, x] = (1 - part) * a + part * b
    return sheared


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(1, 25), st.integers(1, 25), st.floats(-0.3, 0.3))
def test_shear_moves_rows_and_columns_by_their_number(
    width: int, height: int, slope: float
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = slow_shear(pixels, slope)
    assert np.abs(levels(ops.shear_x(Image.fromarray(pixels), slope)) - expected).max() <= 1.1
    down = ops.shear_y(Image.fromarray(pixels.transpose(1, 0, 2).copy()), slope)
    assert np.abs(levels(down).transpose(1, 0, 2) - expected).max() <= 1.1


def test_translation_is_by_pixels_and_leaves_grey() -> None:
    right, up = levels(ops.translate_x(IMAGE, 7)), levels(ops.translate_y(IMAGE, -7))
    assert (right[:, 7:] == PIXELS[:, :-7]).all() and (right[:, :7] == GREY).all()
    assert (up[:-7] == PIXELS[7:]).all() and (up[-7:] == GREY).all()
    black = levels(ops.translate_x_nearest(IMAGE, 7))
    assert (black[:, :-7] == PIXELS[:, 7:]).all() and (black[:, -7:] == 0).all()


def test_a_quarter_turn_keeps_the_middle() -> None:
    square = SMOOTH.resize((40, 40))
    for operation in (ops.rotate, ops.rotate_nearest):
        turned = levels(operation(square, 90))
        assert np.abs(turned - np.rot90(levels(square)))[2:-2, 2:-2].max() <= 2


def test_posters_have_few_levels() -> None:
    assert set(np.unique(levels(ops.posterize(IMAGE, 1.2)))) == {0, 128}
    assert set(np.unique(levels(ops.posterize(IMAGE, 0)))) == {0, 128}


def test_solarized_levels_are_reversed() -> None:
    assert (levels(ops.solarize(IMAGE, 100)) == np.where(PIXELS < 100, PIXELS, 255 - PIXELS)).all()
    lighter = np.minimum(PIXELS.astype(int) + 33, 255)
    expected = np.where(lighter < 128, lighter, 255 - lighter)
    assert (levels(ops.solarize_add(IMAGE, 33)) == expected).all()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What was applied, and how strongly, in place of doing it."""
    applied: list[tuple[str, float]] = []

    def noting(drawn: Drawn) -> Drawn:
        def note(image: Image.Image, strength: float) -> Image.Image:
            applied.append((drawn.operation.__name__, strength))
            return image

        return drawn._replace(operation=note)

    for kind, (choices, most, probability) in list(KINDS.items()):
        monkeypatch.setitem(KINDS, kind, ([noting(d) for d in choices], most, probability))
    return applied


def draw_many(kind: str, magnitude: int, count: int = 1000) -> None:
    tiny = PIXELS[:4, :4].copy()
    rng = keyed_generator(3)
    for _ in range(count):
        rand_augment(tiny, rng, kind=kind, ops=2, magnitude=magnitude)


def test_albef_applies_half_of_what_it_draws(counted: list[tuple[str, float]]) -> None:
    draw_many("albef", 7)
    assert len(counted) == pytest.approx(1000, rel=0.08)
    strengths = {name: {round(s, 6) for n, s in counted if n == name} for name, _ in counted}
    assert strengths == {
        "identity": {0},
        "autocontrast": {0},
        "equalize": {0},
        "brightness": {1.36},
        "sharpness": {1.36},
        "shear_x": {0.21, -0.21},
        "shear_y": {0.21, -0.21},
        "translate_x": {7, -7},
        "translate_y": {7, -7},
        "rotate": {21, -21},
    }
    names = [name for name, _ in counted]
    assert all(0.06 < names.count(name) / len(names) < 0.14 for name in strengths)
    assert 0.4 < sum(s > 0 for n, s in counted if n == "rotate") / names.count("rotate") < 0.6


def test_meter_applies_all_that_it_draws(counted: list[tuple[str, float]]) -> None:
    draw_many("meter", 9)
    assert len(counted) == 2000
    strengths = {name: {round(s, 6) for n, s in counted if n == name} for name, _ in counted}
    assert strengths["posterize"] == {1.2} and strengths["solarize"] == {76.8}
    assert strengths["solarize_add"] == {33} and strengths["colour"] == {0.64}
    assert strengths["rotate_nearest"] == {9, -9} and strengths["shear_y_nearest"] == {0.09, -0.09}
    assert strengths["translate_x_nearest"] == {30, -30} and len(strengths) == 14


def test_nothing_applied_gives_the_same_array() -> None:
    shown = [
        rand_augment(PIXELS, keyed_generator(seed), kind="albef", ops=2, magnitude=7)
        for seed in range(60)
    ]
    assert 5 < sum(pixels is PIXELS for pixels in shown) < 30
    assert all(pixels.flags.writeable for pixels in shown)

import io
import re
from itertools import islice, product

import numpy as np
import pytest
from PIL import Image

from elip_ds.data.sources import synthetic
from elip_ds.data.sources.synthetic import SceneObject, describe, scenes, split_of

TABLES = (synthetic.SIZES, synthetic.COLOURS, synthetic.TEXTURES, synthetic.SHAPES)
MEANING = {
    word.removeprefix("with "): canonical
    for table in TABLES
    for canonical, words in table.items()
    for word in words
}
RELATION_MEANING = {
    **{"left": "left of", "right": "right of", "above": "above", "over": "above"},
    **{"below": "below", "under": "below", "beneath": "below"},
}
ADJECTIVE = "|".join(w for w, c in MEANING.items() if c not in synthetic.SHAPES)
SHAPE = "|".join(w for w, c in MEANING.items() if c in synthetic.SHAPES)
NOUN_PHRASE = re.compile(rf"\ban? ((?:(?:{ADJECTIVE}) )*(?:{SHAPE})(?: with (?:stripes|dots))?)\b")
VERTICAL = "above|over|below|under|beneath"
BESIDE_IT = re.compile(rf"(?:to|on) its (left|right)|({VERTICAL}) it\b")
RELATIVE_TO = re.compile(rf"(?:to the )?(left|right) of|({VERTICAL})\b")


@pytest.fixture(scope="module")
def train():
    return list(scenes("train", 300))


@pytest.fixture(scope="module")
def val():
    return list(scenes("val", 300))


def parse_caption(caption):
    """The facts of every object named, and (i, word, j) if it relates two of them: an oracle."""
    phrases = list(NOUN_PHRASE.finditer(caption))
    named = [{MEANING[word] for word in p[1].split() if word != "with"} for p in phrases]
    for facts in named:
        if not facts & set(synthetic.TEXTURES):
            facts.add("plain")
    beside = BESIDE_IT.search(caption)
    relation = beside or RELATIVE_TO.search(caption)
    if relation is None:
        return named, None
    word = RELATION_MEANING[relation[1] or relation[2]]
    following = next(i for i, p in enumerate(phrases) if p.start() > relation.start())
    if beside:  # "b and to its left a"
        return named, (following, word, following - 1)
    if following > 0 and phrases[following - 1].end() == relation.start() - 1:  # "a left of b"
        return named, (following - 1, word, following)
    return named, (following + 1, word, following)  # "left of b there is a"


def facts_of(o):
    return {o["size"], o["colour"], o["texture"], o["shape"]}


def box_relation_holds(a, word, b):
    return {
        "left of": a[2] <= b[0],
        "right of": b[2] <= a[0],
        "above": a[3] <= b[1],
        "below": b[3] <= a[1],
    }[word]


def fits(parsed, objects):
    """Whether a parsed caption names exactly these objects and is true of them."""
    named, relation = parsed
    found = [k for facts in named for k, o in enumerate(objects) if facts <= facts_of(o)]
    if sorted(found) != list(range(len(objects))) or len(named) != len(objects):
        return False
    if relation is None:
        return len(objects) == 1
    i, word, j = relation
    return box_relation_holds(objects[found[i]]["box"], word, objects[found[j]]["box"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shorter_run_is_the_start_of_a_longer_one(split):
    assert list(scenes(split, 5)) == list(islice(scenes(split, 1000), 5))


def test_another_seed_or_split_gives_other_scenes():
    first = [
        next(scenes(split, 1, seed=seed)).image for split in ("train", "val") for seed in (0, 1)
    ]
    assert len(set(first)) == 4


def test_keys_are_unique_and_name_the_split(train, val):
    assert len({r.key for r in train + val}) == 600
    assert train[123].key == "train-000123"


def test_no_set_of_objects_is_in_both_splits(train, val):
    def objects(records):
        return {frozenset(map(frozenset, map(facts_of, r.meta["objects"]))) for r in records}

    other_seed = list(scenes("train", 100, seed=7))
    assert not objects(train + other_seed) & objects(val)


def test_the_split_of_a_scene_ignores_order_and_keeps_one_in_ten_for_val():
    tables = (synthetic.SIZES, synthetic.COLOURS, synthetic.TEXTURES, synthetic.SHAPES)
    every = [SceneObject(*words) for words in product(*tables)]
    pairs = list(zip(every, every[7:], strict=False))
    splits = [split_of([a, b]) for a, b in pairs]
    assert splits == [split_of([b, a]) for a, b in pairs]
    assert 0.05 < splits.count("val") / len(splits) < 0.15


def test_a_description_ignores_order_and_direction():
    a = SceneObject("large", "red", "plain", "star")
    b = SceneObject("small", "blue", "dotted", "ring")
    assert describe([a, b], [(0, "left of", 1)]) == describe([b, a], [(0, "right of", 1)])
    assert describe([a, b], [(0, "left of", 1)]) != describe([a, b], [(0, "right of", 1)])


def test_val_descriptions_are_distinct(val):
    assert len({r.meta["description"] for r in val}) == len(val)


def test_val_goes_on_after_all_single_objects_are_used():
    seen, singles = set(), 0
    for record in scenes("val", 600, image_size=48):
        seen.add(record.meta["description"])
        singles += len(record.meta["objects"]) == 1
    assert len(seen) == 600
    assert 10 < singles < 70


def test_captions_name_every_object_with_colour_and_shape_and_are_true(train, val):
    for record in train + val:
        for caption in record.captions:
            parsed = parse_caption(caption)
            assert fits(parsed, record.meta["objects"]), caption
            for facts in parsed[0]:
                assert facts & set(synthetic.COLOURS) and facts & set(synthetic.SHAPES), caption


def test_nearly_every_val_caption_fits_one_image_only(val):
    """The ceiling of retrieval: a size left unsaid may fit two scenes."""
    parsed = [parse_caption(caption) for record in val for caption in record.captions]
    num_fits = [sum(fits(p, record.meta["objects"]) for record in val) for p in parsed]
    assert min(num_fits) == 1
    assert np.mean(np.array(num_fits) > 1) < 0.01


def test_captions_are_short_lowercase_and_of_few_words(train):
    captions = [caption for record in train for caption in record.captions]
    vocabulary = {word for caption in captions for word in re.findall("[a-z]+", caption)}
    assert all(re.fullmatch("[a-z ,:]+", caption) for caption in captions)
    assert max(len(caption.split()) for caption in captions) <= synthetic.MAX_WORDS
    assert 60 <= len(vocabulary) <= 100
    assert {len(record.captions) for record in train} == {1, 2}
    assert all(len(set(record.captions)) == len(record.captions) for record in train)


def test_relations_in_meta_hold_between_the_boxes(train):
    for record in train:
        objects, relations = record.meta["objects"], record.meta["relations"]
        assert len(relations) >= (len(objects) > 1)
        for i, word, j in relations:
            assert box_relation_holds(objects[i]["box"], word, objects[j]["box"])


def test_boxes_lie_inside_the_image_and_apart(train):
    for record in train:
        covered = np.zeros((96, 96), dtype=int)
        for left, top, right, bottom in (o["box"] for o in record.meta["objects"]):
            assert 0 <= left < right <= 96 and 0 <= top < bottom <= 96
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


def test_most_of_the_image_is_background(train):
    ratios = []
    for record in train:
        boxes = [o["box"] for o in record.meta["objects"]]
        ratios.append(sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes) / 96**2)
    assert 0.08 < np.mean(ratios) < 0.25
    assert max(ratios) < 0.45


@pytest.mark.parametrize("image_size", [48, 64, 96, 224])
def test_images_have_the_size_asked_for(image_size):
    for record in scenes("train", 3, image_size=image_size):
        image = Image.open(io.BytesIO(record.image))
        assert (image.size, image.mode, image.format) == ((image_size, image_size), "RGB", "JPEG")
        assert record.extension == "jpg"


def test_plain_objects_have_their_colour_at_their_place(train):
    names = list(synthetic.RGB)
    palette = np.array(list(synthetic.RGB.values()), dtype=float)
    num_checked = 0
    for record in train:
        pixels = np.asarray(Image.open(io.BytesIO(record.image)), dtype=float)
        for o in record.meta["objects"]:
            if o["texture"] != "plain" or o["shape"] == "ring":
                continue
            x, y = (o["box"][0] + o["box"][2]) // 2, (o["box"][1] + o["box"][3]) // 2
            seen = pixels[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
            distances = np.linalg.norm(palette - seen, axis=1)
            assert names[distances.argmin()] == o["colour"], record.key
            assert distances.min() < 40, record.key
            num_checked += 1
    assert num_checked > 100


def test_colour_outside_the_boxes_is_greyish(train):
    for record in train[:50]:
        pixels = np.asarray(Image.open(io.BytesIO(record.image)), dtype=int)
        background = np.ones((96, 96), dtype=bool)
        for left, top, right, bottom in (o["box"] for o in record.meta["objects"]):
            background[max(0, top - 4) : bottom + 4, max(0, left - 4) : right + 4] = False
        saturation = pixels.max(-1) - pixels.min(-1)
        assert np.median(saturation[background]) < 35


def test_an_unknown_split_is_refused_at_once_and_the_known_ones_named():
    with pytest.raises(ValueError, match=r"'test'.*known: train, val"):
        scenes("test", 1)


def test_a_picture_too_small_for_shapes_is_refused():
    with pytest.raises(ValueError, match=r"image_size=32.*at least 48"):
        scenes("train", 1, image_size=32)

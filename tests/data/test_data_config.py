"""What the data section takes, from the command line to the class."""

import pytest

from elip_ds.config import load_config
from elip_ds.config.schema import RAND_AUGMENTS, RandAugmentConfig
from elip_ds.data.rand_augment import KINDS
from elip_ds.errors import UserError

RECIPES = {
    "albef_4m": {"kind": "albef", "ops": 2, "magnitude": 7},
    "blip_4m": {"kind": "albef", "ops": 2, "magnitude": 5},
    "clip_4m": None,
    "meter_4m": None,
    "demo": None,
}


def test_shards_are_named_from_the_data_folder() -> None:
    words = ["data.root=/mnt/sets", "data.train=${data.root}/coco/train-*.tar"]
    data = load_config([*words, "data.val=[{shards: '${data.root}/coco/val-*.tar'}]"]).data
    assert data.train[0].shards == "/mnt/sets/coco/train-*.tar"
    assert data.val[0].shards == "/mnt/sets/coco/val-*.tar"
    assert load_config(["data.train=${data.root}/x.tar"]).data.train[0].shards == "data/x.tar"


def test_training_images_may_stay_uncropped() -> None:
    data = load_config(["data.crop_scale=null", "data.resize=center_crop"]).data
    assert data.crop_scale is None and data.resize == "center_crop"


def test_random_changes_are_those_of_the_published_recipes() -> None:
    found = {name: load_config([f"preset={name}"]).data.rand_augment for name in RECIPES}
    assert {name: found[name] and vars(found[name]) for name in RECIPES} == RECIPES
    words = ["preset=albef_4m", "data.rand_augment=null"]
    assert load_config(words).data.rand_augment is None
    words = ["data.rand_augment={kind: meter, ops: 2, magnitude: 9}"]
    assert load_config(words).data.rand_augment == RandAugmentConfig("meter", 2, 9)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("data.root=''", "data.root is empty: name a folder, '.' for this one"),
        (
            "data.tokenizer=xlnet",
            "data.tokenizer='xlnet': choose one of albef, bert, blip, roberta, clip",
        ),
        ("data.vocabulary=''", "data.vocabulary is empty: 'auto', a file or a published name"),
        (
            "data.train=[{shards: a.tar, caption: last}]",
            "data.train[0].caption='last': choose random or first",
        ),
        ("data.decode=slow", "data.decode='slow': choose fast or exact"),
        ("data.max_pixels=0", "data.max_pixels=0: 1 or more"),
        ("data.min_side=0", "data.min_side=0: 1 or more"),
        (
            "data.rand_augment={kind: auto}",
            "data.rand_augment.kind='auto': choose albef or meter",
        ),
        ("data.rand_augment={ops: 0}", "data.rand_augment.ops=0: 1 or more"),
        (
            "data.rand_augment={magnitude: 11}",
            "data.rand_augment.magnitude=11: 0 to 10 for albef",
        ),
        ("data.resize=crop", "data.resize='crop': choose squash or center_crop"),
        (
            "data.crop_scale=[0.9,0.2]",
            "data.crop_scale=[0.9, 0.2]: two shares, 0 < low <= high <= 1, or null for no crop",
        ),
    ],
)
def test_a_setting_that_cannot_be(word: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([word])
    assert str(caught.value) == line


def test_the_kinds_of_random_changes_are_those_that_exist() -> None:
    assert {kind: most for kind, (_, most, _) in KINDS.items()} == RAND_AUGMENTS

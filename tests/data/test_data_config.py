"""What the data section takes, from the command line to the class."""

import pytest

from elip_ds.config import load_config
from elip_ds.errors import UserError


def test_shards_are_named_from_the_data_folder() -> None:
    words = ["data.root=/mnt/sets", "data.train=${data.root}/coco/train-*.tar"]
    data = load_config([*words, "data.val=[{shards: '${data.root}/coco/val-*.tar'}]"]).data
    assert data.train[0].shards == "/mnt/sets/coco/train-*.tar"
    assert data.val[0].shards == "/mnt/sets/coco/val-*.tar"
    assert load_config(["data.train=${data.root}/x.tar"]).data.train[0].shards == "data/x.tar"


def test_training_images_may_stay_uncropped() -> None:
    data = load_config(["data.crop_scale=null", "data.resize=center_crop"]).data
    assert data.crop_scale is None and data.resize == "center_crop"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("data.root=''", "data.root is empty: name a folder, '.' for this one"),
        (
            "data.tokenizer=xlnet",
            "data.tokenizer='xlnet': choose one of albef, bert, blip, roberta, clip",
        ),
        ("data.vocabulary=''", "data.vocabulary is empty: 'auto', a file or a published name"),
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

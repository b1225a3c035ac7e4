"""Shards that the project did not write itself: photographs, clip art and drawn scenes."""

from pathlib import Path

import pytest
from made_shards import count, data_config, make_loaders, make_run, take

from elip_ds.data.decode import decode_image
from elip_ds.data.learn import learn_vocabulary
from elip_ds.data.record import BadSample
from elip_ds.data.shards import ShardReader, expand_files
from elip_ds.data.vocabulary import SPECIALS

DATA = (Path(__file__).parents[2] / "../shared/data").resolve()
SAMPLES = {
    "fsa-color-photos": {"train": 1053, "val": 100, "test": 300},
    "openclipart": {"train": 1473, "val": 100, "test": 300},
    "nlvr-mini": {"train": 1978, "val": 300, "test": 300},
    "easy-vqa-mini": {"train": 700, "val": 100, "test": 200},
}
CAPTIONED = ["fsa-color-photos", "openclipart"]

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")


def shards(name: str, split: str) -> list[Path]:
    return expand_files(f"{DATA}/{name}/{name}-{split}-*.tar", "data.train")


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_counted(name: str) -> None:
    for split, samples in SAMPLES[name].items():
        assert sum(count(shards(name, split))) == samples


@pytest.mark.parametrize("name", CAPTIONED)
def test_every_held_out_sample_can_be_used(name: str) -> None:
    (path,) = shards(name, "val")
    reader = ShardReader(path)
    for i in range(len(reader)):
        record = reader.read(i)
        assert all(caption.strip() for caption in record.captions)
        assert decode_image(record.image).size == (record.meta["width"], record.meta["height"])


def test_a_false_sentence_is_no_caption() -> None:
    (path,) = shards("nlvr-mini", "val")
    reader = ShardReader(path)
    false = 0
    for i in range(len(reader)):
        try:
            assert reader.read(i).meta["label"] is True
        except BadSample:
            false += 1
    assert (len(reader), false) == (300, 132)


def test_questions_alone_are_no_captions() -> None:
    (path,) = shards("easy-vqa-mini", "val")
    reader = ShardReader(path)
    for i in range(len(reader)):
        with pytest.raises(BadSample, match="no caption"):
            reader.read(i)


def test_photographs_and_clip_art_train_together(tmp_path: Path) -> None:
    pattern = "::".join(f"{DATA}/{name}/{name}-val-000000.tar" for name in CAPTIONED)
    loader, held_out = make_loaders(data_config(pattern, pattern), make_run(tmp_path), micro=50)
    keys = [key for batch in take(loader, 4) for key in batch.keys]
    assert (loader.bad, len(keys), len(held_out)) == ({}, 200, 200)


def test_a_vocabulary_covers_real_captions() -> None:
    captions = [
        caption
        for name in CAPTIONED
        for path in shards(name, "val")
        for reader in [ShardReader(path)]
        for i in range(len(reader))
        for caption in reader.captions(i)
    ]
    vocabulary = learn_vocabulary(captions, 2000)
    assert 1000 < len(vocabulary) <= 2000
    assert vocabulary.words[:5] == SPECIALS

"""What a worker makes of a sample: the same wherever it runs, by its source's rules."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_shards import VOCABULARY, data_config, joined, make_loaders, make_run, record, same, take
from PIL import Image

from elip_ds.config.schema import DataConfig, RandAugmentConfig, ShardSource
from elip_ds.data.record import Record
from elip_ds.data.shards import write_shards
from elip_ds.run import Run

COUNT = 12


def jpeg(number: int, width: int = 90, height: int = 70) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def photograph(number: int) -> Record:
    """Captions and key as record's, the picture a JPEG that is larger than a test's images."""
    return replace(record(number), image=jpeg(number), extension="jpg")


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_shards(map(photograph, range(COUNT)), tmp_path, "train", per_shard=5)
    return data_config(tmp_path / "train-*.tar", tmp_path / "train-*.tar")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


def test_random_changes_do_not_depend_on_workers(config: DataConfig, run: Run) -> None:
    config = replace(config, rand_augment=RandAugmentConfig(ops=3))
    alone, *others = (
        take(make_loaders(replace(config, workers=workers), run)[0], 6) for workers in (0, 1, 2)
    )
    for batches in others:
        assert all(same(a, b) for a, b in zip(alone, batches, strict=True))
    plain = take(make_loaders(replace(config, rand_augment=None), run)[0], 6)
    changed = (joined(alone).images != joined(plain).images).flatten(1).any(1)
    assert 0.6 < changed.float().mean() <= 1


def test_a_source_can_keep_to_its_first_caption(config: DataConfig, run: Run) -> None:
    first = [ShardSource(source.shards, caption="first") for source in config.train]
    loader = make_loaders(replace(config, train=first), run, micro=COUNT)[0]
    ids = joined(take(loader, 4)).input_ids
    assert {VOCABULARY.words[i] for i in ids[:, 1]} == {"number"}


def test_held_out_images_are_exact_whatever_training_does(config: DataConfig, run: Run) -> None:
    shown = [
        next(iter(make_loaders(replace(config, decode=decode), run)[1]))
        for decode in ("fast", "exact")
    ]
    assert same(*shown)


@pytest.mark.parametrize(
    ("size", "reason"),
    [((400, 200), "more than 50000 pixels"), ((40, 7), "a side of less than 8 pixels")],
)
def test_an_image_that_is_too_large_or_too_small_is_skipped(
    tmp_path: Path, run: Run, size: tuple[int, int], reason: str
) -> None:
    odd = replace(photograph(3), image=jpeg(3, *size))
    write_shards([photograph(0), odd, photograph(2)], tmp_path, "odd")
    config = data_config(tmp_path / "odd-*.tar", tmp_path / "odd-*.tar")
    loader = make_loaders(replace(config, max_pixels=50_000), run, micro=3)[0]
    (batch,) = take(loader, 1)
    assert [(skipped.key, skipped.reason) for skipped in batch.skipped] == [("r0003", reason)]

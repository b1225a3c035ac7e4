"""Batches on their way to the device."""

import pytest
import torch

from elip_ds.data.augment import MEAN, STD
from elip_ds.data.batch import Batch, stable_hash


def white(size: int) -> Batch:
    return Batch(
        images=torch.full((size, 3, 2, 2), 255, dtype=torch.uint8),
        input_ids=torch.ones(size, 4, dtype=torch.int64),
        attention_mask=torch.ones(size, 4, dtype=torch.int64),
        sample_key=torch.arange(size),
        keys=("a",) * size,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_are_normalised_as_clip_does(dtype: torch.dtype) -> None:
    batch = white(2).to(torch.device("cpu"), dtype)
    assert batch.images.dtype == dtype
    wanted = [(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    assert batch.images[1, :, 0, 1].tolist() == pytest.approx(wanted, rel=1e-2)
    assert batch.keys == ("a", "a")
    assert len(batch) == 2


def test_a_hash_is_the_same_everywhere() -> None:
    words = ["", "0/train-000001", "ünïcode", "\udcff"]
    hashes = [stable_hash(word) for word in words]
    assert len(set(hashes)) == 4
    assert all(-(2**63) <= value < 2**63 for value in hashes)
    assert hashes[1] == -2072145508995436572

"""What loaders hold, against the batches that a real one hands over."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import tiny_words
from hypothesis import given
from hypothesis import strategies as st

from elip_ds.config import load_config
from elip_ds.data.made_up import made_up_vocabulary, random_batch
from elip_ds.launching.loaders import loader_bytes, within_shared_memory

CONFIG = load_config(tiny_words("eval.batch_size=4"))


def config_with(workers: int):
    return replace(CONFIG, data=replace(CONFIG.data, workers=workers))


@pytest.mark.parametrize("workers", [1, 3])
def test_what_waits_is_four_batches_a_worker_and_two_in_use(workers):
    config = config_with(workers)
    vocabulary = made_up_vocabulary(config)
    batches = (random_batch(config, vocabulary, size) for size in (5, config.eval.batch_size))
    tensors = [t for b in batches for t in (b.images, b.input_ids, b.attention_mask, b.sample_key)]
    one_of_each = sum(tensor.nbytes for tensor in tensors)
    assert loader_bytes(config, 5).shared == one_of_each * (4 * workers + 2)
    assert loader_bytes(config, 5).total > loader_bytes(config, 5).shared


def test_without_workers_nothing_waits():
    assert loader_bytes(config_with(0), 100).total == 0


@given(
    free=st.integers(0, 10**10),
    ranks=st.integers(1, 8),
    workers=st.integers(0, 8),
    sizes=st.sets(st.integers(1, 5000), min_size=1).map(sorted),
)
def test_as_many_sizes_as_the_shared_memory_holds(free, ranks, workers, sizes):
    config = config_with(workers)
    status = SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "statvfs", lambda folder: status)
        fits, why = within_shared_memory(config, sizes, ranks)
    held = [loader_bytes(config, size).shared * ranks <= free for size in sizes]
    assert held == [True] * fits + [False] * (len(sizes) - fits)
    assert bool(why) == (fits < len(sizes))


def test_a_system_without_shared_memory_bounds_nothing(tmp_path):
    assert within_shared_memory(config_with(2), [1, 2], 2, tmp_path / "none") == (2, "")
    status = SimpleNamespace(f_bavail=0, f_frsize=1, f_blocks=0)  # mounted with size=0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "statvfs", lambda folder: status)
        assert within_shared_memory(config_with(2), [1, 2], 2) == (2, "")

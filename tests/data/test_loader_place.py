"""What a loader says of itself: batches in hand, shards behind."""

import time

import pytest
from conftest import tiny_words

from elip_ds.config import load_config
from elip_ds.data import build_loaders, build_vocabulary, open_sources
from elip_ds.run import open_run


@pytest.fixture
def loader(tmp_path, shared_scenes):
    def build(workers: int):
        words = [f"data.builtin.dir={shared_scenes}", f"run.dir={tmp_path}"]
        config = load_config(tiny_words(*words, f"data.workers={workers}"))
        run = open_run(config)
        sources = open_sources(config.data, run)
        return build_loaders(
            config.data,
            sources,
            build_vocabulary(config.data, sources, run, 64),
            run,
            image_size=(32, 32),
            micro_batches=(4,),
            eval_batch_size=4,
            max_eval=4,
        )[0]

    return build


def test_workers_have_batches_ready_when_nobody_takes_them(loader):
    busy = loader(1)
    assert busy.ready == 0
    next(busy)
    deadline = time.monotonic() + 30
    while busy.ready < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert busy.ready <= 4  # as far as it reads ahead


def test_without_workers_nothing_is_ready(loader):
    lazy = loader(0)
    next(lazy)
    assert lazy.ready == 0


def test_shards_go_by_with_the_samples(loader):
    behind = loader(0).shard_positions
    ((first, count),) = behind(0).values()
    assert (first, count) == (0, 1)
    assert behind(32)["builtin"] == (0.5, 1)
    assert behind(64 + 16)["builtin"] == (0.25, 1)  # the second pass

"""100 000 samples, ranks killed twice and fewer of them at the end: each key once, none twice.

The ranks are processes with loader workers of their own. What they would train on they write down,
and a checkpoint is, as in training, a step that all of them have done.
"""

import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_shards import data_config, make_loaders, make_run, png

from elip_ds.config.schema import DataConfig
from elip_ds.data.record import Record
from elip_ds.data.shards import write_shards

SAMPLES, GLOBAL_BATCH, SAVE_EVERY = 100_000, 200, 20


def records() -> Iterator[Record]:
    image = png(0, (8, 8))
    for number in range(SAMPLES):
        yield Record(f"r{number:06d}", image, "png", ("number one",))


def train(config: DataConfig, folder: Path, rank: int, ranks: int, seen: int) -> None:
    """One rank from a position to the end of the epoch: a line of keys for each step."""
    os.setsid()
    warnings.simplefilter("ignore")  # torch's, of more workers than cores
    micro = GLOBAL_BATCH // ranks
    loader, _ = make_loaders(
        config, make_run(folder, rank, ranks), micro=micro, image_size=(8, 8), max_eval=1
    )
    loader.seek(seen)
    with (folder / f"rank{rank}.keys").open("w", buffering=1) as file:
        for _ in range((SAMPLES - seen) // GLOBAL_BATCH):
            file.write(" ".join(key.rpartition("/")[2] for key in next(loader).keys) + "\n")


def steps(path: Path) -> list[list[str]]:
    """The keys of each step that was written whole."""
    text = path.read_text() if path.exists() else ""
    return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run(config: DataConfig, folder: Path, *, ranks: int, seen: int, until: int) -> list[list[str]]:
    """The keys of the steps up to the last checkpoint, after a kill once `until` samples are seen
    or, where that is the whole epoch, to its end.
    """
    folder.mkdir()
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=train, args=(config, folder, rank, ranks, seen))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    files = [folder / f"rank{rank}.keys" for rank in range(ranks)]
    end = time.monotonic() + 400
    while until < SAMPLES and seen + min(len(steps(f)) for f in files) * GLOBAL_BATCH < until:
        assert time.monotonic() < end and all(p.is_alive() for p in processes)
        time.sleep(0.05)
    for process in processes:
        if until < SAMPLES:
            os.killpg(process.pid, signal.SIGKILL)
        process.join(400)
        assert process.exitcode == (-signal.SIGKILL if until < SAMPLES else 0)
    done = [steps(f) for f in files]
    common = min(map(len, done))
    if until < SAMPLES:
        common -= common % SAVE_EVERY
    return [[key for rank in done for key in rank[step]] for step in range(common)]


@pytest.mark.slow
def test_each_key_comes_once_whatever_happens_to_the_ranks(tmp_path: Path) -> None:
    write_shards(records(), tmp_path, "x", per_shard=4000)
    config = data_config(tmp_path / "x-*.tar", tmp_path / "x-000000.tar", "data.workers=3")
    seen, keys = 0, Counter[str]()
    plan = [(4, 30_000), (4, 60_000), (2, SAMPLES)]
    for attempt, (ranks, until) in enumerate(plan):
        for batch in run(config, tmp_path / f"run{attempt}", ranks=ranks, seen=seen, until=until):
            keys.update(batch)
            seen += GLOBAL_BATCH
        assert seen >= until - SAVE_EVERY * GLOBAL_BATCH
    assert seen == SAMPLES
    assert keys == Counter(f"r{number:06d}" for number in range(SAMPLES))

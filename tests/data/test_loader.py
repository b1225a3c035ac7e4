"""Shards -> batches: the same for any workers and ranks, from any position, whatever is broken."""

import json
import multiprocessing
import os
import socket
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from made_shards import (
    VOCABULARY,
    data_config,
    joined,
    make_loaders,
    make_run,
    png,
    record,
    same,
    take,
    write_tar,
)

from elip_ds import dist
from elip_ds.config.schema import DataConfig
from elip_ds.data import Batch, TrainLoader, build_loaders, build_vocabulary, open_sources, pairs
from elip_ds.data.record import BadShard
from elip_ds.data.shards import INDEX, write_shards
from elip_ds.data.vocabulary import KINDS
from elip_ds.errors import PassingError, UserError
from elip_ds.run import Run
from elip_ds.tasks.pretrain import _in_order

COUNT, VAL = 30, 11


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(map(record, range(COUNT)), folder, "train", per_shard=7)
    write_shards(map(record, range(100, 100 + VAL)), folder, "val", per_shard=4)
    return data_config(folder / "train-*.tar", folder / "val-*.tar")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


def train(config: DataConfig, run: Run, micro: int = 4) -> TrainLoader:
    return make_loaders(config, run, micro=micro)[0]


def numbers(batch: Batch) -> list[int]:
    return [int(key.rpartition("r")[2]) for key in batch.keys]


# The training stream


def test_a_batch_holds_what_the_records_say(config: DataConfig, run: Run) -> None:
    batch = next(train(config, run))
    assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.uint8
    assert batch.input_ids.shape == batch.attention_mask.shape == (4, 6)
    assert batch.sample_key.shape == (4,) and batch.sample_key.dtype == torch.int64
    assert (len(batch), batch.skipped) == (4, ())
    for key, ids, mask in zip(numbers(batch), batch.input_ids, batch.attention_mask, strict=True):
        caption = [VOCABULARY.words[i] for i in ids[mask.bool()]]
        assert caption[0] == "[CLS]"
        assert " ".join(caption[1:]) in record(key).captions


def test_an_epoch_brings_every_sample(config: DataConfig, run: Run) -> None:
    loader = train(config, run, micro=5)
    assert loader.samples_per_epoch == COUNT
    for _ in range(2):
        assert sorted(numbers(joined(take(loader, 6)))) == list(range(COUNT))


def test_workers_change_nothing(config: DataConfig, run: Run) -> None:
    first, *others = (take(train(replace(config, workers=n), run), 10) for n in (0, 1, 2))
    for batches in others:
        assert all(same(a, b) for a, b in zip(first, batches, strict=True))


@pytest.mark.parametrize(("ranks", "micro"), [(1, 12), (2, 6), (3, 2), (4, 3)])
def test_ranks_share_one_sequence(
    config: DataConfig, tmp_path: Path, ranks: int, micro: int
) -> None:
    alone = joined(take(train(config, make_run(tmp_path / "alone"), micro=1), 36))
    loaders = [train(config, make_run(tmp_path, r, ranks), micro) for r in range(ranks)]
    passes = 36 // (ranks * micro)
    assert same(joined([next(loader) for _ in range(passes) for loader in loaders]), alone)


@pytest.mark.parametrize("seen", [0, 8, 24, 32, 100])
def test_it_goes_on_with_the_very_next_batch(config: DataConfig, run: Run, seen: int) -> None:
    loader = train(config, run)
    take(loader, seen // 4)
    resumed = train(config, run)
    resumed.seek(seen)
    assert all(same(next(loader), next(resumed)) for _ in range(3))


def test_it_goes_on_with_other_micro_batches(config: DataConfig, run: Run) -> None:
    loader = train(config, run, micro=6)
    loader.seek(24)
    resumed = train(config, run, micro=3)
    resumed.seek(24)
    assert same(joined(take(loader, 2)), joined(take(resumed, 4)))


def test_a_sample_s_crop_depends_on_seed_and_epoch_only(config: DataConfig, run: Run) -> None:
    def epoch(number: int, seed: int = 42, window: int = 16) -> dict[str, bytes]:
        loader = train(replace(config, shuffle_shards=window), replace(run, seed=seed), micro=1)
        loader.seek(number * COUNT)
        batches = take(loader, COUNT)
        return {b.keys[0]: b.images.numpy().tobytes() for b in batches}

    first = epoch(0)
    assert epoch(0, window=1) == first  # in another order, so beside other samples
    for other in (epoch(1), epoch(0, seed=43)):
        assert other.keys() == first.keys()
        assert sum(other[key] == first[key] for key in first) < COUNT / 4


def test_captions_are_drawn_from_all(config: DataConfig, run: Run) -> None:
    loader = train(config, run, micro=COUNT)
    words = {VOCABULARY.words[batch.input_ids[i, 1]] for batch in take(loader, 2) for i in range(9)}
    assert words == {"number", "picture"}


def test_reading_leaves_the_global_random_numbers_alone(config: DataConfig, run: Run) -> None:
    before = torch.get_rng_state()
    loader, held_out = make_loaders(config, run)
    take(loader, 3)
    loader.seek(8)
    take(loader, 1)
    list(held_out)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_knows_the_data_of_its_checkpoint(config: DataConfig, run: Run) -> None:
    loader = train(config, run)
    loader.check_state(json.loads(json.dumps(loader.state())))
    with pytest.raises(UserError, match=r"data.train holds \[30\] samples, .* had \[29\]"):
        loader.check_state({"samples": [29]})


def test_as_many_samples_in_other_shards_are_other_data(run: Run, tmp_path: Path) -> None:
    """The order is drawn from the shards' sizes."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, per_shard in ((a, 5), (b, 4)):
        write_shards(map(record, range(12)), folder, "x", per_shard=per_shard)
    one, other = (
        train(data_config(folder / "x-*.tar", folder / "x-*.tar"), run) for folder in (a, b)
    )
    with pytest.raises(UserError, match=r"^data.train holds as many samples .* of other sizes"):
        other.check_state(one.state())


def test_images_may_be_higher_than_wide(config: DataConfig, run: Run) -> None:
    for resize, scale in (("squash", [0.3, 1.0]), ("center_crop", None)):
        changed = replace(config, resize=resize, crop_scale=scale)
        loader, held_out = make_loaders(changed, run, image_size=(24, 8))
        for batch in (next(loader), next(iter(held_out))):
            assert batch.images.shape == (4, 3, 24, 8)


@pytest.mark.parametrize("resize", ["squash", "center_crop"])
def test_training_images_without_a_crop_are_held_out_ones(
    config: DataConfig, run: Run, resize: str
) -> None:
    config = replace(config, val=config.train, resize=resize, crop_scale=None, flip=False)
    config = replace(config, decode="exact")  # held-out ones always are
    loader, held_out = make_loaders(config, run, micro=COUNT, eval_batch=COUNT)
    shown, plain = next(loader), next(iter(held_out))
    for i, key in enumerate(plain.keys):
        assert torch.equal(shown.images[shown.keys.index(key)], plain.images[i])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_caption_can_be_loaded(config: DataConfig, run: Run, kind: str) -> None:
    config = replace(config, tokenizer=kind)
    sources = open_sources(config, run)
    vocabulary = build_vocabulary(config, sources, run, 600)
    loader, _ = build_loaders(
        config,
        sources,
        vocabulary,
        run,
        image_size=(16, 16),
        micro_batches=(4,),
        eval_batch_size=4,
        max_eval=None,
    )
    batch = next(loader)
    assert (batch.input_ids[:, 0] == vocabulary.special_ids["[CLS]"]).all()
    lengths = batch.attention_mask.sum(1)
    if kind != "albef":
        last = batch.input_ids[torch.arange(4), lengths - 1]
        assert (last == vocabulary.special_ids["[SEP]"]).all()
    if kind == "clip":
        assert torch.equal(batch.input_ids.argmax(1), lengths - 1)


# The held-out pairs


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("limit", [None, 1, 7])
def test_every_held_out_pair_comes_once(
    config: DataConfig, tmp_path: Path, ranks: int, batch_size: int, limit: int | None
) -> None:
    size = limit or VAL
    shares = []
    for rank in range(ranks):
        run = make_run(tmp_path, rank, ranks)
        held_out = make_loaders(config, run, eval_batch=batch_size, max_eval=limit)[1]
        assert len(held_out) == size
        shares.append([numbers(batch) for batch in held_out])
    lengths = [[len(batch) for batch in share] for share in shares]
    assert all(other == lengths[0] for other in lengths)
    rows = [[n for batch in share for n in batch] for share in shares]
    interleaved = [n for row in zip(*rows, strict=True) for n in row]
    assert interleaved[:size] == list(range(100, 100 + size))
    assert set(interleaved[size:]) <= {100 + size - 1}


def test_a_second_pass_is_the_same(config: DataConfig, run: Run) -> None:
    for workers in (0, 2):
        held_out = make_loaders(replace(config, workers=workers), run)[1]
        first, second = list(held_out), list(held_out)
        assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_held_out_pairs_are_neither_cropped_nor_drawn(config: DataConfig, run: Run) -> None:
    batches = [list(make_loaders(config, replace(run, seed=s))[1]) for s in (1, 2)]
    assert all(same(a, b) for a, b in zip(*batches, strict=True))
    assert {VOCABULARY.words[i] for b in batches[0] for i in b.input_ids[:, 1]} == {"number"}


def _rank(rank: int, port: int, config: DataConfig, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = make_run(folder, rank, 2)
    dist.start(run.ranks)
    held_out = make_loaders(config, run)[1]
    rows = torch.cat([torch.tensor(numbers(batch)) for batch in held_out]).unsqueeze(1)
    ordered = _in_order(rows, len(held_out)).flatten().tolist()
    (folder / f"rank{rank}.json").write_text(json.dumps(ordered))
    dist.stop()


@pytest.mark.world_size(2)
def test_gathered_rows_are_in_order_without_the_fill_up(config: DataConfig, tmp_path: Path) -> None:
    assert VAL % 2  # so that there is one row to drop
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(r, port, config, tmp_path)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    for rank, process in enumerate(ranks):
        assert process.exitcode == 0
        ordered = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert ordered == list(range(100, 100 + VAL))


# Samples that cannot be used


def error_of(loader: TrainLoader, kind: type[UserError] = UserError) -> str:
    """The line with which it stops. Keeps no traceback, which would keep its workers alive until
    a collection of garbage, which closes the queue that ends them before they are told.
    """
    try:
        for _ in range(100):
            next(loader)
    except UserError as error:
        assert type(error.with_traceback(None)) is kind
        return str(error)
    pytest.fail("it went on")


def members(number: int) -> dict[str, bytes]:
    name = record(number).key
    return {f"{name}.png": png(number), f"{name}.txt": record(number).captions[0].encode()}


def shard_with(path: Path, count: int, bad: dict[int, str]) -> Path:
    """Samples 0 to count - 1; bad: which of them lack their image or caption, or have a cut one."""
    listed = []
    for number in range(count):
        parts = members(number)
        match bad.get(number):
            case "no image":
                parts.pop(f"{record(number).key}.png")
            case "no caption":
                parts.pop(f"{record(number).key}.txt")
            case "cut":
                parts[f"{record(number).key}.png"] = png(number)[:60]
        listed += parts.items()
    return write_tar(path, listed)


BAD = {3: "cut", 4: "no caption", 9: "no image"}


@pytest.fixture
def broken(tmp_path: Path, config: DataConfig) -> DataConfig:
    shard = shard_with(tmp_path / "broken.tar", 12, BAD)
    return replace(data_config(shard, shard), max_bad_share=0.5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_named_and_the_next_one_takes_its_place(
    broken: DataConfig, run: Run, workers: int
) -> None:
    loader = train(replace(broken, workers=workers), run, micro=12)
    batch = next(loader)
    # 3 and 4 give way to 5, 9 to 10.
    assert sorted(numbers(batch)) == sorted([0, 1, 2, 5, 5, 5, 6, 7, 8, 10, 10, 11])
    shard = broken.train[0].shards
    assert {skipped.shard for skipped in batch.skipped} == {shard}
    assert sorted(skipped.key for skipped in batch.skipped) == ["r0003", "r0004", "r0004", "r0009"]
    reasons = {skipped.key: skipped.reason for skipped in batch.skipped}
    assert (reasons["r0004"], reasons["r0009"]) == ("no caption", "no image")
    assert reasons["r0003"].startswith("cannot be decoded: ")
    source = broken.train[0].shards
    assert loader.bad == {(source, "decode"): 1, (source, "caption"): 2, (source, "image"): 1}
    lines = [json.loads(line) for line in (run.dir / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["r0003", "r0004", "r0009"]
    assert {line["shard"] for line in lines} == {shard}


def test_a_replacement_is_the_sample_itself(broken: DataConfig, run: Run) -> None:
    batch = next(train(broken, run, micro=12))
    rows = [i for i, number in enumerate(numbers(batch)) if number == 5]
    assert len(rows) == 3
    for a, b in pairwise(rows):
        assert torch.equal(batch.images[a], batch.images[b])
        assert batch.sample_key[a] == batch.sample_key[b]


def test_bad_held_out_pairs_are_named_once(broken: DataConfig, run: Run) -> None:
    held_out = make_loaders(broken, run)[1]
    for _ in range(2):
        skipped = joined(list(held_out)).skipped
        assert [s.key for s in skipped] == ["r0003", "r0004", "r0004", "r0009"]
    assert len((run.dir / "skipped.jsonl").read_text().splitlines()) == 3


def test_too_many_bad_samples_stop_the_run(broken: DataConfig, run: Run) -> None:
    loader = train(replace(broken, max_bad_share=0.1), run, micro=8)
    line = error_of(loader)
    read = loader._intake.read
    assert 200 <= read < 216
    assert line == (
        f"{loader.bad.total()} of {read} samples read cannot be used, more than "
        f"data.max_bad_share=0.1; most often: no caption; see {run.dir}/skipped.jsonl"
    )


def test_as_many_bad_samples_as_allowed_do_not(broken: DataConfig, run: Run) -> None:
    take(train(broken, run, micro=8), 60)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_a_usable_sample(tmp_path: Path, run: Run, workers: int) -> None:
    shard = shard_with(tmp_path / "x.tar", 5, dict.fromkeys(range(5), "no caption"))
    loader = train(data_config(shard, shard, f"data.workers={workers}"), run)
    line = error_of(loader)
    assert line.startswith(f"data: 5 samples in a row of {shard} cannot be used, from ")
    assert line.endswith(f" of {shard} on (no caption)")


def test_a_shard_that_its_index_does_not_describe(tmp_path: Path, run: Run) -> None:
    shard = shard_with(tmp_path / "x.tar", 5, {})
    entry = {"samples": 6, "bytes": shard.stat().st_size}
    (tmp_path / INDEX).write_text(json.dumps({"x.tar": entry}))
    line = error_of(train(data_config(shard, shard), run))
    assert line.startswith(f"data: shard {shard} holds 5 samples, counted were 6; it was changed")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_gone_gives_way_to_its_neighbour(
    tmp_path: Path, run: Run, workers: int
) -> None:
    write_shards(map(record, range(15)), tmp_path, "x", per_shard=5)
    paths = tmp_path / "x-*.tar"
    loader = train(data_config(paths, paths, f"data.workers={workers}"), run, micro=15)
    gone = tmp_path / "x-000001.tar"
    gone.unlink()
    batch = next(loader)
    # 5 to 9 give way to 10 to 14, each to its own.
    assert sorted(numbers(batch)) == sorted([*range(5), *range(10, 15), *range(10, 15)])
    assert loader.bad == {(str(paths), "missing"): 5}
    assert {(s.shard, s.key, s.reason) for s in batch.skipped} == {
        (str(gone), "", "No such file or directory")
    }


def test_a_source_whose_shards_are_all_gone(tmp_path: Path, run: Run) -> None:
    shard = shard_with(tmp_path / "x.tar", 5, {})
    loader = train(data_config(shard, shard), run)
    shard.unlink()
    line = error_of(loader, PassingError)  # they may be there at the next start
    assert line == (
        f"data: 5 samples in a row of {shard} cannot be used, from one of {shard} on "
        "(No such file or directory)"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_does_not_answer_is_left_behind(tmp_path: Path, run: Run, workers: int) -> None:
    """Opening a named pipe that nobody writes to waits for ever, as a dead file server does."""
    write_shards(map(record, range(10)), tmp_path, "x", per_shard=5)
    paths = tmp_path / "x-*.tar"
    words = (f"data.workers={workers}", "data.time_limit_seconds=0.2")
    loader = train(data_config(paths, tmp_path / "x-000000.tar", *words), run, micro=10)
    stuck = tmp_path / "x-000001.tar"
    stuck.unlink()
    os.mkfifo(stuck)
    batch = next(loader)
    assert sorted(numbers(batch)) == sorted([*range(5), *range(5)])
    assert loader.bad == {(str(paths), "slow"): 5}
    assert batch.skipped[0].reason == "no answer within 0.2 s"


def test_few_shards_stay_open(tmp_path: Path, run: Run) -> None:
    write_shards(map(record, range(70)), tmp_path, "x", per_shard=1)
    loader = train(data_config(tmp_path / "x-*.tar", tmp_path / "x-000000.tar"), run, micro=70)
    assert sorted(numbers(next(loader))) == list(range(70))
    assert len(loader.dataset._readers) == 32


def test_a_shard_that_failed_is_tried_again_after_a_while(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few shards there are, so that none is pushed out."""
    _, away = write_shards(map(record, range(10)), tmp_path, "x", per_shard=5)
    words = ("data.workers=0", "data.max_bad_share=0.9")
    loader = train(data_config(tmp_path / "x-*.tar", tmp_path / "x-*.tar", *words), run, micro=10)
    away.rename(tmp_path / "away")
    assert len(next(loader).skipped) == 5
    (tmp_path / "away").rename(away)
    assert len(next(loader).skipped) == 5
    monkeypatch.setattr(pairs, "AGAIN_SECONDS", 0.0)
    loader.dataset._give_up(away, "made to forget")
    assert not next(loader).skipped


def test_a_shard_that_fails_again_and_again_takes_no_memory(tmp_path: Path, run: Run) -> None:
    """An error that is raised anew grows by a traceback each time, with all that it refers to."""
    shards = write_shards(map(record, range(10)), tmp_path, "x", per_shard=5)
    loader = train(data_config(tmp_path / "x-*.tar", shards[0]), run)
    shards[1].unlink()
    depths = []
    for _ in range(3):
        with pytest.raises(BadShard) as caught:
            loader.dataset._reader(loader.dataset.sources[0], 1)
        depths.append(len(caught.traceback))
    assert len(set(depths)) == 1

"""Small shards, runs and loaders, made by the tests of this folder."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from elip_ds.config import load_config
from elip_ds.config.schema import DataConfig, ShardSource
from elip_ds.data import Batch, HeldOut, TrainLoader, Vocabulary, build_loaders, open_sources
from elip_ds.data.corpus import build_fetcher
from elip_ds.data.record import Record
from elip_ds.data.shards import count_samples
from elip_ds.data.vocabulary import SPECIALS
from elip_ds.dist import Ranks
from elip_ds.run import Run

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = Vocabulary.of_words((*SPECIALS, "number", "picture", *WORDS))


def png(number: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """A picture that is like no other number's."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def record(number: int) -> Record:
    name = " ".join(WORDS[int(digit)] for digit in str(number))
    captions = (f"number {name}", f"picture {name}")
    return Record(f"r{number:04d}", png(number), "png", captions, {"number": number})


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_run(folder: Path, rank: int = 0, world_size: int = 1, seed: int = 42) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(Ranks(rank, rank, world_size, world_size, torch.device("cpu")), folder, seed)


def data_config(train: Path | str, val: Path | str, *words: str) -> DataConfig:
    words = words or ("data.workers=0",)
    config = load_config(["data.text_length=6", "data.crop_scale=[0.3, 1]", *words]).data
    return DataConfig(
        **vars(config) | {"train": [ShardSource(str(train))], "val": [ShardSource(str(val))]}
    )


def count(shards: Sequence[Path], key: str = "data.train") -> list[int]:
    """Samples of local shards."""
    return count_samples(shards, key, build_fetcher(DataConfig())).samples


def make_loaders(
    config: DataConfig,
    run: Run,
    *,
    micro: int = 4,
    eval_batch: int = 4,
    max_eval: int | None = None,
    image_size: tuple[int, int] = (16, 16),
) -> tuple[TrainLoader, HeldOut]:
    return build_loaders(
        config,
        open_sources(config, run),
        VOCABULARY,
        run,
        image_size=image_size,
        micro_batches=(micro,) * run.world_size,
        eval_batch_size=eval_batch,
        max_eval=max_eval,
    )


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches one behind the other, as one."""
    names = ("images", "input_ids", "attention_mask", "sample_key")
    return Batch(
        **{name: torch.cat([getattr(batch, name) for batch in batches]) for name in names},
        keys=tuple(key for batch in batches for key in batch.keys),
        skipped=tuple(skipped for batch in batches for skipped in batch.skipped),
    )


def same(a: Batch, b: Batch) -> bool:
    names = ("images", "input_ids", "attention_mask", "sample_key")
    equal = all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
    return equal and a.keys == b.keys and a.skipped == b.skipped

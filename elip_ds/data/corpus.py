"""What a run reads: the shards that its configuration names, counted, and its vocabulary."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elip_ds import dist
from elip_ds.config.schema import DataConfig
from elip_ds.data.builtin import builtin_shards
from elip_ds.data.fetch import Fetcher
from elip_ds.data.learn import check_size, learn_vocabulary
from elip_ds.data.order import SourceSize
from elip_ds.data.patience import Patience
from elip_ds.data.record import BadSample, BadShard
from elip_ds.data.shards import Counted, Shard, ShardReader, count_samples, expand_shards
from elip_ds.data.vocabulary import Vocabulary, read_vocabulary
from elip_ds.data.vocabulary_files import load_vocabulary
from elip_ds.errors import PassingError, UserError
from elip_ds.run import TOKENIZER, Run


@dataclass(frozen=True)
class Source:
    """name: as the config has it.  shards, counts: tar files and the samples in each.
    weight, caption: of its ShardSource.
    """

    name: str
    shards: tuple[Shard, ...]
    counts: tuple[int, ...]
    weight: float = 1.0
    caption: str = "random"

    @property
    def size(self) -> SourceSize:
        return SourceSize(self.counts, self.weight)


def build_fetcher(config: DataConfig) -> Fetcher:
    return Fetcher(config.cache, Patience(config.time_limit_seconds), config.retries)


def check_inputs(config: DataConfig) -> None:
    """Raises UserError for shards or a vocabulary that are not there; counts and reads no sample.

    What does not answer in time is left to open_sources.
    """
    patience = build_fetcher(config).patience
    for split, entries in (("train", config.train), ("val", config.val)):
        for i, entry in enumerate(entries):
            if entry.shards != "builtin":
                with suppress(TimeoutError):
                    patience(expand_shards, entry.shards, _key(split, entries, i))
    if config.vocabulary != "auto":
        load_vocabulary(config.vocabulary, config.tokenizer, Path(config.root))


def open_sources(config: DataConfig, run: Run) -> dict[str, list[Source]]:
    """The sources of both splits, counted by one rank for all. Raises UserError for a missing or
    empty one.
    """
    if any(entry.shards == "builtin" for entry in [*config.train, *config.val]):
        builtin = builtin_shards(config.builtin, run)
    fetcher = build_fetcher(config)
    splits: dict[str, list[Source]] = {}
    for split, entries in (("train", config.train), ("val", config.val)):
        splits[split] = []
        for i, entry in enumerate(entries):
            key = _key(split, entries, i)
            is_builtin = entry.shards == "builtin"
            found: UserError | tuple[Sequence[Shard], Counted] | None = None
            if dist.rank() == 0:
                try:
                    listed = (
                        [*builtin[split]]
                        if is_builtin
                        else fetcher.patience(expand_shards, entry.shards, key)
                    )
                    found = listed, count_samples(listed, key, fetcher, entry.index)
                except UserError as error:
                    found = error
                except TimeoutError as error:
                    found = PassingError(
                        f"{key}={entry.shards} cannot be listed: {error} (data.time_limit_seconds)"
                    )
            found = dist.gather_objects(found)[0]
            if isinstance(found, UserError):
                raise found
            assert found is not None
            shards, counted = found
            if run.first:
                for shard in counted.cut:
                    run.note_skipped(str(shard), "", "it ends too early; what is left is used")
            counts = tuple(counted.samples)
            source = Source(entry.shards, tuple(shards), counts, entry.weight, entry.caption)
            splits[split].append(source)
    return splits


def _key(split: str, entries: Sequence[Any], number: int) -> str:
    return f"data.{split}" if len(entries) == 1 else f"data.{split}[{number}]"


def build_vocabulary(
    config: DataConfig, sources: dict[str, list[Source]], run: Run, size: int
) -> Vocabulary:
    """What the config names, or one learned from the training captions; kept with the run.

    Raises UserError when it has more than size entries, or is not the one that the run began with.
    """
    kept, given = run.dir / TOKENIZER, None
    if config.vocabulary == "auto":
        check_size(size, config.tokenizer)
    else:
        given = load_vocabulary(config.vocabulary, config.tokenizer, Path(config.root))
        _check_fits(given, size, f"data.vocabulary={config.vocabulary}")
    if run.first and not kept.exists():
        captions = _captions(sources["train"], build_fetcher(config)) if given is None else ()
        run.write_text(kept, (given or learn_vocabulary(captions, size, config.tokenizer)).json)
    run.wait()
    vocabulary = read_vocabulary(kept)
    for key, wanted, found in (
        (f"data.tokenizer={config.tokenizer}", config.tokenizer, vocabulary.kind),
        (f"data.vocabulary={config.vocabulary}", given or vocabulary, vocabulary),
    ):
        if found != wanted:
            raise UserError(
                f"{key} is not that of {kept}, with which this run began; choose another run.name"
            )
    _check_fits(vocabulary, size, f"{kept}, with which this run began,")
    return vocabulary


def _check_fits(vocabulary: Vocabulary, size: int, name: str) -> None:
    if len(vocabulary) > size:
        raise UserError(
            f"{name} has {len(vocabulary)} entries, model.text.vocab_size={size}; set "
            f"model.text.vocab_size={len(vocabulary)}"
        )


def _captions(sources: Sequence[Source], fetcher: Fetcher) -> Iterator[str]:
    """What cannot be read is left out; the loader names it."""
    for source in sources:
        for shard in source.shards:
            with suppress(BadShard, TimeoutError):
                reader = fetcher.use(shard, ShardReader)
                for i in range(len(reader)):
                    with suppress(BadSample):
                        yield from fetcher.patience(reader.captions, i)
                reader.close()

"""Sources found and counted; the vocabulary given or learned, and kept with the run."""

import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from made_shards import VOCABULARY, data_config, make_run, record, write_tar

from elip_ds.config.schema import BuiltinConfig, DataConfig, ShardSource
from elip_ds.data import Vocabulary, build_vocabulary, corpus, open_sources, read_vocabulary
from elip_ds.data.builtin import builtin_shards
from elip_ds.data.shards import write_shards
from elip_ds.data.sources.synthetic import MIN_IMAGE_SIZE
from elip_ds.data.vocabulary import KINDS
from elip_ds.errors import UserError
from elip_ds.run import Run


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_shards(map(record, range(9)), tmp_path, "train", per_shard=5)
    return data_config(tmp_path / "train-{000000..000001}.tar", tmp_path / "train-000000.tar")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


def test_sources_are_found_and_counted(config: DataConfig, run: Run, tmp_path: Path) -> None:
    sources = open_sources(config, run)
    (train,), (val,) = sources["train"], sources["val"]
    assert train.shards == (tmp_path / "train-000000.tar", tmp_path / "train-000001.tar")
    assert (train.counts, train.size.samples, train.size.per_epoch) == ((5, 4), 9, 9)
    assert (val.counts, val.name) == ((5,), f"{tmp_path}/train-000000.tar")


def test_no_held_out_source_is_none(config: DataConfig, run: Run) -> None:
    assert open_sources(replace(config, val=[]), run)["val"] == []


def test_an_error_names_the_source(config: DataConfig, run: Run, tmp_path: Path) -> None:
    two = [*config.train, ShardSource(f"{tmp_path}/x-*.tar", 2.0)]
    with pytest.raises(UserError, match=r"^data.train\[1\]: no file matches .*/x-\*.tar$"):
        open_sources(replace(config, train=two), run)
    with pytest.raises(UserError, match=r"^data\.val: no file matches"):
        open_sources(replace(config, val=two[1:]), run)


def test_a_file_server_that_does_not_answer_at_the_start_is_one_line(
    config: DataConfig, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(corpus, "expand_shards", lambda pattern, key: answer.wait(20))
    name = re.escape(config.train[0].shards)
    line = rf"^data.train={name} cannot be listed: no answer within 0.1 s "
    with pytest.raises(UserError, match=line):
        open_sources(replace(config, time_limit_seconds=0.1), run)
    answer.set()


def test_the_built_in_scenes_are_written_once(tmp_path: Path, run: Run) -> None:
    builtin = BuiltinConfig(dir=str(tmp_path / "[scenes]"), train=3, val=2, image_size=48)
    shards = builtin_shards(builtin, run)
    assert {split: len(paths) for split, paths in shards.items()} == {"train": 1, "val": 1}
    times = [path.stat().st_mtime_ns for paths in shards.values() for path in paths]
    again = builtin_shards(builtin, run)
    assert [path.stat().st_mtime_ns for paths in again.values() for path in paths] == times
    other = builtin_shards(replace(builtin, train=4), run)
    assert other["train"] != shards["train"]
    names = [path.name for path in (tmp_path / "[scenes]").iterdir()]
    assert sorted(names) == ["48px-3-2", "48px-4-2"]


def test_scenes_that_cannot_be_written_or_are_gone(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    builtin = BuiltinConfig(dir=str(tmp_path / "file"), train=1, val=1)
    with pytest.raises(UserError, match=rf"^data.builtin.dir={tmp_path}/file: File exists$"):
        builtin_shards(builtin, run)
    builtin = replace(builtin, dir=str(tmp_path / "scenes"))
    builtin_shards(builtin, run)["val"][0].unlink()
    with pytest.raises(UserError, match=r"/64px-1-1 lacks its val shards; delete the folder"):
        builtin_shards(builtin, run)


def test_the_configuration_knows_the_smallest_scene() -> None:
    BuiltinConfig(image_size=MIN_IMAGE_SIZE)
    with pytest.raises(UserError, match=f"{MIN_IMAGE_SIZE} or more"):
        BuiltinConfig(image_size=MIN_IMAGE_SIZE - 1)


def test_a_vocabulary_is_learned_from_the_captions_and_kept(config: DataConfig, run: Run) -> None:
    vocabulary = build_vocabulary(config, open_sources(config, run), run, 100)
    assert {"number", "picture"} <= vocabulary.ids.keys()
    kept = run.dir / "tokenizer.json"
    assert read_vocabulary(kept) == vocabulary
    time = kept.stat().st_mtime_ns
    assert build_vocabulary(config, open_sources(config, run), run, 100) == vocabulary
    assert kept.stat().st_mtime_ns == time


def test_captions_count_even_if_their_image_is_missing(tmp_path: Path, run: Run) -> None:
    shard = write_tar(tmp_path / "x.tar", [("a.txt", b"zebra " * 9), ("b.cls", b"1")])
    config = data_config(shard, shard)
    assert "zebra" in build_vocabulary(config, open_sources(config, run), run, 100).ids


def test_a_given_vocabulary_is_kept_with_the_run(
    config: DataConfig, run: Run, tmp_path: Path
) -> None:
    given = tmp_path / "vocab.txt"
    given.write_text("\n".join(VOCABULARY.words))
    config = replace(config, vocabulary=str(given))
    assert build_vocabulary(config, {}, run, 17) == VOCABULARY
    assert read_vocabulary(run.dir / "tokenizer.json") == VOCABULARY

    given.write_text("\n".join([*VOCABULARY.words[:-1], "ten"]))
    with pytest.raises(
        UserError, match=rf"^data.vocabulary={given} is not that of {run.dir}/tokenizer"
    ):
        build_vocabulary(config, {}, run, 17)


def test_a_given_vocabulary_must_fit_the_model(
    config: DataConfig, run: Run, tmp_path: Path
) -> None:
    given = tmp_path / "vocab.txt"
    given.write_text("\n".join(VOCABULARY.words))
    config = replace(config, vocabulary=str(given))
    with pytest.raises(UserError, match=r"has 17 entries, .*; set model\.text\.vocab_size=17$"):
        build_vocabulary(config, {}, run, 16)
    assert not (run.dir / "tokenizer.json").exists()


def test_the_vocabulary_of_another_rank_is_read(config: DataConfig, tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / "run", rank, 2) for rank in (0, 1))
    words: Vocabulary = build_vocabulary(config, open_sources(config, first), first, 100)
    assert build_vocabulary(config, {}, second, 100) == words


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_of_every_kind_is_learned(config: DataConfig, run: Run, kind: str) -> None:
    config = replace(config, tokenizer=kind)
    vocabulary = build_vocabulary(config, open_sources(config, run), run, 600)
    assert vocabulary.kind == kind and KINDS[kind].min_entries < len(vocabulary) <= 600
    assert read_vocabulary(run.dir / "tokenizer.json") == vocabulary


def test_a_run_keeps_to_its_tokenizer(config: DataConfig, run: Run) -> None:
    sources = open_sources(config, run)
    build_vocabulary(config, sources, run, 600)
    line = rf"^data.tokenizer=clip is not that of {run.dir}/tokenizer.json, with which this run"
    with pytest.raises(UserError, match=line):
        build_vocabulary(replace(config, tokenizer="clip"), sources, run, 600)


def test_a_model_that_became_too_small_for_the_kept_vocabulary(
    config: DataConfig, run: Run
) -> None:
    sources = open_sources(config, run)
    kept = build_vocabulary(config, sources, run, 600)
    line = rf"tokenizer.json, with which this run began, has {len(kept)} entries"
    with pytest.raises(UserError, match=line):
        build_vocabulary(config, sources, run, len(kept) - 1)


def test_too_few_entries_for_a_kind_are_noticed_by_every_rank(
    config: DataConfig, tmp_path: Path
) -> None:
    config = replace(config, tokenizer="clip")
    for rank in (0, 1):
        with pytest.raises(UserError, match=r"model\.text\.vocab_size=64: .* has 514 entries"):
            build_vocabulary(config, {}, make_run(tmp_path / "run", rank, 2), 64)

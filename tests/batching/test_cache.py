"""Answers kept between runs: found for the same facts only, and never a reason to stop."""

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.batching.cache import SCHEMA, Cache, default_folder, fingerprint

NAMES = st.text(max_size=5)
SCALARS = st.none() | st.booleans() | st.integers() | NAMES | st.floats(0, 1)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(NAMES, SCALARS, max_size=3)
FACTS = st.dictionaries(NAMES, VALUES, min_size=1, max_size=4)
ANSWER = {"micro_batch_size": 96, "peaks": [1, 2, 3]}


@settings(deadline=None, derandomize=True, max_examples=50)
@given(FACTS, st.data())
def test_a_fingerprint_depends_on_every_fact_and_on_no_order(facts: dict, data) -> None:
    key = fingerprint(facts)
    assert len(key) == 64
    assert fingerprint(dict(reversed(facts.items()))) == key
    name = data.draw(st.sampled_from(sorted(facts)))
    assert fingerprint(facts | {name: [facts[name]]}) != key
    assert fingerprint({k: v for k, v in facts.items() if k != name}) != key


def test_a_fact_without_a_lasting_text_is_refused() -> None:
    with pytest.raises(TypeError):
        fingerprint({"device": object()})


def test_it_lies_where_caches_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "elip_ds" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "elip_ds" / "plans"


def test_what_is_written_is_read_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    Cache(folder).write("a", ANSWER)
    assert Cache(folder).read("a") == ANSWER
    assert Cache(folder).read("b") is None
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_a_forgotten_answer_is_none_until_the_next(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.forget("a")  # never given
    cache.write("a", ANSWER)
    cache.forget("a")
    assert Cache(tmp_path).read("a") is None
    cache.write("a", ANSWER)
    assert cache.read("a") == ANSWER


def test_another_code_s_answer_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = {"schema": SCHEMA + 1, "answer": ANSWER}
    (tmp_path / "a.json").write_text(json.dumps(entry))
    assert Cache(tmp_path).read("a") is None
    assert not caplog.records


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"schema": 2}', "\udcff"])
def test_an_unreadable_entry_is_none_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / "a.json").write_text(text, errors="surrogateescape")
    cache = Cache(tmp_path)
    assert cache.read("a") is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    cache.write("a", ANSWER)
    assert cache.read("a") == ANSWER


def test_a_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plans").write_text("a file")  # chmod would not stop root
    cache = Cache(tmp_path / "plans")
    cache.write("a", ANSWER)
    cache.forget("a")
    assert cache.read("a") is None
    assert len(caplog.records) == 1


def test_a_write_that_fails_halfway_leaves_the_old_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    cache.write("a", ANSWER)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.write("a", {"micro_batch_size": 1})
    assert cache.read("a") == ANSWER
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

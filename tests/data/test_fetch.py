"""Remote shards: copied whole, once, within a limit; what fails is tried again and then named."""

import errno
import http.server
import io
import json
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from made_shards import data_config, make_run, record, same, take
from made_shards import make_loaders as loaders

from elip_ds.config.schema import CacheConfig
from elip_ds.data import fetch, open_sources
from elip_ds.data.fetch import Fetcher
from elip_ds.data.patience import Patience
from elip_ds.data.record import BadShard
from elip_ds.data.shards import INDEX, expand_shards, write_shards
from elip_ds.errors import UserError


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder that only remote names reach."""
    folder = tmp_path / "there"
    write_shards(map(record, range(12)), folder, "x", per_shard=4)
    return folder


def fetcher(tmp_path: Path, *, gib: float = 1.0, seconds: float = 20, retries: int = 2) -> Fetcher:
    config = CacheConfig(dir=str(tmp_path / "here"), limit_gib=gib)
    return Fetcher(config, Patience(seconds), retries)


def copies(tmp_path: Path) -> list[str]:
    return sorted(p.name.partition("-")[2] for p in (tmp_path / "here").glob("[!.]*"))


@pytest.mark.parametrize("form", ["file://{}", "pipe:cat {}"])
def test_a_remote_file_is_copied_once(tmp_path: Path, there: Path, form: str) -> None:
    path, copy = there / "x-000000.tar", fetcher(tmp_path)
    found = copy.fetch(form.format(path))
    assert found.read_bytes() == path.read_bytes()
    path.unlink()
    assert copy.fetch(form.format(path)) == found


def test_files_of_one_name_in_two_places_stay_apart(tmp_path: Path) -> None:
    copy = fetcher(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_text(folder)
    found = [copy.fetch(f"file://{tmp_path}/{folder}/0.tar") for folder in ("a", "b")]
    assert [path.read_text() for path in found] == ["a", "b"]


def test_a_local_file_is_read_where_it_is(tmp_path: Path, there: Path) -> None:
    assert fetcher(tmp_path).local(there / "x-000000.tar") == there / "x-000000.tar"
    assert not (tmp_path / "here").exists()


def test_the_least_recently_used_copies_make_room(tmp_path: Path) -> None:
    copy = fetcher(tmp_path, gib=2500 / 2**30)
    names = []
    for i in range(3):
        (tmp_path / f"{i}.tar").write_bytes(bytes(1000))
        names.append(f"file://{tmp_path}/{i}.tar")
    copy.fetch(names[0])
    copy.fetch(names[1])
    copy.fetch(names[0])
    copy.fetch(names[2])  # 1 was used longest ago
    assert copies(tmp_path) == ["0.tar", "2.tar"]


def test_a_failure_is_tried_again(tmp_path: Path) -> None:
    script = tmp_path / "flaky.sh"
    script.write_text(f"echo >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) = 3 ] && echo ok")
    assert fetcher(tmp_path).fetch(f"pipe:sh {script}").read_text() == "ok\n"


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("file:///no/such.tar", "missing", "No such file or directory (3 tries)"),
        ("pipe:echo oh dear >&2; exit 3", "unreadable",
         "the command left with status 3: oh dear (3 tries)"),
        ("pipe:echo all of it; exit 4", "unreadable", "the command left with status 4 (3 tries)"),
        ("nosuch://bucket/x.tar", "unreadable", "Protocol not known: nosuch (3 tries)"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_named(tmp_path: Path, name: str, kind: str, reason: str) -> None:
    with pytest.raises(BadShard) as caught:
        fetcher(tmp_path).fetch(name)
    assert (caught.value.kind, str(caught.value)) == (kind, reason)
    assert copies(tmp_path) == []


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(BadShard) as caught:
        fetcher(tmp_path, seconds=0.2, retries=1).fetch("pipe:echo a; sleep 1000; echo b")
    assert caught.value.kind == "slow" and time.monotonic() - start < 20
    told = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 1000" not in told.splitlines()


@pytest.mark.parametrize(
    "command", ["echo a; exec >&-; sleep 1000.5", "echo a; setsid sleep 3 & echo b"]
)
def test_a_command_that_does_not_end_is_left_behind(tmp_path: Path, command: str) -> None:
    """One says that all is there and stays; of one a child that is out of reach keeps the pipe."""
    start = time.monotonic()
    with pytest.raises(BadShard) as caught:
        fetcher(tmp_path, seconds=0.2, retries=0).fetch(f"pipe:{command}")
    assert caught.value.kind == "slow" and time.monotonic() - start < 2.5
    assert copies(tmp_path) == []


def test_a_read_that_hangs_keeps_nobody_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing a buffered file waits for the thread that reads it."""
    ours, theirs = os.pipe()
    opened = open(ours, "rb")  # noqa: SIM115
    monkeypatch.setattr(fsspec, "open", lambda name, mode: SimpleNamespace(open=lambda: opened))
    with pytest.raises(BadShard) as caught:
        fetcher(tmp_path, seconds=0.2, retries=0).fetch("file:///x.tar")
    assert caught.value.kind == "slow"
    os.close(theirs)  # now it returns


class FullDisk(io.BytesIO):
    """Has room for 1500 bytes, and then for what was asked to go."""

    def __init__(self, room: list[int]) -> None:
        super().__init__()
        self.room = room

    def write(self, data: "memoryview") -> int:  # type: ignore[override]
        if self.room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room[0], len(data))
        self.room[0] -= taken
        return super().write(bytes(data[:taken]))


def test_a_chunk_goes_on_where_the_disk_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bytes(range(250)) * 10
    (tmp_path / "x.tar").write_bytes(whole)
    room, copy = [1500], fetcher(tmp_path)

    def make_room(wanted: int, limit: int) -> bool:
        assert (wanted, limit) == (1000, 0)
        room[0] = 5000
        return True

    monkeypatch.setattr(copy, "_make_room", make_room)
    file = FullDisk(room)
    copy._write(f"file://{tmp_path}/x.tar", file)  # type: ignore[arg-type]
    assert file.getvalue() == whole


def test_what_a_killed_process_began_is_deleted(tmp_path: Path) -> None:
    copy = fetcher(tmp_path)
    copy.fetch("pipe:echo a")
    left = tmp_path / "here" / ".0123-x.tar.partial"
    left.write_text("a beginning")
    copy.fetch("pipe:echo b")
    assert not left.exists()


def test_what_another_process_copies_is_left_alone(tmp_path: Path) -> None:
    wait = f"while [ ! -e {tmp_path}/end ]; do sleep 0.05; done"
    args = (fetcher(tmp_path), f"pipe:echo a; touch {tmp_path}/began; {wait}")
    process = multiprocessing.get_context("fork").Process(target=_fetch, args=args)
    process.start()
    while not (tmp_path / "began").exists():
        time.sleep(0.01)
    fetcher(tmp_path).fetch("pipe:echo b")
    assert len(list((tmp_path / "here").glob(".*.partial"))) == 1
    (tmp_path / "end").touch()
    process.join(30)
    assert process.exitcode == 0 and len(copies(tmp_path)) == 2


def test_a_copy_that_made_room_before_it_was_open_is_made_again(tmp_path: Path) -> None:
    copy, seen = fetcher(tmp_path), []

    def read(path: Path) -> str:
        seen.append(path)
        if len(seen) < 3:
            path.unlink()
            raise BadShard("it is gone", "missing")
        return path.read_text()

    assert copy.use("pipe:echo ok", read) == "ok\n" and len(seen) == 3
    seen.clear()
    (tmp_path / "x.tar").touch()
    with pytest.raises(BadShard, match="it is gone"):  # a file of this machine nobody makes again
        copy.use(tmp_path / "x.tar", read)
    assert len(seen) == 1


def test_using_a_copy_leaves_its_time_alone(tmp_path: Path) -> None:
    """By it a note of the shard's headers is known."""
    copy = fetcher(tmp_path)
    made = copy.fetch("pipe:echo").stat().st_mtime_ns
    assert copy.fetch("pipe:echo").stat().st_mtime_ns == made


def test_a_limit_below_one_shard_keeps_the_last(tmp_path: Path) -> None:
    copy = fetcher(tmp_path, gib=10 / 2**30)
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(bytes(1000))
        copy.fetch(f"file://{tmp_path}/{name}.tar")
    assert copies(tmp_path) == ["b.tar"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("a file")
    with pytest.raises(UserError, match=rf"^data.cache.dir={tmp_path}/here: .*; name another"):
        fetcher(tmp_path).fetch("pipe:echo")


def _fetch(copy: Fetcher, name: str) -> None:
    copy.fetch(name)


def test_processes_that_want_the_same_file_copy_it_once(tmp_path: Path) -> None:
    script = tmp_path / "slow.sh"
    script.write_text(f"echo >> {tmp_path}/tries; sleep 0.3; echo ok")
    fork = multiprocessing.get_context("fork")
    args = (fetcher(tmp_path), f"pipe:sh {script}")
    processes = [fork.Process(target=_fetch, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "tries").read_text() == "\n"


# The loader on remote shards


@pytest.fixture
def url(there: Path) -> Iterator[str]:
    """The folder behind a real web server."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(there))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "form",
    [
        "file://{there}/x-*.tar",
        "pipe:cat {there}/x-{{000000..000002}}.tar",
        "pipe:curl -sf {url}/x-{{000000..000002}}.tar",
    ],
)
def test_remote_shards_give_the_batches_of_local_ones(
    tmp_path: Path, there: Path, url: str, form: str
) -> None:
    local = data_config(there / "x-*.tar", there / "x-*.tar")
    remote = data_config(form.format(there=there, url=url), there / "x-*.tar")
    remote = replace(remote, cache=CacheConfig(dir=str(tmp_path / "here")))
    (a, _), (b, _) = (loaders(c, make_run(tmp_path / "run")) for c in (local, remote))
    for one, other in zip(take(a, 4), take(b, 4), strict=True):
        assert [k.partition("/")[2] for k in one.keys] == [k.partition("/")[2] for k in other.keys]
        assert same(one, other)


def test_a_remote_pattern_that_stands_for_nothing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^data.train: no file matches file://{tmp_path}/x-\*.tar$"
    ):
        expand_shards(f"file://{tmp_path}/x-*.tar", "data.train")


def test_the_question_mark_of_a_web_address_is_no_wildcard() -> None:
    name = "https://host.test/x.tar?signature=a*b"
    assert expand_shards(name, "data.train") == [name]


def test_an_index_spares_the_copies_at_the_start(tmp_path: Path, there: Path) -> None:
    remote = data_config(f"file://{there}/x-*.tar", f"pipe:cat {there}/x-000000.tar")
    train = replace(remote.train[0], index=f"pipe:cat {there}/{INDEX}")
    for name in ("x-000000.tar", "x-000001.tar", "x-000002.tar"):
        (there / name).write_bytes(b"not looked at")
    config = replace(remote, train=[train], cache=CacheConfig(dir=str(tmp_path / "here")))
    config = replace(config, val=config.train)
    sources = open_sources(config, make_run(tmp_path / "run"))
    assert sources["train"][0].counts == (4, 4, 4) and copies(tmp_path) == []


def test_a_shard_that_vanished_is_skipped_and_counted(tmp_path: Path, there: Path) -> None:
    remote = data_config(f"file://{there}/x-*.tar", there / "x-000000.tar")
    remote = replace(remote, cache=CacheConfig(dir=str(tmp_path / "here")), max_bad_share=0.9)
    loader, _ = loaders(remote, make_run(tmp_path / "run"), micro=12)
    (there / "x-000001.tar").unlink()
    assert len(next(loader)) == 12
    assert loader.bad == {(remote.train[0].shards, "missing"): 4}
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["shard"] for line in lines} == {f"file://{there}/x-000001.tar"}

"""The process that serves a node's ranks, over real HTTP; ranks are sleeping processes."""

import base64
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from metrics.prom_tools import promtool
from prometheus_client.parser import text_string_to_metric_families

from elip_ds.metrics import endpoint
from elip_ds.metrics.endpoint import TRIES, Settings, alive, merge
from elip_ds.metrics.exporter import Exporter, who

SCRIPT = endpoint.__file__
DEADLINE = 30


def until(ready: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not ready():
        assert time.monotonic() < end, f"{what}: not within {DEADLINE} s"
        time.sleep(0.02)


class Rank:
    """A process that is only there, and what it would write."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.process = subprocess.Popen(["sleep", "100"])
        self.who = {
            "pid": self.process.pid,
            "created": psutil.Process(self.process.pid).create_time(),
        }
        self.exporter = Exporter(run="demo", node="n1", rank=rank)
        self.write()

    def write(self, *, closed: bool = False) -> None:
        head = {"rank": self.rank, "closed": closed, **self.who}
        text = f"# {json.dumps(head)}\n{self.exporter.text()}"
        path = self.folder / f"rank-{self.rank:05d}.prom"
        path.with_suffix(".tmp").write_text(text)
        os.replace(path.with_suffix(".tmp"), path)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Served:
    """Two ranks and their endpoint."""

    def __init__(self, tmp_path: Path, **settings: object) -> None:
        self.run_dir, self.folder = tmp_path / "run", tmp_path / "node"
        (self.run_dir / "metrics").mkdir(parents=True)
        self.folder.mkdir()
        self.ranks = [Rank(self.folder, 0), Rank(self.folder, 1)]
        chosen = {
            "folder": str(self.folder),
            "run_dir": str(self.run_dir),
            "run": "demo",
            "node": "n1",
            "job": "",
            "start": "1",
            "first": True,
            "parent": self.ranks[0].who,
            "address": "127.0.0.1",
            "port": 0,
        }
        command = [sys.executable, SCRIPT, json.dumps(asdict(Settings(**chosen | settings)))]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with self.process.stdout as pipe:
            told = json.loads(pipe.readline())
        self.url, self.problems = told["url"], told["problems"]

    def end(self) -> None:
        """As a run that is done."""
        for rank in self.ranks:
            rank.write(closed=True)
        assert self.process.wait(DEADLINE) == 0

    def stop(self) -> None:
        for rank in self.ranks:
            rank.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(**settings: object) -> Served:
        started.append(Served(tmp_path / str(len(started)), **settings))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def get(url: str, **headers: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return answer.read().decode()


def values(text: str, name: str) -> dict[str, float]:
    """rank -> value."""
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    return {s.labels.get("rank", ""): s.value for s in samples if s.name == name}


def test_one_endpoint_has_the_series_of_all_ranks(serve):
    served = serve()
    for rank in served.ranks:
        rank.exporter["elip_memory_used_bytes"].set(100 + rank.rank)
        rank.write()
    text = get(served.url)
    assert values(text, "elip_memory_used_bytes") == {"0": 100, "1": 101}
    assert values(text, "elip_rank_up") == {"0": 1, "1": 1}
    assert values(text, "elip_step") == {"": 0}
    told = promtool("check", "metrics", stdin=text)
    assert (told.returncode, told.stderr) == (0, "")


@pytest.mark.parametrize("dead", [0, 1])
def test_it_outlives_a_rank_and_says_which_one_died(serve, dead):
    served = serve()
    served.ranks[dead].kill()
    until(lambda: values(get(served.url), "elip_rank_up")[str(dead)] == 0, "the death is seen")
    assert values(get(served.url), "elip_rank_up")[str(1 - dead)] == 1
    served.ranks[1 - dead].exporter["elip_memory_used_bytes"].set(7)
    served.ranks[1 - dead].write()
    assert values(get(served.url), "elip_memory_used_bytes")[str(1 - dead)] == 7


@pytest.mark.parametrize("how", ["done", "killed"])
def test_with_the_last_rank_it_goes_and_leaves_the_last_values(serve, tmp_path, how):
    served = serve(sd_dir=str(tmp_path / "sd"), textfile_dir=str(tmp_path / "text"))
    assert len([*(tmp_path / "sd").iterdir()]) == len([*(tmp_path / "text").iterdir()]) == 1
    served.ranks[0].exporter["elip_step"].set(41)
    served.ranks[0].write()
    if how == "done":
        served.end()
    else:
        for rank in served.ranks:
            rank.kill()
        assert served.process.wait(DEADLINE) == 0
    assert values((served.run_dir / "final.prom").read_text(), "elip_step") == {"": 41}
    assert not any((tmp_path / "sd").iterdir()) and not any((tmp_path / "text").iterdir())
    assert not served.folder.exists()
    with pytest.raises(urllib.error.URLError):
        get(served.url)


def test_signals_are_for_the_ranks(serve):
    served = serve()
    for number in (1, 2, 10, 12, 15):
        served.process.send_signal(number)
    assert values(get(served.url), "elip_rank_up") == {"0": 1, "1": 1}


def test_the_target_is_the_endpoint_with_its_run_and_job(serve, tmp_path):
    served = serve(sd_dir=str(tmp_path / "sd"), job="4711")
    (path,) = (tmp_path / "sd").iterdir()
    (group,) = json.loads(path.read_text())
    assert [f"http://{target}/metrics" for target in group["targets"]] == [served.url]
    shown = {key: value for key, value in group["labels"].items() if not key.startswith("__")}
    exporter = {"exporter": "elip_ds"}  # by which rules know whose target does not answer
    assert shown == {"run": "demo", "node": "n1", "slurm_job_id": "4711", **exporter}
    assert (served.run_dir / "metrics.url").read_text() == served.url + "\n"


@pytest.mark.parametrize("kind", ["sd_dir", "textfile_dir"])
def test_what_a_killed_node_left_behind_is_taken_away_by_the_next_start(serve, tmp_path, kind):
    folder = tmp_path / "shared"
    first = serve(**{kind: str(folder)})
    first.process.kill()  # and with it all who could tidy up
    first.process.wait()
    (stale,) = folder.iterdir()
    foreign = folder / ("elip-other.json" if kind == "sd_dir" else "elip-other.prom")
    foreign.write_text("[]")
    serve(**{kind: str(folder)})
    assert not stale.exists() and foreign.exists()
    assert len([*folder.iterdir()]) == 2


def test_the_file_for_node_exporter_is_an_exposition(serve, tmp_path):
    serve(textfile_dir=str(tmp_path / "text"), port=None)
    (path,) = (tmp_path / "text").iterdir()
    told = promtool("check", "metrics", stdin=path.read_text())
    assert (told.returncode, told.stderr) == (0, "")
    assert values(path.read_text(), "elip_rank_up") == {"0": 1, "1": 1}


def test_a_taken_port_gives_way_to_the_next_free_one(serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        served = serve(port=port)
        assert port < int(served.url.rpartition(":")[2].removesuffix("/metrics")) < port + TRIES


@pytest.mark.parametrize("address", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_ours_stops_nothing(serve, address):
    served = serve(address=address)
    assert served.url is None
    assert address in served.problems[0]
    served.end()


def test_a_folder_that_cannot_be_written_stops_nothing(serve, tmp_path):
    (tmp_path / "file").write_text("")
    served = serve(sd_dir=str(tmp_path / "file"))
    assert "elip_rank_up" in get(served.url)
    assert "metrics.sd_dir" in served.problems[0]


def test_a_password_keeps_others_out(serve, tmp_path):
    (tmp_path / "password").write_text("prometheus:secret\n")
    served = serve(password_file=str(tmp_path / "password"))
    for headers in ({}, {"Authorization": "Basic AAAA"}):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(served.url, **headers)
    token = base64.b64encode(b"prometheus:secret").decode()
    assert "elip_rank_up" in get(served.url, Authorization=f"Basic {token}")


def test_with_a_certificate_it_speaks_tls(serve, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed, which makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout {key}"
    more = ["-out", str(certificate), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command.split(), *more], check=True, capture_output=True)
    served = serve(certificate=str(certificate), key=str(key), sd_dir=str(tmp_path / "sd"))
    assert served.url.startswith("https://")
    context = ssl.create_default_context(cafile=str(certificate))
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    with opener.open(served.url, timeout=30) as answer:
        assert "elip_rank_up" in answer.read().decode()
    (path,) = (tmp_path / "sd").iterdir()
    assert json.loads(path.read_text())[0]["labels"]["__scheme__"] == "https"


def test_a_page_for_people_is_beside_the_series(serve):
    served = serve()
    page = get(served.url.removesuffix("metrics"))
    assert page.startswith("<!DOCTYPE html>") and "http-equiv" not in page
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(served.url + "/more")


def test_a_family_comes_once_however_many_have_it():
    one = '# HELP a x\n# TYPE a gauge\na{rank="0"} 1\n# HELP b y\n# TYPE b gauge\nb 1\n'
    two = '# HELP a x\n# TYPE a gauge\na{rank="1"} 2\n'
    assert merge([one, two]) == (
        '# HELP a x\n# TYPE a gauge\na{rank="0"} 1\na{rank="1"} 2\n'
        "# HELP b y\n# TYPE b gauge\nb 1\n"
    )


def test_a_later_process_of_the_same_number_is_another():
    me = who()
    assert alive(me)
    assert not alive(me | {"created": me["created"] - 100})

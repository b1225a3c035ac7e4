"""One node's telemetry, by a small process of its own: python endpoint.py SETTINGS (JSON).

Serves /metrics, the union of what the node's ranks have written (exporter.py), and / , a page for a
browser; keeps a target file for Prometheus' file-based discovery; or keeps a file for
node_exporter. It outlives every rank but the last: when all have closed or died it takes the
target away, leaves the last values in the run's folder, and ends.

Imports neither torch nor this package: it starts at once and takes a few MB.
"""

import base64
import errno
import hmac
import http.server
import json
import math
import os
import shutil
import signal
import socket
import ssl
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

TRIES = 20
"Ports from the one asked for on."
POLL_SECONDS = 0.5
TEXTFILE_SECONDS = 5.0
FINAL = "final.prom"
"In the run's folder: the last values of all nodes."
URL = "metrics.url"
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Settings:
    """folder: where the node's ranks write.  run_dir, run, node, job: whose they are.
    first: rank 0 is here.  parent: the rank that started this, as exporter.who() tells it.
    port: None, serve nothing.  password_file: holds USER:PASSWORD.  The rest as MetricsConfig.
    """

    folder: str
    run_dir: str
    run: str
    node: str
    job: str
    start: str
    first: bool
    parent: dict[str, Any]
    address: str
    port: int | None
    sd_dir: str | None = None
    textfile_dir: str | None = None
    certificate: str | None = None
    key: str | None = None
    password_file: str | None = None


# What the ranks have written.


def alive(process: dict[str, Any]) -> bool:
    """Whether a process, told by pid and time of birth, still runs."""
    try:
        found = psutil.Process(process["pid"])
        born = abs(found.create_time() - process["created"]) < 1
        return born and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def read_ranks(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """(rank, closed, pid, created), and the text, of each rank that has written one."""
    found = []
    for path in sorted(folder.glob("rank-*.prom")):
        head, _, text = path.read_text(encoding="utf-8").partition("\n")
        found.append((json.loads(head.removeprefix("# ")), text))
    return found


def merge(texts: list[str]) -> str:
    """One exposition of several: all samples of a family together, as the format wants them."""
    families: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                fresh = name not in families
                families.setdefault(name, [])
            if not line.startswith("#") or fresh:
                families[name].append(line)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def escaped(value: str) -> str:
    """As a label's value in the exposition."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Node:
    """What there is to say of one node."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.folder = settings, Path(settings.folder)

    def text(self) -> str:
        ranks = read_ranks(self.folder)
        labels = f'node="{escaped(self.settings.node)}",run="{escaped(self.settings.run)}"'
        lines = [
            "# HELP elip_rank_up 1 while the rank's process lives.",
            "# TYPE elip_rank_up gauge",
        ]
        lines += [
            f'elip_rank_up{{{labels},rank="{head["rank"]}"}} {float(alive(head))}'
            for head, _ in ranks
        ]
        return merge([*(text for _, text in ranks), "\n".join(lines)])

    def busy(self) -> bool:
        """Whether a rank may still write. The one that started this counts before it has."""
        heads = [head for head, _ in read_ranks(self.folder)]
        closed = {head["pid"] for head in heads if head["closed"]}
        waiting = [head for head in (*heads, self.settings.parent) if head["pid"] not in closed]
        return self.folder.exists() and any(alive(head) for head in waiting)


# Over HTTP.


class Handler(http.server.BaseHTTPRequestHandler):
    node: Node
    authorization: str | None = None

    def do_GET(self) -> None:
        if self.authorization is not None and not hmac.compare_digest(
            self.headers.get("Authorization", "").encode(), self.authorization.encode()
        ):
            self._answer(401, "text/plain", "who is asking?\n")
        elif self.path.partition("?")[0] == "/metrics":
            kind = "text/plain; version=0.0.4; charset=utf-8"
            self._answer(200, kind, self.node.text())
        elif self.path.partition("?")[0] == "/":
            self._answer(200, "text/html; charset=utf-8", PAGE.read_text(encoding="utf-8"))
        else:
            self._answer(404, "text/plain", "/metrics is for Prometheus, / for people\n")

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="elip_ds"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    # Where two listen on one port, the kernel deals requests to both.
    allow_reuse_port = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One who hangs up early, or speaks no TLS, is no fault of ours."""


def listen(settings: Settings, node: Node) -> Server:
    """On the port asked for or one of the next free ones; port 0 takes any. Raises OSError."""
    assert settings.port is not None
    members: dict[str, Any] = {"node": node}
    if settings.password_file:
        secret = Path(settings.password_file).read_text().strip().encode()
        members["authorization"] = f"Basic {base64.b64encode(secret).decode()}"
    handler = type("NodeHandler", (Handler,), members)
    server = first_free(settings.address, settings.port, handler)
    if settings.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.certificate, settings.key)
        # Handshakes belong to the requests' threads: one that is slow must not hold up the rest.
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
    return server


def first_free(address: str, port: int, handler: Any) -> Server:
    last = min(port + TRIES - 1, 65535)
    for candidate in range(port, last + 1):
        try:
            return Server((address, candidate), handler)
        except OSError as error:
            if candidate == last or error.errno != errno.EADDRINUSE:
                raise
    raise AssertionError


# What others find.


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.chmod(0o644)  # Prometheus is another user
    os.replace(partial, path)


class Notice:
    """A file in a folder that many jobs share, there while this process is. What was left by jobs
    that were killed with all their processes, the next one on their node takes away, or the next
    start of their run.
    """

    def __init__(self, settings: Settings, folder: str, suffix: str) -> None:
        me = psutil.Process()
        self.mark = {
            "run_dir": settings.run_dir,
            "node": settings.node,
            "start": settings.start,
            "pid": me.pid,
            "created": me.create_time(),
        }
        self.folder, self._suffix = Path(folder), suffix
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in settings.run)
        self.path = self.folder / f"elip-{name}-{settings.node}-{me.pid}{suffix}"

    def clean(self) -> None:
        for path in self.folder.glob(f"elip-*{self._suffix}"):
            try:
                if path.stat().st_uid != os.getuid():
                    continue  # whose processes may not be seen from here
                mark = read_mark(path)
                here = mark["node"] == self.mark["node"]
                same_run = mark["run_dir"] == self.mark["run_dir"]
                if (same_run and mark["start"] != self.mark["start"]) or (here and not alive(mark)):
                    path.unlink()
            except (OSError, ValueError, LookupError, TypeError):
                continue  # none of ours, or gone already

    def write(self, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, text)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def read_mark(path: Path) -> dict[str, Any]:
    """Of a notice that target_text or textfile_text made."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(json.loads(text)[0]["labels"]["__elip_mark"])
    return json.loads(text.partition("\n")[0].removeprefix("# "))


def target_text(settings: Settings, host_port: str, mark: dict[str, Any]) -> str:
    """For Prometheus' file_sd_configs; labels that begin with __ never reach a series."""
    labels = {"run": settings.run, "node": settings.node, "exporter": "elip_ds"}
    labels["__elip_mark"] = json.dumps(mark)
    if settings.job:
        labels["slurm_job_id"] = settings.job
    if settings.certificate:
        labels["__scheme__"] = "https"
    return json.dumps([{"targets": [host_port], "labels": labels}], indent=1)


def textfile_text(node: Node, mark: dict[str, Any]) -> str:
    return f"# {json.dumps(mark)}\n{node.text()}"


# From beginning to end.


def main(words: list[str]) -> None:
    settings = Settings(**json.loads(words[0]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are for the ranks, which this one outlives
    node, problems = Node(settings), list[str]()
    url, target = open_door(settings, node, problems)
    textfile = None
    if settings.textfile_dir:
        textfile = Notice(settings, settings.textfile_dir, ".prom")
        attempt(textfile.clean, problems, f"metrics.textfile_dir={settings.textfile_dir}")
    written = -math.inf
    told = False
    while node.busy():
        now = time.monotonic()
        if textfile and now - written >= TEXTFILE_SECONDS:
            text = textfile_text(node, textfile.mark)
            attempt(
                partial(textfile.write, text), problems, f"metrics.textfile_dir={textfile.path}"
            )
            written = now
        if not told:  # the rank that started this waits for the line
            sys.stdout.write(json.dumps({"url": url, "problems": problems}) + "\n")
            sys.stdout.flush()
            told = True
        time.sleep(POLL_SECONDS)
    for notice in (target, textfile):
        if notice:
            notice.remove()
    keep_last(settings, node)
    shutil.rmtree(settings.folder, ignore_errors=True)


def attempt(action: Any, problems: list[str], what: str) -> Any:
    """Telemetry stops no run, nor does a part of it stop the rest."""
    try:
        return action()
    except (OSError, ssl.SSLError, ValueError) as error:
        problems.append(f"{what}: {getattr(error, 'strerror', None) or error}")
        return None


def open_door(
    settings: Settings, node: Node, problems: list[str]
) -> tuple[str | None, Notice | None]:
    """The endpoint's URL, and the target file where one is asked for."""
    if settings.port is None:
        return None, None
    where = f"no endpoint on {settings.address}:{settings.port}"
    server = attempt(partial(listen, settings, node), problems, where)
    if server is None:
        return None, None
    everywhere = settings.address in ("0.0.0.0", "::", "")
    host = socket.gethostname() if everywhere else settings.address
    host_port = f"[{host}]:{server.server_port}" if ":" in host else f"{host}:{server.server_port}"
    url = f"http{'s' if settings.certificate else ''}://{host_port}/metrics"
    folder = Path(settings.run_dir) / "metrics"
    write = partial(write_whole, text=f"{url}\n")
    attempt(partial(write, folder / f"{settings.node}.url"), problems, str(folder))
    if settings.first:
        attempt(partial(write, Path(settings.run_dir) / URL), problems, settings.run_dir)
    if settings.sd_dir is None:
        return url, None
    target = Notice(settings, settings.sd_dir, ".json")
    attempt(target.clean, problems, f"metrics.sd_dir={settings.sd_dir}")
    text = target_text(settings, host_port, target.mark)
    attempt(partial(target.write, text), problems, f"metrics.sd_dir={settings.sd_dir}")
    return url, target


def keep_last(settings: Settings, node: Node) -> None:
    """This node's values, and with them those of all nodes that have ended."""
    folder = Path(settings.run_dir) / "metrics"
    try:
        write_whole(folder / f"{settings.node}.prom", node.text())
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.prom"))]
        write_whole(Path(settings.run_dir) / FINAL, merge(texts))
    except OSError:
        return  # the run's folder is gone or full: its log says so


if __name__ == "__main__":
    main(sys.argv[1:])

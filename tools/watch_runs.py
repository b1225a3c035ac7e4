"""Start a Prometheus of one's own on this machine, with the rules and the page, and watch runs.

examples:
  python tools/watch_runs.py --sd-dir runs/sd          # until Ctrl-C; runs: metrics.sd_dir=runs/sd
  python tools/watch_runs.py -- deepspeed elip_ds/train.py --deepspeed ds_configs/z2.json

Needs the programme prometheus (apt-get install --no-install-recommends prometheus). What follows
-- is run beside it, with metrics.sd_dir set; Prometheus stays when it ends, until Ctrl-C, so that
one can look at what was. Its data lie in --dir, or are gone with it.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elip_ds.errors import UserError, exit_with

METRICS = Path(__file__).resolve().parents[1] / "elip_ds" / "metrics"
READY_SECONDS = 30.0
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"Prometheus is on this machine: no proxy is in between."

CONFIG = """\
global: {{scrape_interval: {every}, evaluation_interval: {every}}}
rule_files: [{rules}]
scrape_configs:
  - job_name: elip_ds
    honor_labels: true
    file_sd_configs:
      - {{files: [{targets}], refresh_interval: {every}}}
"""


class Prometheus:
    """A running one. url: where it answers."""

    def __init__(self, url: str, process: subprocess.Popen) -> None:
        self.url, self.process = url, process

    @property
    def page(self) -> str:
        return f"{self.url}/consoles/elip.html"

    def ask(self, path: str, **words: str) -> Any:
        """The data of its answer to /api/v1/PATH. Raises UserError."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(words)}"
        try:
            with OPENER.open(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise UserError(f"{words}: {json.load(error)['error']}") from None

    def value(self, query: str) -> float | None:
        """Of a query with one result; None: it has none."""
        found = self.ask("query", query=query)["result"]
        return float(found[0]["value"][1]) if found else None


@contextlib.contextmanager
def running(
    folder: Path,
    sd_dir: Path,
    *,
    port: int = 0,
    every: str = "5s",
    rules: Path = METRICS / "rules.yml",
) -> Iterator[Prometheus]:
    """One with its data in folder, for the target files in sd_dir. port: 0 takes any free one.
    Raises UserError.
    """
    if not shutil.which("prometheus"):
        raise UserError(
            "no programme prometheus: apt-get install --no-install-recommends prometheus"
        )
    consoles = folder / "consoles"
    consoles.mkdir(parents=True, exist_ok=True)
    sd_dir.mkdir(parents=True, exist_ok=True)
    shutil.copy(METRICS / "page.html", consoles / "elip.html")
    (folder / "prometheus.yml").write_text(
        CONFIG.format(
            every=every,
            rules=json.dumps(str(rules)),
            targets=json.dumps(str(sd_dir.resolve() / "elip-*.json")),
        )
    )
    port = port or free_port()
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        f"--web.console.templates={consoles}",
        f"--web.console.libraries={consoles}",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("w") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors)
    try:
        started = Prometheus(f"http://127.0.0.1:{port}", process)
        wait_until_ready(started, folder / "prometheus.log")
        yield started
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(prometheus: Prometheus, errors: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and prometheus.process.poll() is None:
        with contextlib.suppress(OSError), OPENER.open(f"{prometheus.url}/-/ready", timeout=5):
            return
        time.sleep(0.1)
    raise UserError(f"prometheus does not start: {errors.read_text().strip()[-500:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="watch_runs.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sd-dir", type=Path, default=Path("runs/sd"), help="default runs/sd")
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus; 0: any free one")
    parser.add_argument("--dir", type=Path, help="for its data, which stay then")
    parser.add_argument("command", nargs="*", help="after --, run beside it")
    args = parser.parse_args(argv)
    # By default a kill would leave Prometheus behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        folder = args.dir or Path(stack.enter_context(tempfile.TemporaryDirectory("_prometheus")))
        prometheus = stack.enter_context(running(folder, args.sd_dir, port=args.port))
        print(f"dashboards: {prometheus.page}\nPrometheus: {prometheus.url}", flush=True)
        if os.environ.get("DISPLAY"):
            webbrowser.open(prometheus.page)
        with contextlib.suppress(KeyboardInterrupt):
            if args.command:
                words = [*args.command, f"metrics.sd_dir={args.sd_dir}"]
                status = subprocess.run(words).returncode
                print(f"ended with status {status}; {prometheus.page} is there until Ctrl-C")
            prometheus.process.wait()


if __name__ == "__main__":
    exit_with(main, sys.argv[1:])

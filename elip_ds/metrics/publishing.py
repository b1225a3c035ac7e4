"""From a rank's series to who asks for them: the node's folder, and the process that serves it."""

import hashlib
import json
import logging
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elip_ds import dist
from elip_ds.config.schema import MetricsConfig
from elip_ds.metrics.endpoint import FINAL, Settings
from elip_ds.metrics.exporter import Exporter, who
from elip_ds.run import Run

log = logging.getLogger(__name__)

START_SECONDS = 20.0
"The longest that training waits for the endpoint to come up, and at the end for it to go."


class Publisher:
    """Every rank has one, and makes it at the same time. url: of this node's endpoint, on its first
    rank.
    """

    def __init__(self, config: MetricsConfig, run: Run, exporter: Exporter) -> None:
        self._run, self._exporter = run, exporter
        self.url: str | None = None
        self._process: subprocess.Popen | None = None
        self._failed = False
        if run.first:  # of an earlier start
            shutil.rmtree(run.dir / "metrics", ignore_errors=True)
            (run.dir / "metrics").mkdir(exist_ok=True)  # NFS keeps what another process has open
        start = dist.gather_objects(time.time_ns())[0]
        self._served = config.port is not None or config.textfile_dir is not None
        if not self._served:
            return
        mark = f"{run.dir.resolve()} {start} {dist.node_name()}"
        digest = hashlib.sha256(mark.encode()).hexdigest()
        # Local to the node: a shared file system would not like a file a rank every other second.
        self._folder = Path(tempfile.gettempdir()) / f"elip_metrics_{os.getuid()}_{digest[:16]}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self.write()
        if run.first_on_node:
            self._start_endpoint(config, str(start))

    def write(self, *, closed: bool = False) -> None:
        if not self._served:
            return
        try:
            self._exporter.write(self._folder, closed=closed)
        except OSError as error:  # metrics never stop a run
            if not self._failed:
                log.warning("%s is not written: %s", self._folder, error.strerror)
            self._failed = True

    def close(self) -> None:
        """Leave the last values in the run's folder. Every rank calls it."""
        self.write(closed=True)
        if self._process is not None:
            try:
                self._process.wait(START_SECONDS)  # it does so once all ranks here have closed
            except subprocess.TimeoutExpired:
                log.warning("the endpoint's process %d is still there", self._process.pid)
        elif self._run.first and not self._served:
            self._run.write_text(self._run.dir / FINAL, self._exporter.text())

    def _start_endpoint(self, config: MetricsConfig, start: str) -> None:
        run = self._run
        settings = Settings(
            folder=str(self._folder),
            run_dir=str(run.dir.resolve()),
            run=run.dir.name,
            node=dist.node_name(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            start=start,
            first=run.first,
            parent=who(),
            address=config.address,
            port=config.port,
            sd_dir=_absolute(config.sd_dir),
            textfile_dir=_absolute(config.textfile_dir),
            certificate=config.certificate,
            key=config.key,
            password_file=config.password_file,
        )
        script = Path(__file__).with_name("endpoint.py")
        command = [sys.executable, str(script), json.dumps(asdict(settings))]
        try:
            with (run.dir / "metrics" / f"{settings.node}.log").open("w") as errors:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,  # a terminal's Ctrl-C is for the ranks
                )
            told = self._first_line()
        except (OSError, ValueError) as error:
            told = {"url": None, "problems": [str(error)]}
        for problem in told["problems"]:
            log.warning("%s", problem)
        self.url = told["url"]

    def _first_line(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        with self._process.stdout as pipe:
            if not select.select([pipe], [], [], START_SECONDS)[0]:
                return {"url": None, "problems": ["the endpoint's process says nothing"]}
            line = pipe.readline()
        if not line:
            raise ValueError(f"the endpoint ended; see {self._run.dir / 'metrics'}/*.log")
        return json.loads(line)


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)

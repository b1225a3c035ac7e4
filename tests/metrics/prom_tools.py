"""The real Prometheus and its promtool, where they are installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RULES = Path(__file__).parents[2] / "elip_ds" / "metrics" / "rules.yml"


def need_prometheus() -> None:
    """Skip where it is not installed, but never in CI."""
    if shutil.which("prometheus") and shutil.which("promtool"):
        return
    reason = "Prometheus is not installed: apt-get install --no-install-recommends prometheus"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def promtool(*words: str, stdin: str | None = None) -> subprocess.CompletedProcess:
    need_prometheus()
    command = ["promtool", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)

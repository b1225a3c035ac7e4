"""The lines of metrics.jsonl for those who look at runs with something else: metrics.also.

csv: RUN/metrics.csv, a row for each value.  tensorboard: RUN/tensorboard.  wandb: Weights & Biases,
project elip_ds, where WANDB_MODE=offline keeps it on disk. None of them is needed for anything.
"""

import csv
import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from elip_ds.config import Config

log = logging.getLogger(__name__)

CSV = "metrics.csv"
LEFT_OUT = ("step", "samples_seen", "skipped", "nonfinite", "time")


class Writer(Protocol):
    def write(self, step: int, samples_seen: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def open_writers(config: Config, run_dir: Path, step: int) -> list[Writer]:
    """step: from which the run goes on."""
    makers: dict[str, Callable[..., Writer]]
    makers = {"csv": CsvWriter, "tensorboard": TensorBoardWriter, "wandb": WandbWriter}
    return [makers[name](config, run_dir, step) for name in config.metrics.also]


def flatten(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """'losses/itc', 'kept_tokens/0', ...: the numbers of a line."""
    for key, value in line.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, f"{name}/")
        elif isinstance(value, list | tuple):
            yield from flatten({str(i): part for i, part in enumerate(value)}, f"{name}/")
        elif isinstance(value, int | float):
            yield name, float(value)


def write_line(writers: list[Writer], line: dict[str, Any]) -> None:
    """One that fails says so and is left out from then on: metrics stop no run."""
    values = dict(flatten({key: part for key, part in line.items() if key not in LEFT_OUT}))
    for writer in [*writers]:
        try:
            writer.write(line["step"], line["samples_seen"], values)
        except Exception as error:  # whatever a library of others has to say
            log.error("%s writes no more: %s", type(writer).__name__, error)
            writers.remove(writer)


class CsvWriter:
    """step, samples_seen, name, value. What a start repeats after a kill is there twice."""

    def __init__(self, config: Config, run_dir: Path, step: int) -> None:
        self._path = run_dir / CSV
        if not self._path.exists():
            self._path.write_text("step,samples_seen,name,value\n")

    def write(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        with self._path.open("a", newline="") as file:
            rows = ((step, samples_seen, name, value) for name, value in values.items())
            csv.writer(file, lineterminator="\n").writerows(rows)

    def close(self) -> None:
        """Nothing is open."""


class TensorBoardWriter:
    def __init__(self, config: Config, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote after its checkpoint is not shown.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    def __init__(self, config: Config, run_dir: Path, step: int) -> None:
        import wandb

        self._run = wandb.init(
            project="elip_ds",
            name=config.run.name,
            # Runs of one name in two folders are two.
            id=f"{config.run.name}-{hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]}",
            resume="allow",
            dir=str(run_dir),
            config=dataclasses.asdict(config),
        )

    def write(self, step: int, samples_seen: int, values: dict[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._run.log(finite | {"samples_seen": samples_seen}, step=step)

    def close(self) -> None:
        self._run.finish()

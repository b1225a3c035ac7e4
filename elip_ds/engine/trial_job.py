"""What probing ranks are told to do, and what they leave behind: the files of one trial's folder.

job.json, config.yaml   written before they start
heartbeat-RANK.json     where the rank is: micro_batch_size, phase, step, time, pid, and whether it
                        is starting, the first steps among it
result-RANK.json        the peaks of every micro-batch that went well, and the device
oom-RANK.json           its memory ran out; it left with status 77
error-RANK.json         anything else went wrong; it left with status 78
run/                    the run's folder, with a checkpoint where one was asked for
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from elip_ds.config import Config, dump_config, read_config
from elip_ds.engine.out_of_memory import write_whole
from elip_ds.run import CONFIG

ERROR_STATUS = 78
"Exit status of a rank that failed for another reason than memory."
_JOB = "job.json"


@dataclass(frozen=True)
class TrialJob:
    """config: what a run would have.  deepspeed: its JSON, as read_ds_config gave it.

    sizes: micro-batches, ascending.  steps: optimizer steps at each.  accumulation: micro-batches
    per optimizer step.  limit_bytes: of one rank's memory, see trial.py.  keep_ratios: of the
    pruning stages; None: those with which the schedule begins.  captions: longest; alternate, every
    other step as short as there are; random, of any length, drawn anew for every micro-batch.
    evaluate, save: at the end one held-out batch, one checkpoint.
    """

    config: Config
    deepspeed: dict[str, Any]
    sizes: list[int]
    steps: int = 2
    accumulation: int = 1
    limit_bytes: int | None = None
    keep_ratios: list[float] | None = None
    captions: Literal["longest", "alternate", "random"] = "longest"
    evaluate: bool = False
    save: bool = False

    def write(self, folder: Path) -> None:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        (folder / CONFIG).write_text(dump_config(fields.pop("config")))
        write_whole(folder / _JOB, fields)


def read_job(folder: Path) -> TrialJob:
    return TrialJob(read_config(folder / CONFIG), **json.loads((folder / _JOB).read_text()))

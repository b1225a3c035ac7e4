"""Before training: how much memory there is, what steps really take, and which batch fits."""

from elip_ds.launching.endings import DeviceBusy, LaunchError, RankFailed, RankHung
from elip_ds.launching.limits import cuda_budget, host_budget, read_gpus, visible_gpus
from elip_ds.launching.local_ranks import Patience
from elip_ds.launching.real_steps import RealSteps

__all__ = [
    "DeviceBusy",
    "LaunchError",
    "Patience",
    "RankFailed",
    "RankHung",
    "RealSteps",
    "cuda_budget",
    "host_budget",
    "read_gpus",
    "visible_gpus",
]

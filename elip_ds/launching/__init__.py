"""Before training: how much memory there is, what steps really take, and which batch fits."""

from elip_ds.launching.handover import training_command
from elip_ds.launching.planning import plan_all
from elip_ds.launching.settle import probe_as_rank, probe_here, settle_batch
from elip_ds.launching.supervise import supervise
from elip_ds.launching.telling import show_plans

__all__ = [
    "plan_all",
    "probe_as_rank",
    "probe_here",
    "settle_batch",
    "show_plans",
    "supervise",
    "training_command",
]

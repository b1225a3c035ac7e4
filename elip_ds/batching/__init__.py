"""What a global batch is made of, and what fits.

Also inside, for the launcher: sizes, devices, fit, cache.
"""

from elip_ds.batching.memory import PHASES, Outcome, Peaks
from elip_ds.batching.plan import (
    Plan,
    choose_micro_batch,
    micro_batches,
    next_smaller,
    none_fits,
    plan_batch,
)
from elip_ds.batching.search import Answer, find_micro_batch
from elip_ds.batching.shares import share_out

__all__ = [
    "PHASES",
    "Answer",
    "Outcome",
    "Peaks",
    "Plan",
    "choose_micro_batch",
    "find_micro_batch",
    "micro_batches",
    "next_smaller",
    "none_fits",
    "plan_batch",
    "share_out",
]

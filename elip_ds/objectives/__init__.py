"""One loss a file; base.py is the contract."""

from elip_ds.objectives.base import Loss, Objective, Pass, Progress, Setup, StepContext
from elip_ds.objectives.grad_cache import GradCache

__all__ = ["GradCache", "Loss", "Objective", "Pass", "Progress", "Setup", "StepContext"]

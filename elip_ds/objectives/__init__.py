"""One loss a file; base.py is the contract."""

from elip_ds.objectives.base import Loss, Objective, Pass, Progress, Setup, StepContext

__all__ = ["Loss", "Objective", "Pass", "Progress", "Setup", "StepContext"]

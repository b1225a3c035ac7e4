"""What a global batch is made of."""

from elip_ds.batching.plan import Plan, plan_batch

__all__ = ["Plan", "plan_batch"]

"""Pure functions from predictions to numbers."""

from elip_ds.scores.recall import retrieval_recall

__all__ = ["retrieval_recall"]

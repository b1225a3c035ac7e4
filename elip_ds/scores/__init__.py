"""Pure functions from predictions to numbers."""

from elip_ds.scores.recall import matching_recall, retrieval_recall

__all__ = ["matching_recall", "retrieval_recall"]

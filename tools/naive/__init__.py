"""The training step in the plain way: the oracle of the fast one, and what it is measured against.

It takes a task's weights and a batch, and computes the losses that the task computes, the way the
published code does: attention that writes its matrix down, a look-ahead whose last block runs
whole, a loop over the samples to merge tokens, a fusion pass for the pairs, one for the negatives
and one for the masked words, word scores at every position, contrast with a queue that is
concatenated first. Written from the specification; of the package it uses the configuration and the
random draws, and none of its networks and losses. One rank.
"""

from naive.models import MODELS
from naive.step import NaiveLoss, after_step, naive_model, naive_step

__all__ = ["MODELS", "NaiveLoss", "after_step", "naive_model", "naive_step"]

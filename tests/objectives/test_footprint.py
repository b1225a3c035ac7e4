"""A whole step's forward: no word logits, no scores of the queue and no attention weights stay."""

import pytest
import torch
from conftest import random_batch, tiny_task
from storages import Storages

from elip_ds.objectives import Progress, soft_targets, words

PROGRESS = Progress(step=1, samples_seen=8, samples_per_epoch=64)
# Sizes that no other dimension of the tiny models has.
VOCABULARY, QUEUE, PIECE = 101, 57, 16


@pytest.fixture(params=["albef", "blip"])
def step(request, monkeypatch):
    """A training step's loss, and the storages of its forward."""
    monkeypatch.setattr(words, "LOGITS_AT_ONCE", PIECE * 64)  # 64 words exist
    monkeypatch.setattr(soft_targets, "ROWS_AT_ONCE", 3)
    task = tiny_task(
        f"model.text.vocab_size={VOCABULARY}",
        "model.text.dropout=0.1",
        f"objectives.itc.queue_size={QUEUE}",
        model=request.param,
    )
    with Storages() as storages:
        total = task(random_batch(8), PROGRESS).total
    task.drop_carries()
    yield total, storages
    total.backward()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


def test_word_logits_exist_a_piece_at_a_time_and_none_stays(step):
    _, storages = step
    logits = [m for m in storages.all() if m.shape[-1:] == (VOCABULARY,)]
    assert logits and max(torch.Size(m.shape[:-1]).numel() for m in logits) == PIECE
    assert [m for m in storages.alive() if VOCABULARY in m.shape] == []


def test_scores_of_the_queue_exist_for_a_few_rows_and_none_stays(step):
    _, storages = step
    scores = [m for m in storages.all() if m.shape[-1:] == (QUEUE,)]
    assert scores and max(m.shape[0] for m in scores) == 3
    assert [m for m in storages.alive() if QUEUE in m.shape] == []


def test_of_attention_with_dropout_only_its_mask_stays(step):
    _, storages = step
    weights = [m for m in storages.all() if "softmax" in m.operation and len(m.shape) == 4]
    assert weights
    shapes = {m.shape for m in weights}
    left = [m.dtype for m in storages.alive() if m.shape in shapes]
    assert left and set(left) == {torch.bool}

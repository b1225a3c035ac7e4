"""Which positions are computed, and that computing them piece by piece changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from storages import Storages

from elip_ds.objectives import words
from elip_ds.objectives.words import first_of, in_pieces, room_for

VOCABULARY = 23


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- room_for


@pytest.mark.parametrize(
    ("probability", "count", "room"),
    [
        (0.5, 64, 56),  # 32 + 6 * 4
        (0.1, 900, 144),  # 90 + 6 * 9
        (0.2, 1600, 416),  # 320 + 6 * 16
        (0.2, 400, 128),  # 80 + 6 * 8
        (0.2, 100, 48),  # 20 + 6 * 4 = 44, to a multiple of 8
        (0.5, 16, 16),  # 8 + 6 * 2 = 20 of 16
        (0.15, 8, 8),
        (0.999, 50, 50),
        (0.15, 0, 0),
    ],
)
def test_the_room_is_the_mean_and_six_deviations_of_a_random_selection(probability, count, room):
    assert room_for(probability, count) == room


@pytest.mark.parametrize("probability", [0.01, 0.15, 0.4, 0.9])
@pytest.mark.parametrize("count", [12, 480, 30 * 512])
def test_ten_thousand_random_selections_fit(probability, count):
    torch.manual_seed(0)
    trials = torch.full((10_000,), float(count))
    selected = torch.binomial(trials, torch.full_like(trials, probability))
    assert selected.max() <= room_for(probability, count) <= count


@given(probability=st.floats(0.001, 0.999), count=st.integers(0, 100_000))
def test_there_is_room_for_the_mean_and_never_for_more_than_there_is(probability, count):
    room = room_for(probability, count)
    assert probability * count <= room + 1e-6 <= count + 1e-6
    assert room == count or room % 8 == 0


def test_of_a_large_batch_hardly_more_is_computed_than_is_selected():
    assert room_for(0.15, 128 * 30) < 1.25 * 0.15 * 128 * 30


# ---- first_of


@given(selected=st.lists(st.booleans(), max_size=60), room=st.integers(0, 60))
def test_the_selected_come_first_in_order_and_no_row_comes_twice(selected, room):
    at = first_of(torch.tensor(selected, dtype=torch.bool), room).tolist()
    wanted = [i for i, chosen in enumerate(selected) if chosen]
    others = [i for i, chosen in enumerate(selected) if not chosen]
    assert at == (wanted + others)[:room]


# ---- in_pieces


def judge_by(weight):
    """(S, D), (S,) -> cross-entropy and whether it is right, of logits that are made here."""

    def judge(states, labels):
        logits = states @ weight.T
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels

    return judge


def judged(at_once, rows=50):
    """Losses, hits, and the gradients of the states and of the weight."""
    states, weight = draw(rows, 6).requires_grad_(), draw(VOCABULARY, 6, seed=1).requires_grad_()
    labels = torch.arange(rows) % VOCABULARY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "LOGITS_AT_ONCE", at_once)
        losses, hits = in_pieces(judge_by(weight), VOCABULARY, states, labels)
    (losses * torch.linspace(1, 2, rows)).sum().backward()
    return losses.detach(), hits, states.grad, weight.grad


# The weight's gradient is a sum over pieces, and a matrix product of other rows rounds otherwise.
@given(size=st.integers(1, 60), rest=st.integers(0, VOCABULARY - 1), rows=st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_pieces_of_any_size_equal_one_piece(size, rest, rows):
    mine = judged(size * VOCABULARY + rest, rows)
    for a, b in zip(mine, judged(10**9, rows), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_vocabulary_larger_than_a_piece_is_judged_word_by_word():
    for a, b in zip(judged(1), judged(10**9), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def sizes_of_pieces(at_once, rows, grad=True):
    """Rows of each call of the judge, forward and backward."""
    calls = []

    def judge(states):
        calls.append(len(states))
        return (states.square().sum(dim=1),)

    states = draw(rows, 6).requires_grad_()
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(grad):
        patch.setattr(words, "LOGITS_AT_ONCE", at_once)
        (losses,) = in_pieces(judge, VOCABULARY, states)
    assert losses.shape == (rows,)
    forward = list(calls)
    calls.clear()
    if grad:
        losses.sum().backward()
        torch.testing.assert_close(states.grad, 2 * states)
    return forward, sorted(calls)


def test_a_piece_holds_as_many_words_as_its_logits_may_be():
    assert sizes_of_pieces(20 * VOCABULARY, 50) == ([20, 20, 10], [10, 20, 20])
    assert sizes_of_pieces(20 * VOCABULARY + 22, 40) == ([20, 20], [20, 20])
    assert sizes_of_pieces(10**9, 50) == ([50], [50])
    assert sizes_of_pieces(20 * VOCABULARY, 50, grad=False) == ([20, 20, 10], [])


def test_no_words_give_no_losses_and_a_gradient_of_nothing():
    assert sizes_of_pieces(20 * VOCABULARY, 0)[0] == [0]


def test_no_logit_outlives_its_piece_and_no_more_exist_than_a_piece_has(monkeypatch):
    monkeypatch.setattr(words, "LOGITS_AT_ONCE", 8 * VOCABULARY)
    states, weight = draw(50, 6).requires_grad_(), draw(VOCABULARY, 6, seed=1).requires_grad_()
    judge = judge_by(weight)
    with Storages() as storages:
        losses, hits = in_pieces(judge, VOCABULARY, states, torch.arange(50) % VOCABULARY)
        del hits
    logits = [m for m in storages.all() if m.shape[-1:] == (VOCABULARY,)]
    assert logits and max(m.shape[0] for m in logits) == 8
    assert [m for m in storages.alive() if m.shape[-1:] == (VOCABULARY,)] == []
    losses.sum().backward()

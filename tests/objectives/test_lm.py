import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch

from elip_ds.errors import UserError
from elip_ds.objectives import Pass, Progress, Setup, StepContext, words
from elip_ds.objectives.lm import LM, LMConfig

VOCABULARY = 64


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_lm(**config):
    setup = Setup(
        pooled_width=0, embed_dim=0, vocab_size=VOCABULARY, special_ids={"[PAD]": 0}, seed=0
    )
    return LM(LMConfig(**config), setup)


def context_of(batch, logits):
    """A context whose decoded states are already word logits (B, L, V)."""
    model = SimpleNamespace(word_logits=lambda hidden: hidden)
    context = StepContext(batch, {"student": model}, Progress(1, 0, 1000))
    context.passes[Pass("decoder")] = logits
    return context


@pytest.fixture
def batch():
    return random_batch(8)


@pytest.fixture
def logits(batch):
    return seeded(*batch.input_ids.shape, VOCABULARY, seed=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_equals_a_loop_over_the_words_and_what_comes_after_them(batch, logits, smoothing):
    loss = build_lm(label_smoothing=smoothing)(context_of(batch, logits))
    terms, nats, hits = [], [], []
    for b in range(8):
        for i in range(11):
            word = batch.input_ids[b, i + 1].item()
            if word == 0:
                continue
            log_p = logits[b, i].double().log_softmax(dim=0)
            target = torch.full((VOCABULARY,), smoothing / VOCABULARY, dtype=torch.float64)
            target[word] += 1 - smoothing
            terms.append(-(target * log_p).sum().item())
            nats.append(-log_p[word].item())
            hits.append(logits[b, i].argmax().item() == word)
    assert len(terms) == batch.attention_mask[:, 1:].sum()
    assert loss.values["lm"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    assert loss.logs["lm_nats_per_word"].item() == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    assert loss.logs["lm_accuracy"].item() == pytest.approx(sum(hits) / len(hits))
    assert loss.values["lm"].dtype == torch.float32 and loss.values["lm"].shape == ()


def test_it_equals_torchs_own_smoothed_cross_entropy_and_its_gradient(batch, logits):
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = build_lm()(context_of(batch, mine)).values["lm"]
    targets = batch.input_ids[:, 1:].masked_fill(batch.input_ids[:, 1:] == 0, -100)
    expected = F.cross_entropy(theirs[:, :-1].flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_only_states_that_have_a_word_to_guess_count(batch, logits):
    student = logits.requires_grad_()
    build_lm()(context_of(batch, student)).values["lm"].backward()
    guesses = batch.attention_mask[:, 1:].bool()
    counted = student.grad.any(dim=-1)
    assert torch.equal(counted[:, :-1], guesses) and not counted[:, -1].any()


def test_logits_are_made_for_every_token_but_the_last_in_pieces_of_a_size(
    batch, logits, monkeypatch
):
    """Whatever the captions' lengths: how many words there are is not asked of the device."""
    monkeypatch.setattr(words, "LOGITS_AT_ONCE", 20 * VOCABULARY)
    context, seen = context_of(batch, logits), []
    context.model().word_logits = lambda hidden: (seen.append(hidden), hidden)[1]
    build_lm()(context)
    assert [len(x) for x in seen] == [20, 20, 20, 20, 8]
    assert torch.equal(torch.cat(seen), logits[:, :-1].flatten(0, 1))


def test_padding_is_what_the_vocabulary_says_it_is(batch, logits):
    lm = build_lm()
    lm.setup.special_ids["[PAD]"] = 1
    batch.input_ids[batch.input_ids == 0] = 1
    expected = build_lm()(context_of(random_batch(8), logits)).values["lm"]
    assert torch.equal(lm(context_of(batch, logits)).values["lm"], expected)


def test_captions_of_one_token_give_no_loss_and_a_finite_gradient(batch, logits):
    student = logits.requires_grad_()
    batch.input_ids[:, 1:] = 0
    loss = build_lm()(context_of(batch, student))
    loss.values["lm"].backward()
    assert loss.values["lm"].item() == 0 and loss.logs["lm_accuracy"].item() == 0
    assert student.grad.abs().max() == 0


def test_equal_logits_give_the_logarithm_of_the_vocabulary(batch):
    flat = torch.zeros(*batch.input_ids.shape, VOCABULARY)
    loss = build_lm()(context_of(batch, flat))
    for value in (loss.values["lm"], loss.logs["lm_nats_per_word"]):
        assert value.item() == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_sure_and_right_is_accurate_and_with_smoothing_not_the_least_loss(batch):
    right = F.one_hot(batch.input_ids.roll(-1, dims=1), VOCABULARY).float()
    loss = build_lm()(context_of(batch, 100 * right))
    assert loss.logs["lm_accuracy"].item() == 1
    # The best share for the right word is 0.9 + 0.1 / V, for any other 0.1 / V.
    best = math.log((0.9 + 0.1 / VOCABULARY) / (0.1 / VOCABULARY))
    least = build_lm()(context_of(batch, best * right)).values["lm"]
    assert least < loss.values["lm"]
    assert least < build_lm()(context_of(batch, 1.1 * best * right)).values["lm"]
    assert least < build_lm()(context_of(batch, 0.9 * best * right)).values["lm"]


def test_over_micro_batches_the_loss_is_a_mean_of_means(batch, logits):
    """Equal to one batch when the parts are weighed by their words, and only then."""

    def part(rows):
        fields = ("images", "input_ids", "attention_mask", "sample_key")
        some = type(batch)(**{field: getattr(batch, field)[rows] for field in fields})
        loss = build_lm()(context_of(some, logits[rows])).values["lm"]
        return loss, some.attention_mask[:, 1:].sum()

    whole, count = part(slice(None))
    (first, words), (second, other_words) = part(slice(0, 3)), part(slice(3, 8))
    torch.testing.assert_close(whole, (first * words + second * other_words) / count)
    assert (first + second) / 2 != pytest.approx(whole.item(), rel=1e-4)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_that_leaves_no_target_is_refused(smoothing):
    message = rf"objectives\.lm\.label_smoothing={smoothing}: 0 \(off\) or more, below 1"
    with pytest.raises(UserError, match=message):
        LMConfig(label_smoothing=smoothing)

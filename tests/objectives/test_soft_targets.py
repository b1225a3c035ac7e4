import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from storages import Storages

from elip_ds.objectives import Progress, soft_targets
from elip_ds.objectives.soft_targets import attend, ramp, soft_contrast, soft_cross_entropy


@pytest.fixture
def rows():
    """Logits of student and teacher, (5, 7), and labels, (5,)."""
    torch.manual_seed(0)
    return torch.randn(5, 7), torch.randint(0, 7, (5,)), torch.randn(5, 7)


@pytest.mark.parametrize(
    ("over", "samples_seen", "expected"),
    [
        ("1 epoch", 0, 0.0),
        ("1 epoch", 250, 0.1),
        ("1 epoch", 1000, 0.4),
        ("1 epoch", 5000, 0.4),
        ("0.5 epochs", 250, 0.2),
        ("100 samples", 25, 0.1),
        ("0 samples", 0, 0.4),
    ],
)
def test_alpha_grows_with_the_samples_seen_and_then_stays(over, samples_seen, expected):
    assert ramp(0.4, over, Progress(3, samples_seen, 1000)) == pytest.approx(expected)


def test_alpha_does_not_depend_on_how_many_steps_the_samples_took():
    assert ramp(0.4, "1 epoch", Progress(1, 512, 1000)) == ramp(
        0.4, "1 epoch", Progress(512, 512, 1000)
    )


def test_a_three_word_vocabulary_gives_the_value_worked_out_by_hand():
    logits = torch.tensor([[math.log(2), math.log(3), math.log(5)]])  # p = .2, .3, .5
    teacher = torch.tensor([[math.log(1), math.log(1), math.log(2)]])  # q = .25, .25, .5
    loss = soft_cross_entropy(logits, torch.tensor([1]), teacher, alpha=0.4)
    soft = -(0.25 * math.log(0.2) + 0.25 * math.log(0.3) + 0.5 * math.log(0.5))
    assert loss.tolist() == pytest.approx([0.6 * -math.log(0.3) + 0.4 * soft], rel=1e-6)


def test_alpha_of_zero_is_the_plain_cross_entropy(rows):
    logits, labels, teacher = rows
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(soft_cross_entropy(logits, labels, teacher, 0.0), expected)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.9])
def test_the_loss_is_linear_in_alpha(rows, alpha):
    hard, soft, mixed = (soft_cross_entropy(*rows, a) for a in (0.0, 1.0, alpha))
    torch.testing.assert_close(mixed, (1 - alpha) * hard + alpha * soft, atol=1e-6, rtol=0)


def test_a_teacher_that_agrees_leaves_the_entropy_and_no_gradient(rows):
    logits, labels, _ = rows
    logits = logits.double().requires_grad_()
    loss = soft_cross_entropy(logits, labels, logits, 1.0)
    p = logits.detach().softmax(dim=1)
    torch.testing.assert_close(loss.detach(), -(p * p.log()).sum(dim=1))
    loss.sum().backward()
    assert logits.grad.abs().max() < 1e-7


def test_no_gradient_reaches_the_teacher(rows):
    logits, labels, teacher = rows
    teacher.requires_grad_()
    soft_cross_entropy(logits.requires_grad_(), labels, teacher, 0.4).sum().backward()
    assert teacher.grad is None


def test_no_rows_give_no_losses():
    none = torch.empty(0, 7)
    assert soft_cross_entropy(none, torch.empty(0, dtype=torch.long), none, 0.4).sum() == 0


# ---- soft_contrast, which keeps no score


def unit(rows, width=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=1).to(dtype)


def explicit(x, teacher, keys, own, temperature, alpha):
    """The scores written out, (R, K), and the loss of them that the other objective uses."""
    joined = torch.cat(list(keys))
    scores, taught = (part @ joined.T / temperature for part in (x, teacher))
    return soft_cross_entropy(scores, own, taught, alpha)


def contrast(way, rows, sizes, *, temperature=0.07, alpha=0.4, seed=0, dtype=torch.float32):
    """Losses, and gradients of x and of the temperature of a weighted sum of them."""
    x = unit(rows, seed=seed, dtype=dtype).requires_grad_()
    scale = torch.tensor([temperature], dtype=dtype).requires_grad_()
    keys = [unit(size, seed=seed + 2 + i, dtype=dtype) for i, size in enumerate(sizes)]
    own = torch.randint(sizes[0], (rows,), generator=torch.Generator().manual_seed(seed))
    loss = way(x, unit(rows, seed=seed + 1, dtype=dtype), keys, own, scale, alpha)
    pull = torch.linspace(0.5, 1.5, rows, dtype=dtype)
    return loss.detach(), *torch.autograd.grad((loss * pull).sum(), [x, scale])


CASES = {
    "batch and queue": (6, (6, 40)),
    "an empty queue": (6, (6, 0)),
    "keys of one list": (6, (6,)),
    "an empty list between": (3, (3, 0, 5)),
    "keys of many lists": (5, (9, 1, 2, 30)),
    "one row and one key": (1, (1, 0)),
    "more rows than are scored at a time": (2 * soft_targets.ROWS_AT_ONCE + 7, (300, 50)),
}


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("rows", "sizes"), CASES.values(), ids=CASES)
def test_the_contrast_without_scores_equals_that_of_the_explicit_scores(rows, sizes, alpha):
    mine, theirs = (
        contrast(way, rows, sizes, alpha=alpha, dtype=torch.float64)
        for way in (soft_contrast, explicit)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    for a, b in zip(contrast(soft_contrast, rows, sizes, alpha=alpha), theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=1e-5 * b.abs().max().clamp(1).item(), rtol=0)


@given(
    rows=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 12), max_size=3),
    first=st.integers(1, 12),
    at_once=st.integers(1, 10),
    temperature=st.floats(0.01, 2.0),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_shapes_it_equals_the_explicit_one(
    rows, sizes, first, at_once, temperature, alpha, seed
):
    options = {"temperature": temperature, "alpha": alpha, "seed": seed, "dtype": torch.float64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soft_targets, "ROWS_AT_ONCE", at_once)
        mine = contrast(soft_contrast, rows, (first, *sizes), **options)
    for a, b in zip(mine, contrast(explicit, rows, (first, *sizes), **options), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_finite_differences_agree_with_the_closed_form_of_its_derivative():
    keys = [unit(size, seed=size, dtype=torch.float64) for size in (4, 9)]
    x, teacher = (unit(4, seed=seed, dtype=torch.float64) for seed in (0, 1))
    scale = torch.tensor([0.2], dtype=torch.float64).requires_grad_()
    own = torch.tensor([2, 0, 1, 3])

    def loss(x, scale):
        # Without the teacher, whose scores move with the temperature and carry no gradient.
        return soft_contrast(x, teacher, keys, own, scale, 0.0)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), scale))


@pytest.mark.parametrize("temperature", [0.001, 0.5])
def test_at_either_end_of_the_temperature_nothing_overflows(temperature):
    for value in contrast(soft_contrast, 6, (6, 30), temperature=temperature):
        assert value.isfinite().all() and value.any()
    for a, b in zip(
        contrast(soft_contrast, 6, (6, 30), temperature=temperature),
        contrast(explicit, 6, (6, 30), temperature=temperature, dtype=torch.float64),
        strict=True,
    ):
        # Scores as large as 1 / temperature are rounded as such.
        torch.testing.assert_close(
            a.double(), b, atol=1e-6 / temperature * b.abs().max().clamp(1).item(), rtol=0
        )


def test_neither_the_teacher_nor_the_keys_get_a_gradient():
    x, teacher, *keys = (unit(4, seed=seed).requires_grad_() for seed in range(4))
    soft_contrast(x, teacher, keys, torch.arange(4), torch.ones(1), 0.4).sum().backward()
    assert x.grad.any() and all(other.grad is None for other in (teacher, *keys))


def test_attending_gives_the_mean_of_all_keys_by_the_softmax_of_their_scores():
    x, keys = unit(5), [unit(3, seed=1), unit(0, seed=2), unit(7, seed=3)]
    total, mean = attend(x, keys, torch.tensor([0.3]))
    scores = x @ torch.cat(keys).T / 0.3
    torch.testing.assert_close(total, scores.logsumexp(dim=1))
    torch.testing.assert_close(mean, scores.softmax(dim=1) @ torch.cat(keys))


@pytest.mark.parametrize("rows", [6, 2 * soft_targets.ROWS_AT_ONCE + 1])
def test_no_score_outlives_the_forward_and_few_exist_at_a_time(rows):
    x, teacher = unit(rows).requires_grad_(), unit(rows, seed=1)
    keys = [unit(rows, seed=2), unit(1009, seed=3)]
    with Storages() as storages:
        loss = soft_contrast(x, teacher, keys, torch.arange(rows), torch.ones(1), 0.4)
    scores = [m for m in storages.all() if m.shape[-1:] == (1009,)]
    assert scores and max(m.shape[0] for m in scores) <= soft_targets.ROWS_AT_ONCE
    assert max(m.nbytes for m in storages.alive()) <= rows * 8 * 4  # (R, E)
    loss.sum().backward()

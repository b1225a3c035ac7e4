import math

import pytest
import torch
import torch.nn.functional as F

from elip_ds.objectives import Progress
from elip_ds.objectives.soft_targets import ramp, soft_cross_entropy


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

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch, tiny_task

from elip_ds.errors import UserError
from elip_ds.objectives import Pass, Progress, StepContext
from elip_ds.objectives.itm import ITM, ITMConfig, draw_matches, draw_negatives

PROGRESS = Progress(step=1, samples_seen=8, samples_per_epoch=64)


@pytest.fixture
def context_and_itm():
    """A context with the similarities of an ITC pass, and the objective."""
    task = tiny_task()
    models = {"student": task.model, "teacher": task.teacher.model}
    context = StepContext(random_batch(8), models, PROGRESS, seed=5)
    task.objectives["itc"](context)
    return context, task.objectives["itm"]


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_no_negative_is_the_rows_own_in_ten_thousand_draws():
    similarity = torch.randn(50, 50, generator=torch.Generator().manual_seed(1)) * 5
    similarity += 20 * torch.eye(50)
    draws = torch.stack([draw_negatives(similarity, row) for row in noise(200, 50)])
    assert not (draws == torch.arange(50)).any()
    assert draws.min() >= 0 and draws.max() < 50


def test_negatives_follow_the_softmax_without_the_own_pair():
    similarity = torch.tensor([[9.0, 1, 2, 3], [1, 9, 1, 1], [0, -1, 9, -4], [5, 4, 3, 9]])
    draws = torch.stack([draw_negatives(similarity, row) for row in noise(5000, 4)])
    for row in range(4):
        weights = similarity[row].softmax(dim=0) + 1e-4
        weights[row] = 0
        expected = 5000 * weights / weights.sum()
        found = torch.bincount(draws[:, row], minlength=4)
        others = [i for i in range(4) if i != row]
        chi_square = ((found - expected)[others] ** 2 / expected[others]).sum()
        assert found[row] == 0
        assert chi_square < 13.8, row  # 2 degrees of freedom, p = 0.001


@pytest.mark.parametrize("size", [2, 3, 17])
@pytest.mark.parametrize("own", [1e4, 3e38])
def test_a_row_with_all_its_mass_on_its_own_pair_draws_evenly(size, own):
    similarity = torch.zeros(size, size).fill_diagonal_(own)
    draws = torch.stack([draw_negatives(similarity, row) for row in noise(2000, size)])
    assert not (draws == torch.arange(size)).any()
    for row in range(size):
        found = torch.bincount(draws[:, row], minlength=size)
        found = found[torch.arange(size) != row]
        assert (found - 2000 / (size - 1)).abs().max() < 5 * math.sqrt(2000 / max(1, size - 1))


def test_in_a_batch_of_two_the_negative_is_the_other_one():
    for row in noise(100, 2):
        assert draw_negatives(torch.randn(2, 2), row).tolist() == [1, 0]


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24, 1.0])
def test_noise_at_the_ends_of_its_range_never_draws_the_own_pair(extreme):
    similarity = torch.randn(40, 40, generator=torch.Generator().manual_seed(2))
    drawn = draw_negatives(similarity, torch.full((40,), extreme))
    assert not (drawn == torch.arange(40)).any()


def test_one_batched_fusion_equals_three_separate_ones(context_and_itm):
    context, itm = context_and_itm
    loss = itm(context)
    text, image = context.run(Pass("text")), context.run(Pass("image"))
    draw = context.noise("itm", 2)
    wrong_image = draw_negatives(context.given["sim_t2i"], draw[:, 0])
    wrong_text = draw_negatives(context.given["sim_i2t"], draw[:, 1])
    right, wrong = torch.ones(8, dtype=torch.long), torch.zeros(8, dtype=torch.long)
    losses, hits = [], 0
    for label, *pair in (
        (right, text, image),
        (wrong, text, image.take(wrong_image)),
        (wrong, text.take(wrong_text), image),
    ):
        logits = itm.head(context.model().fuse(*pair).pooled)
        losses.append(F.cross_entropy(logits, label))
        hits += (logits.argmax(dim=1) == label).sum()
    torch.testing.assert_close(loss.values["itm"], sum(losses) / 3)
    assert loss.logs["itm_accuracy"].item() == pytest.approx(hits.item() / 24)


def test_a_head_of_zeros_gives_the_logarithm_of_two(context_and_itm):
    context, itm = context_and_itm
    torch.nn.init.zeros_(itm.head.weight)
    torch.nn.init.zeros_(itm.head.bias)
    assert itm(context).values["itm"].item() == pytest.approx(math.log(2), abs=1e-6)


def test_one_pair_in_three_is_labelled_a_match_and_that_is_class_1(context_and_itm):
    context, itm = context_and_itm
    torch.nn.init.zeros_(itm.head.weight)
    itm.head.bias.data = torch.tensor([0.0, 3.0])
    loss = itm(context)
    expected = (math.log1p(math.exp(-3)) + 2 * math.log1p(math.exp(3))) / 3
    assert loss.values["itm"].item() == pytest.approx(expected, rel=1e-6)
    assert loss.logs["itm_accuracy"].item() == pytest.approx(1 / 3)


def test_negatives_are_other_samples_in_another_step(context_and_itm):
    context, _ = context_and_itm
    later = StepContext(context.batch, {}, Progress(2, 16, 64), seed=5)
    similarity = torch.zeros(8, 8)
    draws = [draw_negatives(similarity, c.noise("itm", 2)[:, 0]) for c in (context, later)]
    assert not torch.equal(*draws)


# ---- random negatives


@pytest.mark.parametrize("size", [2, 3, 8, 17])
def test_half_the_pairs_are_true_and_no_false_one_has_its_own_image(size):
    for draw in noise(500, size, 2):
        rows, label = draw_matches(draw)
        own = rows == torch.arange(size)
        assert label.sum() == size // 2
        assert torch.equal(own, label == 1)
        assert rows.min() >= 0 and rows.max() < size


def test_any_row_may_be_true_and_any_other_image_false_evenly():
    size, draws = 7, 6000
    found, true = torch.zeros(size, size), torch.zeros(size)
    for draw in noise(draws, size, 2):
        rows, label = draw_matches(draw)
        true += label
        found[torch.arange(size), rows] += 1 - label
    expected = draws * (size // 2) / size
    assert (true - expected).abs().max() < 5 * math.sqrt(expected)
    for row in range(size):
        others = found[row, torch.arange(size) != row]
        expected = others.sum() / (size - 1)
        assert found[row, row] == 0
        assert ((others - expected) ** 2 / expected).sum() < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("extreme", [0.0, 0.5, 1 - 2**-24])
def test_noise_at_the_ends_of_its_range_draws_another_image_in_a_batch_of_any_size(extreme):
    for size in range(2, 300):
        rows, label = draw_matches(torch.full((size, 2), extreme))
        assert torch.equal(rows == torch.arange(size), label == 1)


@pytest.fixture
def context_and_random_itm():
    task = tiny_task(model="meter")
    context = StepContext(random_batch(7), {"student": task.model}, PROGRESS, seed=5)
    return context, task.objectives["itm"]


def test_random_pairs_ask_for_no_similarities():
    assert ITM.needs(ITMConfig(negatives="random")) == {"fusion"}
    assert ITM.needs(ITMConfig(negatives="hard")) == {"fusion", "sim_i2t", "sim_t2i"}


def test_each_image_of_a_random_pair_is_pruned_by_the_text_that_it_is_paired_with(
    context_and_random_itm,
):
    context, itm = context_and_random_itm
    loss = itm(context)
    rows, label = draw_matches(context.noise("itm", 2))
    model, text = context.model(), context.run(Pass("text"))
    logits = []
    for i, row in enumerate(rows.tolist()):
        one = text.take(torch.tensor([i]))
        image = model.encode_image(context.batch.images[row : row + 1], one)
        logits.append(itm.head(model.fuse(one, image).pooled))
    logits = torch.cat(logits)
    torch.testing.assert_close(loss.values["itm"], F.cross_entropy(logits, label))
    hits = (logits.argmax(dim=1) == label).float().mean()
    assert loss.logs["itm_accuracy"].item() == pytest.approx(hits.item())


def test_three_of_seven_random_pairs_are_true_and_that_is_class_1(context_and_random_itm):
    context, itm = context_and_random_itm
    torch.nn.init.zeros_(itm.head.weight)
    itm.head.bias.data = torch.tensor([0.0, 3.0])
    loss = itm(context)
    expected = (3 * math.log1p(math.exp(-3)) + 4 * math.log1p(math.exp(3))) / 7
    assert loss.values["itm"].item() == pytest.approx(expected, rel=1e-6)
    assert loss.logs["itm_accuracy"].item() == pytest.approx(3 / 7)


def test_random_pairs_are_others_in_another_step():
    batch = random_batch(32)
    draws = [
        draw_matches(StepContext(batch, {}, Progress(step, 0, 1), seed=5).noise("itm", 2))
        for step in (1, 2)
    ]
    assert not torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][1], draws[1][1])


def test_another_way_to_draw_negatives_is_refused():
    message = r"objectives\.itm\.negatives='easy': choose hard or random"
    with pytest.raises(UserError, match=message):
        ITMConfig(negatives="easy")

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch

from elip_ds.errors import UserError
from elip_ds.models import ImageFeatures, TextFeatures
from elip_ds.objectives import Pass, Progress, Setup, StepContext
from elip_ds.objectives.itc import ITC, ITCConfig
from elip_ds.towers.pruning import full_index

WIDTH = 16
CPU = torch.device("cpu")


def unit(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1)


def build_itc(**config):
    setup = Setup(pooled_width=32, embed_dim=WIDTH, vocab_size=64, special_ids={}, seed=0)
    return ITC(ITCConfig(**config), setup)


def context_of(image, text, teacher_image, teacher_text, temperature=0.07, epoch=1.0):
    """A context whose four passes are done. Each argument: (B, E), unit rows."""
    model = SimpleNamespace(temperature=lambda: torch.as_tensor(temperature).reshape(1))
    progress = Progress(step=1, samples_seen=round(epoch * 1000), samples_per_epoch=1000)
    context = StepContext(random_batch(len(image)), {"student": model}, progress)
    nothing = torch.empty(0)
    for who, image_feat, text_feat in (
        ("student", image, text),
        ("teacher", teacher_image, teacher_text),
    ):
        guide = "clean" if who == "student" else None
        image_pass = Pass("image", who, guide=guide)
        context.passes[image_pass] = ImageFeatures(nothing, full_index(0, 0, CPU), image_feat)
        text_features = TextFeatures(nothing, nothing, nothing, nothing, text_feat)
        context.passes[Pass("text", who)] = text_features
    return context


def four(rows):
    return [unit(rows, seed) for seed in range(4)]


def albef_loss(image, text, image_m, text_m, image_queue, text_queue, temperature, alpha):
    """ALBEF's released formula on the columns of transposed queues, (E, K). Plain and slow."""
    image_all = torch.cat([image_m.T, image_queue], dim=1)
    text_all = torch.cat([text_m.T, text_queue], dim=1)
    losses = []
    for query, query_m, candidates in ((image, image_m, text_all), (text, text_m, image_all)):
        one_hot = torch.zeros(len(query), candidates.shape[1]).fill_diagonal_(1)
        soft = torch.softmax(query_m @ candidates / temperature, dim=1)
        targets = alpha * soft + (1 - alpha) * one_hot
        log_p = torch.log_softmax(query @ candidates / temperature, dim=1)
        losses.append(-(log_p * targets).sum(dim=1).mean())
    return (losses[0] + losses[1]) / 2


@pytest.mark.parametrize("queue_size", [0, 5, 64])
@pytest.mark.parametrize(("alpha", "epoch"), [(0.4, 1.0), (0.4, 0.25), (1.0, 3.0)])
def test_the_loss_equals_albefs_formula(queue_size, alpha, epoch):
    itc, features = build_itc(queue_size=queue_size, alpha=alpha), four(6)
    loss = itc(context_of(*features, temperature=0.1, epoch=epoch)).values["itc"]
    queues = itc.image_queue.rows.T, itc.text_queue.rows.T
    expected = albef_loss(*features, *queues, 0.1, alpha * min(1.0, epoch))
    torch.testing.assert_close(loss, expected)
    assert loss.dtype == torch.float32 and loss.shape == ()


def test_with_alpha_zero_the_loss_is_infonce_over_batch_and_queue():
    itc, (image, text, teacher_image, teacher_text) = build_itc(queue_size=3, alpha=0.0), four(4)
    loss = itc(context_of(image, text, teacher_image, teacher_text)).values["itc"]
    terms = []
    for query, keys, queue in (
        (image, teacher_text, itc.text_queue.rows),
        (text, teacher_image, itc.image_queue.rows),
    ):
        for i in range(4):
            scores = [float(query[i] @ key) / 0.07 for key in [*keys, *queue]]
            terms.append(math.log(sum(map(math.exp, scores))) - scores[i])
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_the_loss_is_linear_in_alpha():
    def loss(alpha):
        return build_itc(queue_size=8, alpha=alpha)(context_of(*four(5))).values["itc"]

    torch.testing.assert_close(loss(0.4), 0.6 * loss(0.0) + 0.4 * loss(1.0), atol=1e-6, rtol=0)


def test_a_teacher_equal_to_the_student_leaves_the_entropy_and_no_gradient():
    itc = build_itc(queue_size=8, alpha=1.0)
    image, text = (unit(5, seed).requires_grad_() for seed in (0, 1))
    temperature = torch.tensor([0.07], requires_grad=True)
    same = image.detach(), text.detach()
    loss = itc(context_of(image, text, *same, temperature=temperature)).values["itc"]
    entropies = []
    for query, keys, queue in ((*same, itc.text_queue), (*same[::-1], itc.image_queue)):
        p = (query @ torch.cat([keys, queue.rows]).T / 0.07).softmax(dim=1)
        entropies.append(-(p * p.log()).sum(dim=1).mean())
    torch.testing.assert_close(loss.detach(), sum(entropies) / 2)
    loss.backward()
    assert max(x.grad.abs().max() for x in (image, text)) < 1e-6
    assert temperature.grad.abs() < 1e-5


# A log of a sum of exp less a mean score: rounded as numbers of 1 / temperature are.
@pytest.mark.parametrize(("temperature", "rounding"), [(1.0, 1e-6), (0.07, 4e-6)])
def test_equal_similarities_give_the_logarithm_of_the_number_of_candidates(temperature, rounding):
    same = unit(1, 0).expand(8, -1)
    loss = build_itc(queue_size=0)(context_of(same, same, same, same, temperature)).values["itc"]
    assert loss.item() == pytest.approx(math.log(8), abs=rounding)


def test_on_one_rank_gathering_the_keys_changes_nothing():
    losses = [build_itc(gather_keys=g)(context_of(*four(6))).values["itc"] for g in (True, False)]
    assert torch.equal(*losses)


def test_forward_leaves_the_queues_and_after_step_pushes_every_micro_batch_in_order():
    itc = build_itc(queue_size=20)
    before = itc.image_queue.rows.clone()
    parts = [context_of(*[unit(4, 10 * i + j) for j in range(4)]) for i in range(2)]
    carries = [itc(part).carry for part in parts]
    assert torch.equal(itc.image_queue.rows, before)
    itc.after_step(carries, parts[0].progress)
    for queue, pushed in ((itc.image_queue, 2), (itc.text_queue, 3)):
        expected = torch.cat([unit(4, pushed), unit(4, 10 + pushed)])
        assert torch.equal(queue.rows[:8], expected)
    assert torch.equal(itc.image_queue.rows[8:], before[8:])


def test_logits_use_the_queue_as_it_was_before_the_step():
    itc = build_itc(queue_size=8)
    first = itc(context_of(*four(4)))
    again = itc(context_of(*four(4)))
    assert torch.equal(first.values["itc"], again.values["itc"])
    itc.after_step([first.carry], Progress(1, 4, 1000))
    assert not torch.equal(itc(context_of(*four(4))).values["itc"], first.values["itc"])


def test_without_a_queue_a_step_passes_and_leaves_no_state_behind():
    itc = build_itc(queue_size=0)
    itc.after_step([itc(context_of(*four(4))).carry], Progress(1, 4, 1000))
    assert itc.state()["image_queue"].shape == (0, WIDTH)
    itc.load_state(itc.state())


def test_similarities_handed_on_are_local_over_temperature_and_without_gradient():
    image, text, teacher_image, teacher_text = four(4)
    context = context_of(image.requires_grad_(), text, teacher_image, teacher_text, 0.5)
    build_itc(queue_size=8)(context)
    torch.testing.assert_close(context.given["sim_i2t"], image.detach() @ teacher_text.T / 0.5)
    torch.testing.assert_close(context.given["sim_t2i"], text @ teacher_image.T / 0.5)
    assert not context.given["sim_i2t"].requires_grad


def test_in_batch_recall_counts_images_that_find_their_caption():
    image = torch.eye(4, WIDTH)
    text = image[[0, 1, 3, 2]]
    loss = build_itc(queue_size=8)(context_of(image, text, image, text))
    assert loss.logs["itc_in_batch_recall"].item() == 0.5


def test_state_goes_round():
    a, b = build_itc(queue_size=6), build_itc(queue_size=6)
    a.after_step([a(context_of(*four(4))).carry], Progress(1, 4, 1000))
    b.load_state({key: value.clone() for key, value in a.state().items()})
    for objective in (a, b):
        objective.after_step([a(context_of(*four(4))).carry], Progress(2, 8, 1000))
    assert all(torch.equal(value, b.state()[key]) for key, value in a.state().items())
    assert b.image_queue.at == b.text_queue.at == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"queue_size": -1}, r"objectives\.itc\.queue_size=-1: 0 \(off\) or more"),
        ({"alpha": 1.5}, r"objectives\.itc\.alpha=1\.5: 0\.\.1"),
        ({"alpha_ramp": "soon"}, r"objectives\.itc\.alpha_ramp='soon': write a number and a unit"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        ITCConfig(**wrong)

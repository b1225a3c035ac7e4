"""The contrastive loss against open_clip's, on one rank and on two.

B local batch, W ranks, E joint space.
"""

import itertools
import os
import socket

import open_clip
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from elip_ds import dist
from elip_ds.objectives.base import Features, Setup
from elip_ds.objectives.contrastive import Contrastive, ContrastiveConfig

CASES = list(itertools.product((False, True), repeat=2))
"local_loss, gather_with_grad"


def make(local_loss=True, gather_with_grad=True, cache=True):
    config = ContrastiveConfig(
        local_loss=local_loss, gather_with_grad=gather_with_grad, cache=cache
    )
    return Contrastive(config, Setup(0, 16, 64, {}, 0))


def make_features(rows=8):
    """(rows, E) unit images and texts, and a scale (1,), the same everywhere."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, 16), dim=1) for _ in range(2))
    return image, text, torch.tensor([7.0])


def mine(rows):
    """This rank's share of (W * B, E), a leaf."""
    return rows.chunk(dist.world_size())[dist.rank()].clone().requires_grad_()


def loss_and_gradients(loss_of):
    """loss_of(image, text, scale) -> its value, and the gradients of the three on this rank."""
    image, text, scale = make_features()
    leaves = mine(image), mine(text), scale.requires_grad_()
    value = loss_of(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def here(local_loss, gather_with_grad):
    objective = make(local_loss, gather_with_grad)
    return loss_and_gradients(
        lambda image, text, scale: objective.loss(Features((image, text), (scale,))).values[
            "contrastive"
        ]
    )


def there(local_loss, gather_with_grad):
    """open_clip's; on several ranks by its own collectives."""
    loss = open_clip.ClipLoss(
        local_loss=local_loss,
        gather_with_grad=gather_with_grad,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )
    return loss_and_gradients(loss)


@pytest.mark.parametrize("case", CASES)
def test_on_one_rank_value_and_gradients_are_open_clips_whatever_the_settings(case):
    for a, b in zip(here(*case), there(*case), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


def test_the_loss_is_the_mean_over_rows_and_columns_of_the_textbook_sum():
    image, text, scale = make_features(5)
    logits = scale * image @ text.T
    terms = [logits[i, i] - logits[i].exp().sum().log() for i in range(5)]
    terms += [logits[i, i] - logits[:, i].exp().sum().log() for i in range(5)]
    loss = make().loss(Features((image, text), (scale,)))
    torch.testing.assert_close(loss.values["contrastive"], -sum(terms) / 10)
    assert loss.logs["logit_scale"].item() == 7
    hits = (logits.argmax(dim=1) == torch.arange(5)).float().mean()
    assert torch.equal(loss.logs["contrastive_in_batch_recall"], hits)


def test_it_caches_unless_told_otherwise():
    assert make().caches and not make(cache=False).caches


# ---- two ranks


def gather_and_weigh():
    """A gather whose rows each rank weighs differently -> rows, and the gradient of its own."""
    x = (torch.arange(6.0).view(3, 2) + 10 * dist.rank()).requires_grad_()
    rows = dist.gather_samples_with_grad(x)
    weights = torch.arange(float(len(rows))).view(-1, 1) + 100 * (1 + dist.rank())
    (rows * weights).sum().backward()
    return rows.detach(), x.grad


def run_rank(rank, port, folder):
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    dist.start(dist.Ranks(rank, rank, 2, 2, torch.device("cpu")), timeout_seconds=60)
    seen = {case: (here(*case), there(*case)) for case in CASES}
    torch.save((seen, gather_and_weigh()), folder / f"{rank}.pt")
    dist.stop()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


pair = [pytest.mark.slow, pytest.mark.world_size(2)]
two = pytest.mark.parametrize("case", [pytest.param(case, marks=pair) for case in CASES])


@two
def test_on_two_ranks_value_and_gradients_are_open_clips(case, two_ranks):
    for seen, _ in two_ranks:
        ours, theirs = seen[case]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


@two
def test_with_gathered_gradients_the_mean_over_ranks_is_one_ranks_gradient(case, two_ranks):
    """And without them it is not, as open_clip says."""
    local_loss, gather_with_grad = case
    value, image, text, scale = here(*case)
    first, second = (seen[case][0] for seen, _ in two_ranks)
    torch.testing.assert_close((first[0] + second[0]) / 2, value)
    # Each rank holds the gradient of its own rows; averaging over ranks halves it.
    features = torch.cat([first[1], second[1]]) / 2, torch.cat([first[2], second[2]]) / 2
    exact = all(
        torch.allclose(a, b, atol=1e-7) for a, b in zip(features, (image, text), strict=True)
    )
    assert exact == gather_with_grad
    torch.testing.assert_close((first[3] + second[3]) / 2, scale)
    if not (local_loss or gather_with_grad):
        torch.testing.assert_close(2 * features[0], image)


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_gather_with_gradient_sums_what_all_ranks_have_for_a_row(two_ranks):
    for rank, (_, (rows, grad)) in enumerate(two_ranks):
        own = torch.arange(6.0).view(3, 2)
        assert torch.equal(rows, torch.cat([own, own + 10]))
        weights = 2 * (torch.arange(3.0) + 3 * rank) + 300
        assert torch.equal(grad, weights.view(3, 1).expand(3, 2))

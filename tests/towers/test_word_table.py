"""The word table: lookups and the decoder with one gradient, equal to plain embeddings' one."""

import copy

import pytest
import torch
import torch.nn.functional as F

from elip_ds.towers.linear import linear
from elip_ds.towers.word_table import WordEmbedding

WORDS, WIDTH = 11, 8
IDS = (torch.tensor([[3, 3, 5, 3, 3, 7]]), torch.tensor([[5, 0], [10, 3]]))


def table():
    torch.manual_seed(0)
    return WordEmbedding(WORDS, WIDTH)


def losses(lookup, decode, *, words=True):
    """Of two lookups, and of the scores of the first one's vectors."""
    first, second = (lookup(ids) for ids in IDS)
    total = first.sin().sum() + (second**2).sum()
    return total + decode(first.cos()).exp().mean() if words else total


def plain_gradient(weight, **kind):
    weight = weight.detach().requires_grad_()
    losses(
        lambda ids: F.embedding(ids, weight), lambda x: linear(x, weight, None), **kind
    ).backward()
    return weight.grad


def own_gradient(word, **kind):
    word.weight.grad = None
    losses(word, lambda x: word(x, decode=True), **kind).backward()
    return word.weight.grad


def test_word_embedding_decodes_with_the_matrix_it_encodes_with():
    word = table()
    hidden = torch.randn(2, 5, WIDTH)
    assert torch.equal(word(hidden, decode=True), linear(hidden, word.weight, None))
    assert torch.equal(word(torch.tensor([[3]]))[0, 0], word.weight[3])
    assert [tuple(p.shape) for p in word.parameters()] == [(WORDS, WIDTH)]


@pytest.mark.parametrize("words", [True, False], ids=["with_decoder", "lookups_alone"])
def test_the_gradient_is_that_of_plain_embeddings_in_every_step(words):
    word = table()
    for _ in range(3):
        expected = plain_gradient(word.weight, words=words)
        assert torch.equal(own_gradient(word, words=words), expected)
        with torch.no_grad():
            word.weight -= 0.1 * expected


def test_two_graphs_alive_at_once_have_their_own_gradients():
    word = table()
    one = (word(IDS[0]) ** 2).sum()
    two = (word(IDS[1]) ** 3).sum()
    (first,) = torch.autograd.grad(one, word.weight)
    (second,) = torch.autograd.grad(two, word.weight)
    for ids, power, found in ((IDS[0], 2, first), (IDS[1], 3, second)):
        weight = word.weight.detach().requires_grad_()
        (F.embedding(ids, weight) ** power).sum().backward()
        assert torch.equal(found, weight.grad)


def test_a_graph_that_is_dropped_leaves_nothing_behind():
    word = table()
    losses(word, lambda x: word(x, decode=True))  # no backward
    assert torch.equal(own_gradient(word), plain_gradient(word.weight))


@pytest.mark.parametrize("change", ["in_place", "moved"])
def test_reads_follow_a_weight_that_changes_after_a_graph_was_dropped(change):
    word = table()
    losses(word, lambda x: word(x, decode=True))
    with torch.no_grad():
        if change == "in_place":
            word.weight += 1.0
        else:
            word.weight.data = word.weight.data.clone() + 1.0
    assert torch.equal(word(IDS[0]), word.weight[IDS[0]])
    assert torch.equal(own_gradient(word), plain_gradient(word.weight))


def test_a_copy_has_its_own_table():
    word = table()
    word(IDS[0])
    other = copy.deepcopy(word)
    assert own_gradient(other).any() and word.weight.grad is None


def test_no_lookup_makes_a_gradient_of_the_whole_table():
    word = table()
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == (WORDS, WIDTH):
                made.append(func.overloadpacket.__name__)
            return out

    loss = losses(word, lambda x: word(x, decode=True))
    with Watch():
        loss.backward()
    assert [name for name in made if name not in ("t", "detach", "view")] == [
        "mm",
        "index_put_",
        "index_put_",
    ]


def test_frozen_words_and_words_without_gradient_are_read_plainly():
    word = table()
    with torch.no_grad():
        assert not word(IDS[0]).requires_grad
    word.requires_grad_(False)
    assert not word(IDS[0]).requires_grad

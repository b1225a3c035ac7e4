"""What is kept for the backward pass, counted in live storages, and that it changes no gradient.

B batch, N tokens, D width.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from storages import Storages, sized
from torch import nn
from towers.test_med import uneven

from elip_ds.config import PruningConfig, Stage
from elip_ds.errors import UserError
from elip_ds.towers import BERT, MED, BERTConfig, MEDConfig, ViT, ViTConfig
from elip_ds.towers.bert import Pairing
from elip_ds.towers.clip_text import CLIPText, CLIPTextConfig
from elip_ds.towers.coattention import CoAttentionConfig, coattend, stream
from elip_ds.towers.layers import PreNormBlock
from elip_ds.towers.recompute import MODES, again, check_recompute, keeping
from elip_ds.towers.roberta import RoBERTa, RoBERTaConfig

B, N, D = 3, 10, 32
TEXT = {"vocab_size": 50, "width": D, "heads": 2, "max_positions": 16}
LENGTHS = torch.tensor([[10], [6], [2]])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_inputs():
    """input_ids, attention_mask (B, N)."""
    mask = (torch.arange(N) < LENGTHS).long()
    ids = torch.randint(1, 50, (B, N), generator=torch.Generator().manual_seed(1))
    return ids * mask, mask


# ---- every tower: mode, dropout -> module, what runs it


def vit(mode, activation="gelu"):
    config = ViTConfig(32, 8, D, 4, 2, activation=activation, recompute=mode)
    tower = uneven(ViT(config, PruningConfig([Stage(1, 2, 0.5)])))
    return tower, lambda: tower(draw(B, 3, 32, 32), draw(B, D, seed=1))[0]


def bert(mode, dropout):
    tower = BERT(BERTConfig(**TEXT, depth=5, fusion_layer=2, dropout=dropout, recompute=mode), 24)
    ids, mask = text_inputs()
    others = torch.tensor([2, 0, 2])
    rows = torch.tensor([0, 1, 1, 2, 2, 0, 1, 2, 0])  # two texts an image, then three more

    def run():
        states = tower.encode(ids, mask)[rows]
        pairing = Pairing((True, False), others)
        return torch.cat([x.flatten() for x in tower.fuse(states, mask[rows], image, pairing)])

    image = draw(B, 7, 24)
    return uneven(tower), run


def med(mode, dropout):
    tower = MED(MEDConfig(**TEXT, depth=3, dropout=dropout, recompute=mode), 24)
    ids, mask = text_inputs()

    def run():
        seen = tower.look(draw(B, 7, 24))
        pairing = Pairing((False,), torch.tensor([1, 2, 0]))
        _, pooled = tower.fuse(ids.repeat(2, 1), mask.repeat(2, 1), seen, pairing)
        made = tower.encode(ids, mask), tower.decode(ids, mask, seen), pooled
        return torch.cat([x.flatten() for x in made])

    return uneven(tower), run


def roberta(mode, dropout):
    tower = RoBERTa(RoBERTaConfig(**TEXT, depth=3, dropout=dropout, recompute=mode))
    return uneven(tower), lambda: tower(*text_inputs())


def clip_text(mode):
    tower = CLIPText(CLIPTextConfig(**TEXT, depth=3, activation="quick_gelu", recompute=mode))
    return uneven(tower), lambda: tower(text_inputs()[0])[0]


def streams(mode, dropout):
    config = CoAttentionConfig(D, depth=3, heads=2, dropout=dropout)
    layers = nn.ModuleList([uneven(stream(config), seed) for seed in (0, 1)])

    def run():
        text, image, mask = draw(B, N, D), draw(B, 7, D, seed=1), text_inputs()[1]
        both = coattend(*layers, text, image, mask, recompute=mode, training=layers.training)
        return torch.cat([x.flatten() for x in both])

    return layers, run


TOWERS = {
    "vit": vit,
    "vit, quick gelu": lambda mode: vit(mode, "quick_gelu"),
    "clip text": clip_text,
    **{
        f"{name}{', dropout' if dropout else ''}": lambda mode, build=build, d=dropout: build(
            mode, d
        )
        for name, build in {"bert": bert, "med": med, "roberta": roberta, "both": streams}.items()
        for dropout in (0.0, 0.25)
    },
}
towers = pytest.mark.parametrize("build", TOWERS.values(), ids=TOWERS)


def results(build, mode):
    """Output and gradients of one training step."""
    tower, run = build(mode)
    torch.manual_seed(5)
    out = run()
    (out * draw(*out.shape, seed=6)).sum().backward()
    return {"output": out} | {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}


@towers
@pytest.mark.parametrize("mode", ["cheap", "full"])
def test_no_bit_of_output_and_gradients_depends_on_the_mode(build, mode):
    plain, other = results(build, "none"), results(build, mode)
    assert plain.keys() == other.keys() and len(plain) > 10
    for name in plain:
        assert torch.equal(plain[name], other[name]), name


def left_by(build, mode):
    """Storages alive after a forward pass of which only the loss is held."""
    _, run = build(mode)
    with Storages() as storages:
        loss = run().sum()
    assert loss.requires_grad
    return storages.alive()


NORM, GELU = "native_layer_norm", "gelu"


# How many results of a norm outlive the forward although they could be made again: those that the
# layers did not make themselves but take in, of the embeddings, as long as no dropout makes others
# of them. MED's embeddings are made three times.
@pytest.mark.parametrize(
    ("name", "taken_in"),
    [
        ("vit", 0),
        ("bert", 1),
        ("bert, dropout", 0),
        ("med", 3),
        ("med, dropout", 0),
        ("roberta", 1),
        ("both", 0),
        ("both, dropout", 0),
    ],
)
def test_cheap_keeps_no_result_of_a_norm_or_an_activation(name, taken_in):
    def results_of(mode):
        alive = left_by(TOWERS[name], mode)
        # A norm also gives means and inverse deviations, one number a row, which its derivative
        # reads.
        norms = [m for m in sized(alive, NORM) if m.shape[-1] == D]
        return len(norms), len(sized(alive, GELU))

    norms, activations = results_of("none")
    assert norms > taken_in + 3 and activations >= 3
    assert results_of("cheap") == (taken_in, 0)


@pytest.mark.parametrize("depth", [1, 4])
def test_cheap_saves_two_norms_and_one_activation_a_block_to_the_byte(depth):
    def held(mode):
        blocks = [PreNormBlock(D, 2, 4 * D, eps=1e-6) for _ in range(depth)]
        x = draw(B, N, D).requires_grad_()
        with Storages() as storages:
            with keeping(mode, True) as run:
                for block in blocks:
                    x = run(block, x)
            loss = x.sum()
            del x
        assert loss.requires_grad
        return sum(m.nbytes for m in storages.alive() if m.shape != ())

    assert held("none") - held("cheap") == depth * B * N * (2 * D + 4 * D) * 4


@pytest.mark.parametrize("depth", [1, 4])
def test_full_keeps_nothing_but_the_input_of_each_layer(depth):
    blocks = [PreNormBlock(D, 2, 4 * D, eps=1e-6) for _ in range(depth)]
    x = draw(B, N, D).requires_grad_()
    with Storages() as storages:
        with keeping("full", True) as run:
            for block in blocks:
                x = run(block, x)
        loss = x.sum()
        del x
    tensors = [m for m in storages.alive() if m.dtype == torch.float32 and m.shape != ()]
    # The first one's input is not made here.
    assert [m.shape for m in tensors] == (depth - 1) * [(B, N, D)]
    loss.backward()


# ---- again()


def double(x):
    return 2 * x


VIEWS = {
    "whole": lambda y: y,
    "transposed": lambda y: y.transpose(0, 2),
    "a part": lambda y: y[1:, ::2],
    "one row": lambda y: y[1, 2],
    "broadcast": lambda y: y[:, :1].expand(-1, 7, -1),
    "flat": lambda y: y.view(-1, 6),
    "the last third": lambda y: y.chunk(3, dim=-1)[2],
    "a view of a view": lambda y: y.transpose(0, 1)[2:].flatten(1)[:, 3:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_of_a_result_is_made_again_as_the_result_is(view):
    def grads(mode):
        x = draw(4, 5, 6).requires_grad_()
        weight = torch.full((), 0.5).requires_grad_()
        with Storages() as storages, keeping(mode, True):
            loss = (view(again(F.gelu, x)) * weight).sum()
        alive = sized(storages.alive(), "gelu")
        loss.backward()
        return alive, x.grad, weight.grad

    kept, *plain = grads("none")
    made_again, *cheap = grads("cheap")
    # flatten of what is not contiguous is a copy, which is no result of again() and stays.
    assert made_again == [] and (len(kept) == 1) == (view is not VIEWS["a view of a view"])
    assert all(torch.equal(a, b) for a, b in zip(plain, cheap, strict=True))


def test_a_result_saved_several_times_is_right_each_time():
    x = draw(4, 6).requires_grad_()
    with keeping("cheap", True):
        y = again(torch.sin, x)
        loss = (y * y.T.reshape(4, 6) * y).sum() + y.exp().sum()
    loss.backward()
    same = x.detach().clone().requires_grad_()
    y = same.sin()
    ((y * y.T.reshape(4, 6) * y).sum() + y.exp().sum()).backward()
    torch.testing.assert_close(x.grad, same.grad)


def test_results_of_results_are_made_again_one_after_the_other():
    x = draw(4, 6).requires_grad_()
    calls = []

    def watched(x):
        calls.append(1)
        return x.sin()

    with Storages() as storages, keeping("cheap", True):
        y = again(watched, again(watched, again(watched, x)))
        loss = (y * y).sum()
        del y
    assert len(calls) == 3
    # What the next function takes in is what a recipe is made of; only the last one is gone.
    assert len(sized(storages.alive(), "sin")) == 2
    loss.backward()
    same = x.detach().clone().requires_grad_()
    same.sin().sin().sin().square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


def test_memory_that_is_given_out_anew_is_not_taken_for_what_was_there():
    """A result dies at once; the tensor that then lies at its address is another."""
    places, reused = set(), 0
    with keeping("cheap", True):
        terms, inputs, wanted = [], [], []
        for i in range(50):
            x = draw(1000, seed=100 + i).requires_grad_()
            gone = again(double, draw(1000, seed=i).requires_grad_())
            places.add(gone.data_ptr())
            del gone
            y = x + 1  # not made by again()
            reused += y.data_ptr() in places
            terms.append((y * y).sum())
            inputs.append(x)
            wanted.append(2 * (x.detach() + 1))
    assert reused > 0
    sum(terms).backward()
    for x, grad in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(x.grad, grad)


def test_nothing_outlives_the_context_but_what_a_derivative_reads():
    """The input of a function whose result nobody saved is free, though the graph is held."""
    x = draw(500).requires_grad_()
    with Storages() as storages, keeping("cheap", True):
        unread = again(double, x + 1)  # neither + nor 2 * saves anything
        loss = (unread + again(torch.sin, x - 1).exp()).sum()
        del unread
    alive = storages.alive()
    assert sized(alive, "add") == [] and len(sized(alive, "sub")) == 1
    loss.backward()


@towers
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_that_no_backward_pass_goes_through_is_freed(build, mode):
    """Of which METER has one in every step: no loss of masked words reads the last patches."""
    _, run = build(mode)
    with Storages() as storages:
        out = run()
    assert out.requires_grad and len(storages.alive()) > 1
    del out
    assert storages.alive() == []


@pytest.mark.parametrize("mode", MODES)
def test_the_backward_pass_frees_a_layer_once_it_is_through_it(mode):
    blocks = [PreNormBlock(D, 2, 4 * D, eps=1e-6) for _ in range(4)]
    x = draw(B, N, D).requires_grad_()
    left = []
    with Storages() as storages:
        with keeping(mode, True) as run:
            for block in blocks:
                x = run(block, x)
                x.register_hook(lambda _: left.append(len(hidden(storages))))
        loss = x.sum()
        del x
    count = len(hidden(storages))
    assert count == (0 if mode == "full" else 4)
    loss.backward()
    # At the gradient of each block's output, from the last block to the first.
    assert left == ([0] * 4 if mode == "full" else [4, 3, 2, 1])


def hidden(storages):
    """What the first linear layer of an MLP gave."""
    return [m for m in storages.alive() if "mm" in m.operation and m.shape[-1] == 4 * D]


def test_a_context_left_by_an_error_is_closed():
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), keeping("cheap", True) as run:
        run(fails)
    x = draw(500).requires_grad_()
    with Storages() as storages:
        loss = again(torch.sin, x).exp().square().sum()
        y = again(torch.sin, x)
        kept = (y * y).sum()
        del y
    assert len(sized(storages.alive(), "sin")) == 1  # the second: squares keep what they square
    (loss + kept).backward()


def test_copies_are_made_again_in_every_mode_and_results_in_the_cheap_one_alone():
    rows = torch.tensor([0, 2, 2])

    def made_again(mode, copies):
        x, calls = draw(4, 6).requires_grad_(), []

        def pick(x):
            calls.append(1)
            return x.index_select(0, rows)

        with keeping(mode, True):
            y = again(pick, x, copies=copies)
            loss = (y * y).sum()
        loss.backward()
        torch.testing.assert_close(x.grad, 2 * x * torch.tensor([[1.0], [0], [2], [0]]))
        return len(calls) > 1

    assert [made_again(mode, True) for mode in ("none", "cheap")] == [True, True]
    assert [made_again(mode, False) for mode in ("none", "cheap")] == [False, True]


# ---- when nothing is special


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("why", ["eval", "no_grad"])
def test_without_training_or_gradient_nothing_is_run_again(mode, why):
    calls = []

    def layer(x):
        calls.append(1)
        return again(watched, x).square()

    def watched(x):
        calls.append(1)
        return x.sin()

    x = draw(4, 6).requires_grad_()
    with torch.set_grad_enabled(why != "no_grad"), keeping(mode, why != "eval") as run:
        y = run(layer, x)
    assert y.requires_grad == (why != "no_grad")
    if why == "eval":
        y.sum().backward()
        torch.testing.assert_close(x.grad, 2 * x.sin().detach() * x.cos().detach())
    assert len(calls) == 2


def test_a_tower_without_training_keeps_what_plain_autograd_keeps():
    """As a teacher's gradient, or one for a picture of saliency, would be taken."""

    def left(mode):
        tower, run = vit(mode)
        tower.eval()
        with Storages() as storages:
            loss = run().sum()
        assert loss.requires_grad
        return sorted(storages.alive())

    assert left("cheap") == left("full") == left("none")


@pytest.mark.parametrize("mode", MODES)
def test_a_known_mode_passes(mode):
    check_recompute("model.vision.recompute", mode)


@pytest.mark.parametrize("mode", ["", "Cheap", "true", True, False, None])
def test_an_unknown_mode_is_refused_with_its_key_and_those_that_there_are(mode):
    message = rf"^model\.vision\.recompute={mode!r}: choose none, cheap, full$"
    with pytest.raises(UserError, match=message):
        check_recompute("model.vision.recompute", mode)
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ViTConfig(), recompute=mode)

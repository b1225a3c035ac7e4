"""All pairs of texts and images in one pass, against one pair at a time; the class token alone.

B images, R texts, L text tokens, M image tokens, D width.
"""

import pytest
import torch
from storages import Storages
from towers.test_med import uneven

from elip_ds.towers import BERT, MED, BERTConfig, MEDConfig
from elip_ds.towers.bert import BERTLayer, Pairing, TextConfig
from elip_ds.towers.layers import Readers
from elip_ds.towers.recompute import keeping

SMALL = {"vocab_size": 50, "width": 32, "heads": 2, "max_positions": 16, "dropout": 0.0}
B, L, M, C, D = 3, 6, 5, 24, 32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_bert(fusion_layers):
    return uneven(BERT(BERTConfig(**SMALL, depth=1 + fusion_layers, fusion_layer=1), C))


def make_med(layers):
    return uneven(MED(MEDConfig(**SMALL, depth=layers), C))


def make_texts(tower, count):
    """What fuse takes of count texts of different lengths: states or ids, and a mask."""
    lengths = torch.tensor([1 + (5 * i) % L for i in range(count)]).unsqueeze(1)
    mask = (torch.arange(L) < lengths).long()
    if isinstance(tower, BERT):
        return draw(count, L, D, seed=1), mask
    ids = torch.randint(1, 50, (count, L), generator=torch.Generator().manual_seed(1))
    return ids * mask, mask


PAIRINGS = {
    "a text": ((True,), None),
    "a class token": ((False,), None),
    "both kinds": ((False, True), None),
    "mixed": ((True, False, False, True), None),
    "only others": ((), [2, 0, 0, 1, 2, 2]),
    "words and others": ((True,), [1, 2, 0]),
    "positives, negatives and words": ((False, False, True), [1, 2, 0]),
    "twice the others": ((False,), [1, 2, 0, 2, 0, 1]),
}
pairings = pytest.mark.parametrize(("own", "others"), PAIRINGS.values(), ids=PAIRINGS)


def one_at_a_time(tower, texts, mask, image, own, others):
    """The whole last layer for each pair; then those rows and tokens that were asked for."""
    images = [i for i in range(B) for _ in own] + (others or [])
    kinds = list(own) * B + [False] * len(others or [])
    states = [
        tower.fuse(texts[r : r + 1], mask[r : r + 1], image[i : i + 1])[0]
        for r, i in enumerate(images)
    ]
    words = [x for x, wanted in zip(states, kinds, strict=True) if wanted]
    rest = [x[:, 0] for x, wanted in zip(states, kinds, strict=True) if not wanted]
    return (
        torch.cat(words) if words else torch.zeros(0, L, D),
        torch.cat(rest) if rest else torch.zeros(0, D),
    )


@pairings
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("make", [make_bert, make_med], ids=["bert", "med"])
def test_all_pairs_at_once_equal_one_pair_at_a_time(make, layers, own, others):
    tower = make(layers)
    count = B * len(own) + len(others or [])
    texts, mask = make_texts(tower, count)
    image = draw(B, M, C)

    def results(together):
        tower.zero_grad(set_to_none=True)
        seen = image.clone().requires_grad_()
        if together:
            pairing = Pairing(own, None if others is None else torch.tensor(others))
            states, pooled = tower.fuse(texts, mask, seen, pairing)
        else:
            states, pooled = one_at_a_time(tower, texts, mask, seen, own, others)
        loss = (states * draw(*states.shape, seed=2)).sum()
        loss = loss + (pooled * draw(*pooled.shape, seed=3)).sum()
        loss.backward()
        read = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
        return {"states": states, "pooled": pooled, "image": seen.grad} | read

    mine, theirs = results(True), results(False)
    words = sum(own)
    assert mine["states"].shape == (B * words, L, D)
    assert mine["pooled"].shape == (count - B * words, D)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-4, rtol=1e-4, msg=name)


@pairings
@pytest.mark.parametrize("make", [make_bert, make_med], ids=["bert", "med"])
def test_keys_and_values_of_an_image_are_projected_once_a_layer_whoever_reads_it(make, own, others):
    tower = make(3)
    texts, mask = make_texts(tower, B * len(own) + len(others or []))
    seen = []
    for layer in tower.layers:
        if hasattr(layer, "cross"):
            layer.cross.key_value.register_forward_hook(
                lambda _, inputs, output: seen.append((inputs[0].shape, output.shape))
            )
    pairing = Pairing(own, None if others is None else torch.tensor(others))
    tower.fuse(texts, mask, draw(B, M, C), pairing)
    assert seen == 3 * [((B, M, C), (B, M, 2 * D))]


def test_keys_and_values_that_were_made_before_are_taken_as_they_are():
    tower = make_med(3)
    texts, mask = make_texts(tower, B)
    image = draw(B, M, C)
    seen = tower.look(image)
    assert [x.shape for x in seen] == 3 * [(B, M, 2 * D)]
    calls = []
    for layer in tower.layers:
        layer.cross.key_value.register_forward_hook(lambda *_: calls.append(1))
    fused, decoded = tower.fuse(texts, mask, seen)[0], tower.decode(texts, mask, seen)
    assert calls == []
    assert torch.equal(fused, tower.fuse(texts, mask, image)[0])
    assert torch.equal(decoded, tower.decode(texts, mask, image))
    assert len(calls) == 6


# ---- the last layer for the class token alone


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_layer_for_the_class_token_alone_equals_the_whole_one(context, masked):
    layer = uneven(BERTLayer(TextConfig(**SMALL), C if context else None))
    image, pull = draw(B, M, C), draw(B, 1, D, seed=2)
    visible = (torch.arange(L) < torch.tensor([[6], [3], [1]]))[:, None, None, :]

    def results(asks):
        x, seen = draw(B, L, D, seed=1).requires_grad_(), image.clone().requires_grad_()
        keys_values = layer.cross.key_value(seen) if context else None
        out = layer(x, visible if masked else None, keys_values, None, asks=asks)[:, :1]
        inputs = [x, seen] if context else [x]
        return [out, *torch.autograd.grad((out * pull).sum(), [*inputs, *layer.parameters()])]

    alone, whole = results("class"), results("all")
    assert alone[0].shape == (B, 1, D)
    for mine, theirs in zip(alone, whole, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    # Of the other tokens it only reads keys and values.
    assert alone[1][:, 1:].any()


def test_the_class_token_alone_keeps_less_than_the_whole_layer():
    layer = uneven(BERTLayer(TextConfig(**SMALL), C))

    def kept(asks):
        x = draw(9, L, D).requires_grad_()
        keys_values = layer.cross.key_value(draw(B, M, C))
        with Storages() as storages:
            loss = layer(x, None, keys_values, readers=Readers(3), asks=asks)[:, 0].sum()
        assert loss.requires_grad
        return storages.alive()

    mlp = [m.shape for m in kept("class") if m.shape[-1:] == (4 * D,)]
    assert mlp and all(shape[:-1].numel() == 9 for shape in map(torch.Size, mlp))
    assert sum(m.nbytes for m in kept("class")) < 0.5 * sum(m.nbytes for m in kept("all"))


def test_where_words_are_wanted_of_some_texts_the_others_still_cost_one_token_in_the_last_layer():
    tower = make_bert(2)
    sizes = []
    tower.layers[-1].mlp.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape))
    texts, mask = make_texts(tower, 12)
    tower.fuse(texts, mask, draw(B, M, C), Pairing((True, False, False), torch.tensor([1, 2, 0])))
    assert sizes == [(B, L, D), (2 * B + 3, 1, D)]


# ---- the last layer for chosen words alone


PLACES = torch.tensor([16, 0, 3, 7, 5])
"Of 3 texts of 6 words, in no order; of the second one alone, of the third one the last but one."


@pytest.mark.parametrize("others", [None, [1, 2, 0]], ids=["words", "words and others"])
@pytest.mark.parametrize("make", [make_bert, make_med], ids=["bert", "med"])
def test_chosen_words_equal_those_among_all(make, others):
    tower, image = make(2), draw(B, M, C)
    texts, mask = make_texts(tower, B + len(others or []))
    rows = None if others is None else torch.tensor(others)

    def results(places):
        seen = image.clone().requires_grad_()
        tower.zero_grad(set_to_none=True)
        states, pooled = tower.fuse(texts, mask, seen, Pairing((True,), rows, places))
        states = states.flatten(0, 1)[PLACES] if places is None else states
        loss = (states * draw(*states.shape, seed=2)).sum() + pooled.sin().sum()
        loss.backward()
        read = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
        return {"states": states, "pooled": pooled, "image": seen.grad} | read

    chosen, among_all = results(PLACES), results(None)
    assert chosen["states"].shape == (len(PLACES), D) and chosen.keys() == among_all.keys()
    for name in chosen:
        torch.testing.assert_close(chosen[name], among_all[name], atol=1e-4, rtol=1e-4, msg=name)


def test_chosen_words_alone_go_through_the_last_feed_forward_and_its_projections():
    tower, sizes = make_bert(2), []
    last = tower.layers[-1]
    for part in (last.attn.proj, last.cross.query, last.cross.proj, last.mlp):
        part.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape))
    texts, mask = make_texts(tower, B)
    tower.fuse(texts, mask, draw(B, M, C), Pairing(places=PLACES))
    assert sizes == 4 * [(len(PLACES), D)]


def test_chosen_words_keep_less_than_all():
    layer = uneven(BERTLayer(TextConfig(**SMALL), C))

    def kept(asks):
        x = draw(B, L, D).requires_grad_()
        keys_values = layer.cross.key_value(draw(B, M, C))
        with keeping("none", True) as run, Storages() as storages:
            loss = run(layer, x, None, keys_values, None, False, None, asks).sum()
        assert loss.requires_grad
        return sum(made.nbytes for made in storages.alive())

    assert kept(PLACES) < 0.6 * kept("all")

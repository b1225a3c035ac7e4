"""Linear layers against torch's, of every form in which they are called."""

import pytest
import torch
import torch.nn.functional as F
from storages import Storages

from elip_ds.towers.linear import Linear, linear

WIDTH, OUT = 12, 20


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    monkeypatch.setattr("elip_ds.towers.linear.ASKED", torch.backends.mkldnn.is_available())


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(way, x, weight, bias):
    """Output and gradients."""
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = way(inputs[0], inputs[1], inputs[2] if bias is not None else None)
    (out * draw(*out.shape, seed=9)).sum().backward()
    return [out, *(t.grad for t in inputs)]


INPUTS = {
    "a sequence": draw(3, 5, WIDTH),
    "rows": draw(7, WIDTH),
    "first tokens": draw(3, 5, WIDTH)[:, :1],
    "transposed": draw(WIDTH, 5).T,
    "nothing": draw(0, WIDTH),
}


@pytest.mark.parametrize("bias", [draw(OUT, seed=2), None], ids=["bias", "no_bias"])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_values_and_gradients_are_those_of_torch(x, bias):
    weight = draw(OUT, WIDTH, seed=1)
    found, expected = (results(way, x, weight, bias) for way in (linear, F.linear))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_torchs_own(dtype):
    x, weight, bias = (t.to(dtype) for t in (draw(3, WIDTH), draw(OUT, WIDTH), draw(OUT)))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_under_autocast_it_is_rounded_as_torchs():
    layer, x = Linear(WIDTH, OUT), draw(3, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, F.linear(x, layer.weight, layer.bias))


def test_a_frozen_weight_gets_no_gradient_and_passes_it_on():
    layer, x = Linear(WIDTH, OUT).requires_grad_(False), draw(3, WIDTH).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(3, -1))
    assert layer.weight.grad is None and layer.bias.grad is None


def test_no_more_is_kept_than_by_torch():
    layer = Linear(WIDTH, OUT)
    with Storages() as storages:
        x = draw(3, 5, WIDTH).requires_grad_()
        out = layer(x)
    shapes = sorted(made.shape for made in storages.alive())
    assert shapes == [(3, 5, WIDTH), tuple(out.shape)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_in_fp32_on_a_cpu_the_products_are_onednns():
    layer = Linear(WIDTH, OUT)
    with Storages() as storages:
        layer(draw(3, WIDTH)).sum().backward()
    assert any("mkldnn" in made.operation for made in storages.all())

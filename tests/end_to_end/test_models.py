"""BLIP, METER and CLIP under every ZeRO stage, with and without stored activations.

ALBEF's own numbers are in test_stages.py.
"""

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

FEW = ("schedule.length=48 samples", "checkpoint.every=48 samples", "eval.match_candidates=8")
RECOMPUTE = {
    "blip": ("vision", "text"),
    "meter": ("vision", "text", "fusion"),
    "clip": ("vision", "text"),
}


@pytest.mark.parametrize("model", RECOMPUTE)
def test_every_stage_and_recomputing_give_the_same_losses_and_weights(start, model):
    plain = start(f"{model}-z0", *FEW, json="z0", model=model).finish()
    losses, reference = plain.losses(), load_file(plain.newest() / "weights.safetensors")
    assert len(losses) == 6
    cheap, full = (
        [f"model.{part}.recompute={mode}" for part in RECOMPUTE[model]]
        for mode in ("cheap", "full")
    )
    for name, words in (("z1", []), ("z2", cheap), ("z3", full)):
        job = start(f"{model}-{name}", *FEW, *words, json=name, model=model).finish()
        found = job.losses()
        assert found.keys() == losses.keys()
        for step, values in losses.items():
            assert found[step] == pytest.approx(values, rel=1e-4), (name, step)
        weights = load_file(job.newest() / "weights.safetensors")
        assert weights.keys() == reference.keys()
        # AdamW divides by the gradient's own size, so rounding shows most where there is hardly
        # any; a whole step is 1e-3.
        apart = {n: (weights[n] - reference[n]).abs().max().item() for n in reference}
        assert max(apart.values()) < 1e-3, (name, max(apart, key=lambda n: apart[n]))


@pytest.mark.parametrize("model", RECOMPUTE)
def test_a_resumed_run_goes_on_as_an_uninterrupted_one(start, model):
    whole = start(f"{model}-whole", *FEW, model=model).finish()
    half = ("schedule.length=48 samples", "checkpoint.every=24 samples", "eval.match_candidates=8")
    job = start(f"{model}-half", *half, model=model)
    job.wait_for(lambda: list((job.dir / "ckpt").glob("step-*")), "a checkpoint")
    job.kill()
    job.finish(ok=False)
    resumed = start(f"{model}-half", *half, model=model).finish()
    assert resumed.losses() == whole.losses()


@pytest.mark.parametrize("model", RECOMPUTE)
def test_it_trains_in_bf16_with_accumulation(start, model):
    words = ("engine.precision=bf16", "batching.micro_batch_size=2", "optim.lr=3e-3")
    job = start(f"{model}-half-precision", *FEW, *words, json="z3", model=model).finish()
    losses = job.losses()
    assert all(losses[6][name] < 1.5 * losses[1][name] for name in losses[1])

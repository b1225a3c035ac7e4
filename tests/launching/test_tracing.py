"""A configuration's step on tensors without data agrees with the same step on real ones."""

import pytest
import torch
from conftest import tiny_words

from elip_ds.batching.gather import Limits
from elip_ds.batching.trace import trace_step
from elip_ds.batching.zero import Reduction, Zero
from elip_ds.config import load_config
from elip_ds.data.made_up import made_up_vocabulary, random_batch
from elip_ds.launching.tracing import LATE, Setting, StepTracer, cast_parameters, most_tokens
from elip_ds.tasks import build_pretrain

ALONE = Zero(stage=0, world_size=0)
MODELS = ("albef", "blip", "meter", "clip")


def tracer(*words: str, zero: Zero = ALONE, model: str = "albef", **setting) -> StepTracer:
    tokenizer = {"albef": "albef", "blip": "blip", "meter": "bert", "clip": "clip"}[model]
    words = (*words, f"data.tokenizer={tokenizer}")
    return StepTracer(load_config(tiny_words(*words, model=model)), Setting(zero, **setting))


def real_peaks(config, dtype: torch.dtype, size: int):
    """The same counting, on a task that computes."""
    vocabulary = made_up_vocabulary(config)
    task = build_pretrain(config, vocabulary).train()
    cast_parameters(task, dtype)
    if task.teacher is not None:
        task.teacher.masters(lambda p: p.data)
    host, kept = random_batch(config, vocabulary, size), []

    def forward(_: int) -> torch.Tensor:
        kept[:] = [host.to(torch.device("cpu"), dtype)]
        return task(kept[0], LATE).total

    groups = [[p for p in task.parameters() if p.requires_grad]]
    zero = Zero(stage=0, world_size=0, dtype=dtype)
    with torch.autograd.set_multithreading_enabled(False):
        return trace_step(
            Reduction(zero, groups),
            micro_batch_size=size,
            micro_steps=1,
            forward=forward,
            update=lambda: task.after_step(LATE, lambda p: p.data),
        ).peaks


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_traced_step_has_the_peaks_of_a_real_one(model, dtype):
    made = tracer(model=model, zero=Zero(0, 0, dtype, dtype), device="cpu")
    traced = made.trace(6).peaks
    real = real_peaks(made.config, dtype, 6)
    for phase in ("forward", "backward", "step"):
        assert getattr(traced, phase) == pytest.approx(getattr(real, phase), rel=0.02), phase


def test_parts_are_told_apart_and_add_up():
    prediction = tracer().predict(8)
    assert sum(prediction.parts.values()) == prediction.peaks.highest
    towers = [f"activations, {name}" for name in ("vision", "text", "fusion")]
    for part in (*towers, "logits and heads"):
        assert prediction.parts[part] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_sharded_step_holds_less(stage):
    whole, sharded = (
        tracer(zero=Zero(s, 8, bucket=1000, gather=Limits(persist=100, ahead=1000))).predict(4)
        for s in (0, stage)
    )
    assert sharded.parts["parameters"] <= whole.parts["parameters"]
    assert (sharded.parts["parameters"] < whole.parts["parameters"]) == (stage == 3)


@pytest.mark.slow
def test_more_ranks_make_more_keys():
    few, many = (tracer(zero=Zero(0, n)).trace(4).peaks.step for n in (1, 64))
    assert many - few > 63 * 4 * 16 * 4  # (N * B, E) keys in fp32


@pytest.mark.slow
def test_memory_grows_with_samples_and_shrinks_with_pruning():
    pruned, plain = tracer(), tracer("pruning.stages=[]")
    small, large = (pruned.trace(n).peaks.highest for n in (4, 8))
    assert small < large < plain.trace(8).peaks.highest


@pytest.mark.slow
def test_eager_attention_keeps_more_than_fused():
    words = ["model.vision.image_size=64"]
    fused, eager = (tracer(*words, attention=a).trace(8).peaks.forward for a in ("fused", "eager"))
    assert fused < eager


@pytest.mark.slow
def test_the_schedules_dearest_stretch_is_traced():
    change = "pruning.schedule=[{after: 8 samples, keep_ratios: [0.9, 0.8]}]"
    config = load_config(tiny_words(change))
    assert most_tokens(config) == (0.9, 0.8)
    dear = tracer(change).trace(8).peaks
    assert dear == StepTracer(config, Setting(ALONE), (0.9, 0.8)).trace(8).peaks
    assert dear.highest > StepTracer(config, Setting(ALONE), (0.5, 0.25)).trace(8).peaks.highest


@pytest.mark.slow
def test_accumulated_micro_batches_are_traced_with_what_they_leave():
    once, more = (tracer(zero=Zero(0, 2), accumulation=n).trace(4).peaks for n in (1, 4))
    assert more.forward > once.forward  # gradients of the first lie there


@pytest.mark.slow
def test_contrasting_all_micro_batches_at_once_is_traced():
    assert tracer(model="clip", accumulation=3).trace(4).peaks.highest > 0


def test_a_trace_leaves_nothing_behind():
    made = tracer()
    assert made.trace(4) == made.trace(4)


def test_a_shared_parameter_stays_shared_when_it_is_cast():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.weight = a.weight
    both = torch.nn.ModuleList([a, b])
    cast_parameters(both, torch.bfloat16)
    assert a.weight is b.weight and a.weight.dtype == torch.bfloat16

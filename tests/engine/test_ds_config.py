"""From the JSON on disk to what deepspeed.initialize gets. Refusals: end_to_end/test_doors.py."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from elip_ds.batching import Plan
from elip_ds.config.schema import BatchingConfig, EngineConfig, OptimConfig
from elip_ds.engine import json_batch, read_ds_config
from elip_ds.engine.ds_config import fill_ds_config
from elip_ds.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAN = Plan(micro_batch_size=4, gradient_accumulation_steps=3, world_size=1)


def fill(
    tree: dict, *, precision: str = "auto", clip: float = 0.0, device=CPU, plan: Plan = PLAN
) -> dict:
    return fill_ds_config(
        tree,
        engine=EngineConfig(precision=precision),
        optim=OptimConfig(clip_norm=clip),
        plan=plan,
        device=device,
    )


def enabled(full: dict) -> str:
    on = [name for name in ("bf16", "fp16") if full[name]["enabled"]]
    assert len(on) < 2
    return on[0] if on else "fp32"


def test_there_are_shipped_files():
    assert {path.stem for path in SHIPPED} >= {"z0", "z1", "z2", "z3"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_is_filled_completely_on_a_cpu(path):
    full = fill(read_ds_config(str(path)), clip=1.5)
    assert '"auto"' not in json.dumps(full)
    assert full["gradient_clipping"] == 1.5
    assert enabled(full) == "fp32"
    assert full["zero_optimization"].get("overlap_comm") in (None, False)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_reads_a_filled_file_as_it_was_meant(path):
    seen = DeepSpeedConfig(fill(read_ds_config(str(path)), precision="bf16"))
    assert seen.train_batch_size == 12
    assert seen.zero_optimization_stage == int(path.stem[1])
    assert seen.bfloat16_config.enabled and not seen.float16_config.enabled


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_only_a_gpu_overlaps_communication(path):
    tree, two = read_ds_config(str(path)), Plan(4, 1, 2)
    full = fill(tree, precision="bf16", device=CUDA, plan=two)
    assert full["zero_optimization"].get("overlap_comm") in (None, True)
    assert not fill(tree, plan=two)["zero_optimization"].get("overlap_comm")


@pytest.mark.parametrize(
    "plan", [Plan(4, 3, 1), Plan(2, 1, 8), Plan(1, 1, 1)], ids=lambda plan: str(plan)
)
def test_the_batch_triple_is_the_plans(plan):
    full = fill_ds_config(
        read_ds_config(str(SHIPPED[0])),
        engine=EngineConfig(),
        optim=OptimConfig(),
        plan=plan,
        device=CPU,
    )
    micro, steps = full["train_micro_batch_size_per_gpu"], full["gradient_accumulation_steps"]
    assert (micro, steps) == (plan.micro_batch_size, plan.gradient_accumulation_steps)
    assert full["train_batch_size"] == micro * steps * plan.world_size


def test_what_is_filled_in_is_a_copy():
    tree = {"zero_optimization": {"stage": 2, "overlap_comm": "auto"}, "bf16": {"enabled": "auto"}}
    before = json.dumps(tree)
    fill(tree)
    assert json.dumps(tree) == before


def test_what_the_file_says_in_numbers_stays():
    tree = {
        "steps_per_print": 7,
        "gradient_clipping": 2.0,
        "fp16": {"enabled": "auto", "hysteresis": 5},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 123, "overlap_comm": True},
    }
    full = fill(tree, clip=2.0)
    assert full["steps_per_print"] == 7
    assert full["fp16"] == {"enabled": False, "hysteresis": 5}
    assert full["zero_optimization"] == tree["zero_optimization"]


def test_an_empty_file_is_plain_data_parallel_training():
    full = fill({})
    assert full["zero_optimization"] == {"stage": 0}
    assert enabled(full) == "fp32"


# in the JSON: bf16, fp16; engine.precision; the GPU has bf16 (None: no GPU) -> what runs
@pytest.mark.parametrize(
    ("bf16", "fp16", "wanted", "gpu", "runs"),
    [
        ("auto", "auto", "auto", None, "fp32"),
        ("auto", "auto", "bf16", None, "bf16"),
        ("auto", "auto", "fp32", None, "fp32"),
        (True, "auto", "auto", None, "bf16"),
        (True, False, "bf16", None, "bf16"),
        (False, False, "auto", None, "fp32"),
        ("auto", "auto", "auto", True, "bf16"),
        ("auto", "auto", "auto", False, "fp16"),
        ("auto", "auto", "fp16", True, "fp16"),
        ("auto", True, "auto", True, "fp16"),
        (False, "auto", "auto", True, "fp32"),
        ("auto", False, "auto", False, "fp32"),
        ("auto", "auto", "fp32", True, "fp32"),
        (True, True, "auto", True, UserError),
        (True, "auto", "fp32", True, UserError),
        ("auto", True, "bf16", True, UserError),
        (False, "auto", "bf16", True, UserError),
        ("auto", "auto", "fp16", None, UserError),
    ],
)
def test_precision_is_what_json_config_and_device_agree_on(
    monkeypatch, bf16, fp16, wanted, gpu, runs
):
    # Where it can only be emulated, it is too slow to be of use.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu or including_emulation
    )
    zero = {"zero_optimization": {"stage": 1}}
    tree = {"bf16": {"enabled": bf16}, "fp16": {"enabled": fp16}} | zero
    device = CPU if gpu is None else CUDA
    if runs is UserError:
        with pytest.raises(UserError):
            fill(tree, precision=wanted, device=device)
    else:
        assert enabled(fill(tree, precision=wanted, device=device)) == runs


def test_fp16_without_zero_is_refused_as_its_loss_would_not_be_scaled():
    for tree in ({}, {"zero_optimization": {"stage": 0}}):
        with pytest.raises(UserError, match="fp16 needs ZeRO stage 1, 2 or 3"):
            fill(tree, precision="fp16", device=CUDA)


def test_nothing_is_timed_by_waiting_for_the_device_but_at_stage_3():
    for stage in range(4):
        full = fill({"zero_optimization": {"stage": stage}})
        assert ("timers" in full) == (stage < 3)
    given = {"timers": {"throughput": {"enabled": True}}}
    assert fill(given)["timers"] == given["timers"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_one_gpu_has_nobody_to_overlap_with(path):
    full = fill(read_ds_config(str(path)), precision="bf16", device=CUDA, plan=Plan(4, 1, 1))
    assert not full["zero_optimization"].get("overlap_comm")
    offload = full["zero_optimization"].get("offload_optimizer", {})
    assert offload.get("pin_memory") in (None, True)


TOTAL, MICRO, STEPS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


@pytest.mark.parametrize(
    ("tree", "micro", "expected"),
    [
        ({}, "auto", "auto"),
        ({TOTAL: "auto", MICRO: "auto", STEPS: "auto"}, 4, 4),
        ({TOTAL: 48}, "auto", "auto"),
        ({MICRO: 6}, "auto", 6),
        ({MICRO: 6}, 6, 6),
        ({STEPS: 3}, "auto", 8),
        ({STEPS: 3}, 8, 8),
        ({TOTAL: 48, MICRO: 4, STEPS: 6}, "auto", 4),
        ({MICRO: 6}, 4, UserError),
        ({STEPS: 3}, 4, UserError),
        ({STEPS: 5}, "auto", UserError),
        ({MICRO: 4, STEPS: 5}, "auto", UserError),
        ({TOTAL: 47}, "auto", UserError),
        ({MICRO: "6"}, "auto", UserError),
        ({STEPS: 2.0}, "auto", UserError),
    ],
)
def test_the_json_may_fix_the_batch_but_not_contradict_the_config(tree, micro, expected):
    batching = BatchingConfig(global_batch_size=48, micro_batch_size=micro)
    if expected is UserError:
        with pytest.raises(UserError, match="DeepSpeed JSON"):
            json_batch(tree, batching, world_size=2)
    else:
        assert json_batch(tree, batching, world_size=2) == (48, expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"bf16": true}', "bf16=true: an object"),
        ('{"zero_optimization": 2}', "zero_optimization=2: an object"),
        ('{"fp16": {"enabled": 1}}', "fp16.enabled=1: true, false or 'auto'"),
        ('{"bf16": {"enabled": "yes"}}', "bf16.enabled='yes': true, false or 'auto'"),
    ],
)
def test_a_section_of_the_wrong_form_is_named_and_not_passed_over(tmp_path, text, says):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_ds_config(str(path))


def test_a_switch_that_would_spoil_checkpoints_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}')
    with pytest.raises(UserError, match="round_robin_gradients=true"):
        read_ds_config(str(path))


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        ({"stag": 2}, "zero_optimization.stag: no key; did you mean 'stage'"),
        ({"stage": 2, "reduce_bucket_size": "much"}, "zero_optimization.reduce_bucket_size: "),
        (
            {"stage": 1, "offload_optimizer": {"devic": "cpu"}},
            "zero_optimization.offload_optimizer.devic: no key",
        ),
        ({"stage": 2, "overlap_comm": "auto", "offload_optimizer": {"pin_memory": "auto"}}, None),
    ],
)
def test_zeros_own_keys_are_those_that_deepspeed_takes(tmp_path, zero, says):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    if says is None:
        assert read_ds_config(str(path))["zero_optimization"] == zero
        return
    with pytest.raises(UserError) as caught:
        read_ds_config(str(path))
    assert f"--deepspeed {path}: {says}" in str(caught.value)

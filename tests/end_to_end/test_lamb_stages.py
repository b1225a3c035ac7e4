"""LAMB in real runs on two ranks: whole norms out of sharded tensors, at every ZeRO stage.

The runs are of CLIP, 10 steps of 8 samples. Small sub-groups make ZeRO 3 step in many parts.
"""

import json
import shutil

import pytest
from end_to_end.jobs import ROOT
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# eps: where a gradient ought to be zero (of the keys' biases), its rounding noise is no step.
LAMB = (
    *("optim.name=lamb", "optim.weight_decay=0.1", "optim.eps=1e-4"),
    *("optim.lr=0.005", "optim.lr_rule=sqrt", "optim.base_batch_size=2"),  # 0.01 at 8
    *("schedule.length=80 samples", "checkpoint.every=40 samples", "run.on_finish=nothing"),
)


def changed(folder, stage: str, **parts) -> tuple[str, str]:
    """Words that choose the shipped DeepSpeed JSON of a stage with some sections changed."""
    tree = json.loads((ROOT / f"ds_configs/{stage}.json").read_text())
    for name, part in parts.items():
        tree[name] = tree.get(name, {}) | part
    path = folder / "changed.json"
    path.write_text(json.dumps(tree))
    return "--deepspeed", str(path)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """ZeRO 3 with sub-groups of some thousand elements."""
    small = {"sub_group_size": 2000, "stage3_param_persistence_threshold": 500}
    return changed(tmp_path_factory.mktemp("json"), "z3", zero_optimization=small)


@pytest.fixture(scope="module")
def plain(start):
    """Plain data parallel: every tensor whole on both ranks."""
    return start("plain", *LAMB, json="z0", model="clip").finish()


@pytest.fixture(scope="module")
def in_parts(start, parts):
    return start("parts", *LAMB, *parts, model="clip").finish()


def apart(a, b) -> tuple[float, float]:
    """The largest relative difference of two runs' losses, and the largest of their weights."""
    losses, expected = a.losses(), b.losses()
    assert losses.keys() == expected.keys() and len(losses) == 10
    weights, reference = (load_file(job.newest() / "weights.safetensors") for job in (a, b))
    assert weights.keys() == reference.keys()
    return (
        max(
            abs(losses[s][n] - expected[s][n]) / abs(expected[s][n])
            for s in expected
            for n in expected[s]
        ),
        max((weights[n] - reference[n]).abs().max().item() for n in reference),
    )


@pytest.mark.parametrize("json", ["z1", "z2", "z2_offload"])
def test_sharded_tensors_step_as_whole_ones(start, plain, json):
    job = start(json, *LAMB, json=json, model="clip").finish()
    assert max(apart(job, plain)) < 1e-5
    assert plain.losses()[10]["contrastive"] < plain.losses()[1]["contrastive"]


def test_zero_3_steps_in_parts_as_in_one(plain, in_parts):
    assert max(apart(in_parts, plain)) < 1e-5


def test_the_peak_rate_is_that_of_the_rule(plain):
    assert plain.lines()[0]["learning_rate"] == pytest.approx(0.01)


def test_a_resumed_run_repeats_the_rest_bit_for_bit(start, parts, plain, in_parts):
    """The moments and step counts are in DeepSpeed's files, whole or in shards."""
    for name, job, words, stage in (("plain", plain, (), "z0"), ("parts", in_parts, parts, "z2")):
        before = job.losses()
        shutil.rmtree(job.newest())
        assert job.newest().name == "step-00000005"
        again = start(name, *LAMB, *words, json=stage, model="clip").finish()
        assert "step 5, 40 samples seen" in again.output[0]
        assert again.losses() == before


def test_bf16_with_fp32_masters_follows_fp32(start, tmp_path, plain):
    """A master of every tensor (stage 0), and the flat slices of DeepSpeed's BF16_Optimizer."""
    slices = changed(tmp_path, "z1", data_types={"grad_accum_dtype": "fp32"})
    for name, words in (("half", ()), ("half-slices", slices)):
        words = (*LAMB, "engine.precision=bf16", *words)
        job = start(name, *words, json="z0", model="clip").finish()
        for step in (1, 10):
            expected = plain.losses()[step]["contrastive"]
            assert job.losses()[step]["contrastive"] == pytest.approx(expected, rel=0.02), name


def test_what_lamb_cannot_do_and_states_of_another_optimizer_are_refused(start, tmp_path, plain):
    disk = changed(tmp_path, "z3", zero_optimization={"offload_param": {"device": "nvme"}})
    job = start("disk", *LAMB, *disk, model="clip", ranks=1).finish(ok=False)
    assert job.codes == [2]
    assert "offload_param.device='nvme'" in job.output[0].splitlines()[-1]
    words = ("optim.name=adamw", "run.allow_config_change=true")
    job = start("plain", *LAMB, *words, json="z0", model="clip").finish(ok=False)
    assert job.codes == [2, 2]
    assert "was saved with optim.name=lamb" in job.output[0].splitlines()[-1]


def test_lamb_above_a_stated_batch_is_lamb(start, plain):
    """The run of `plain`, whose batch of 8 is above 7."""
    words = [word for word in LAMB if not word.startswith(("optim.name", "optim.lr="))]
    switch = ("optim.lr=0.1", "optim.lamb_above=7", "optim.lamb_lr=0.005")
    job = start("switched", *words, *switch, json="z0", model="clip").finish()
    assert job.losses() == plain.losses()
    assert json.loads((job.dir / "plan.json").read_text())["optimizer"] == "lamb"

"""tools/bench.py and what it counts with: closed forms, then the command as a person calls it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import bench
import pytest
import stopwatch
import torch
import torch.nn.functional as F
from conftest import tiny_words
from counts import count_step
from floors import floor, vision_lengths
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from workload import PROGRESS, NaiveTask, build_task, held

from elip_ds.config import PruningConfig, load_config
from elip_ds.data.made_up import made_up_vocabulary
from elip_ds.errors import UserError
from elip_ds.launching.parts import PARTS, marked_parts, part
from elip_ds.objectives.words import room_for
from elip_ds.towers import ViT, ViTConfig

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MODELS = ("albef", "blip", "meter", "clip")
ONEDNN = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._linear_pointwise


def count(forward, inputs, **options):
    return count_step(forward, lambda out: out.sum(), inputs=inputs, **options)


def count_task(task, batch, backward=True):
    fields = (batch.images, batch.input_ids, batch.attention_mask, batch.sample_key)
    with marked_parts(task.task if isinstance(task, NaiveTask) else task):
        counts = count_step(
            lambda: task(batch, PROGRESS),
            lambda loss: loss.total,
            inputs=[*held(task), *fields],
            backward=backward,
        )
    task.zero_grad(set_to_none=True)
    task.drop_carries()
    return counts


# Operations.


def test_a_plain_vit_counts_as_its_closed_form():
    config = ViTConfig(image_size=32, patch_size=8, width=48, depth=3, heads=4)
    vit, images = ViT(config, PruningConfig()), torch.randn(2, 3, 32, 32)
    counts = count(lambda: vit(images)[0], [*vit.parameters(), images])
    n, d = 17, 48
    block = 2 * (12 * n * d * d + 2 * n * n * d)
    patches = 2 * 16 * (3 * 8 * 8) * d
    assert sum(counts.forward.values()) == 2 * (3 * block + patches)
    # The pixels want no gradient.
    assert sum(counts.backward.values()) == 2 * (2 * 3 * block + patches)


def test_fused_attention_counts_as_the_plain_products_it_stands_for():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    for options in ({}, {"attn_mask": mask}, {"attn_mask": mask, "dropout_p": 0.5}):
        fused = count(
            lambda options=options: F.scaled_dot_product_attention(q, k, v, **options), [q, k, v]
        )
        assert sum(fused.forward.values()) == 2 * 2 * (2 * 3 * 5 * 7 * 8), options
        assert sum(fused.backward.values()) == 2 * 2 * 2 * (2 * 3 * 5 * 7 * 8), options


def test_products_with_vectors_and_fused_additions_are_not_missed():
    a, x, y = torch.randn(4, 6), torch.randn(6), torch.randn(4)

    def forward():
        out = torch.mv(a, x) + torch.addmv(y, a, x)
        out += torch.zeros(4, 3).addmm_(a, torch.ones(6, 3)).sum(dim=1)
        return out + torch.dot(x, x)

    counts = count(forward, [a, x, y], backward=False)
    assert sum(counts.forward.values()) == 2 * (4 * 6 + 4 * 6 + 4 * 6 * 3 + 6)


class Twice(torch.autograd.Function):
    """x @ w, computed again and differentiated in the backward; keeps a copy of x to itself."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.own, ctx.w = x.clone(), w
        return ctx.own @ w

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x, w = ctx.own.detach().requires_grad_(), ctx.w.detach().requires_grad_()
            return torch.autograd.grad(x @ w, (x, w), grad)


def test_the_backward_of_a_part_is_that_parts_whatever_runs_it():
    text, fusion, heads = (nn.Linear(8, 8, bias=False) for _ in range(3))
    x = torch.randn(4, 8)

    def forward():
        with part("text"):
            y = text(x)
        with part("fusion"):
            y = Twice.apply(y, fusion.weight)
        with part("vision"):
            y = checkpoint(lambda z: (z @ fusion.weight).relu(), y, use_reentrant=False)
        return heads(y)

    counts = count(forward, [x, *(m.weight for m in (text, fusion, heads))])
    one = 2 * 4 * 8 * 8
    assert {k: v / one for k, v in counts.forward.items() if v} == {
        "text": 1, "fusion": 1, "vision": 1, "heads": 1
    }  # fmt: skip
    assert {k: v / one for k, v in counts.backward.items() if v} == {
        "text": 1, "fusion": 3, "vision": 3, "heads": 2
    }  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_the_parts_of_a_step_sum_to_what_torch_counts(model):
    task, batch = build_task(load_config(tiny_words(model=model)), plain=False), batch_of(model)
    counts = count_task(task, batch)
    # What it does not know; of tensors it passes on the shapes.
    more = {ONEDNN: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]} if ONEDNN else {}
    with FlopCounterMode(display=False, custom_mapping=more) as theirs:
        task(batch, PROGRESS)
    assert sum(counts.forward.values()) == theirs.get_total_flops()
    expected = {"vision", "look-ahead", "text", "heads"}
    expected |= {"teacher"} if task.teacher is not None else set()
    expected |= {"fusion"} if model != "clip" else set()
    assert {name for name in PARTS if counts.forward[name]} == expected
    assert {name for name in PARTS if counts.backward[name]} == expected - {"look-ahead", "teacher"}


def batch_of(model, size=4):
    config = load_config(tiny_words(model=model))
    return bench.random_batch(config, made_up_vocabulary(config), size).to(CPU, torch.float32)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_needed_is_what_the_plain_step_does_where_it_wastes_nothing(model):
    words = tiny_words(model=model)
    config, batch = load_config(words), batch_of(model)
    guessed = bench.guessed_words(config, made_up_vocabulary(config), batch)
    needed = floor(config, batch=4, words=12, guessed=guessed)
    plain = count_task(build_task(config, plain=True), batch)
    ours = count_task(build_task(config, plain=False), batch)
    # Ours merges by a matrix product of the weights and all patches that a stage sees.
    merged = 2 * (16 + 9) * 32 * len(batch.images) * (2 if model == "meter" else 1)
    for name, extra in (("vision", merged), ("text", 0)):
        assert ours.forward[name] == 4 * needed.forward[name] + extra, name
        assert ours.backward[name] == 4 * needed.backward[name] + extra, name
        if model != "clip":  # of its last blocks one token is read; the plain step makes them all
            assert plain.forward[name] == 4 * needed.forward[name], name
            assert plain.backward[name] == 4 * needed.backward[name], name
    assert ours.forward["look-ahead"] == 4 * needed.forward["look-ahead"]
    assert plain.forward["look-ahead"] > 2 * ours.forward["look-ahead"]
    for name in needed.forward:
        assert plain.forward[name] >= 4 * needed.forward[name], name
        assert plain.backward[name] >= 4 * needed.backward[name], name
        assert ours.forward[name] >= 4 * needed.forward[name], name
        assert ours.backward[name] >= 4 * needed.backward[name], name
    if model == "clip":
        return
    # Every key is projected once, and what nothing reads is not made; but words are guessed at more
    # places than are masked, and of other queries the last layer has attention's products alone.
    room = words_room(config, 4 * 12) / 4
    done = floor(config, batch=4, words=12, guessed=room)
    width = config.model.text.width
    extra = (
        4 * 4 * (12 - room) * (12 + vision_lengths(config)[-1]) * width if model != "blip" else 0
    )
    assert ours.forward["fusion"] == 4 * done.forward["fusion"] + extra
    assert ours.backward["fusion"] == 4 * done.backward["fusion"] + 2 * extra


def words_room(config, count):
    mlm = config.objectives.get("mlm")
    return room_for(mlm.probability, count) if mlm else 11 * 4


# Bytes.


def test_a_plain_mlp_keeps_what_autograd_saves_and_its_closed_form():
    first, second = nn.Linear(8, 32), nn.Linear(32, 8)
    x = torch.randn(5, 8)
    inputs = [x, *first.parameters(), *second.parameters()]
    counts = count(lambda: second(F.gelu(first(x))), inputs)
    loss = 4
    assert sum(counts.kept.values()) == 2 * 5 * 32 * 4 + loss  # before and after the GELU
    assert sum(counts.saved.values()) == 2 * 5 * 32 * 4


def test_bytes_that_a_function_keeps_to_itself_are_kept_but_not_saved():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    counts = count(lambda: Twice.apply(x, w), [x, w])
    assert sum(counts.kept.values()) == 4 * 8 * 4 + 4 and sum(counts.saved.values()) == 0


def test_what_was_there_before_is_not_kept_by_the_step():
    x, cache = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    counts = count(lambda: x * cache.view(4, 8).detach(), [x])
    assert sum(counts.kept.values()) == 4 and sum(counts.saved.values()) == 0


def test_recomputation_keeps_less_and_computes_more():
    layers = nn.Sequential()
    for _ in range(2):
        layers.append(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)))
    x = torch.randn(4, 8)

    def recomputed():
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False)
        return y

    inputs = [x, *layers.parameters()]
    plain, again = count(lambda: layers(x), inputs), count(recomputed, inputs)
    assert sum(again.kept.values()) < sum(plain.kept.values()) / 4
    assert again.forward == plain.forward
    one = 2 * 4 * 8 * 64
    assert sum(again.backward.values()) - sum(plain.backward.values()) in (2 * one, 4 * one)


def test_counting_leaves_the_model_as_it_was():
    task, batch = build_task(load_config(tiny_words()), plain=False), batch_of("albef")
    before = set(vars(task.model))
    count_task(task, batch)
    assert set(vars(task.model)) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.modules())


# Workload and time.


def test_variants_of_one_shape_share_their_parameters_and_others_do_not():
    config = load_config(tiny_words())
    task = build_task(config, plain=False)
    other = build_task(load_config(tiny_words("pruning.stages=[]")), plain=True, like=task)
    assert all(a is b for a, b in zip(task.parameters(), other.parameters(), strict=True))
    wider = build_task(load_config(tiny_words("model.embed_dim=8")), plain=False, like=task)
    assert wider.model.vision_proj.weight.shape[0] == 8


class Allocates:
    """A loop that holds a number of bytes during its forward, and trains nothing."""

    def __init__(self, size):
        self.size = size

    def forward(self, batch):
        return torch.ones(self.size // 4).sum()

    def backward(self, total):
        pass

    def update(self):
        pass


def test_the_peak_of_a_step_is_its_own():
    config = load_config(tiny_words())
    batch = bench.random_batch(config, made_up_vocabulary(config), 2)
    sizes = (10_000_000, 300_000_000, 10_000_000)
    peaks = [
        stopwatch.time_step(Allocates(size), batch, CPU, torch.float32)["peak_bytes"]
        for size in sizes
    ]
    assert peaks[1] - peaks[0] > 250_000_000
    assert peaks[1] - peaks[2] > 250_000_000


def test_times_are_summed_up_pair_by_pair():
    def step(seconds):
        return {
            "seconds": dict.fromkeys(("data", "forward", "backward"), 0.0)
            | {"optimizer": seconds, "total": seconds},
            "peak_bytes": int(1000 * seconds),
        }

    steps = {"ours": [step(s) for s in (1.0, 2.0, 4.0)], "other": [step(s) for s in (2.0, 2.0, 12)]}
    told = stopwatch.summarise(
        steps,
        batch_size=8,
        operations={"ours": (5.0, 4.0), "other": (10.0, 4.0)},
        peak=100.0,
    )
    assert told["ours"]["images_per_second"] == 4.0 and told["ours"]["peak_bytes"] == 4000
    assert told["ours"]["mfu"] == pytest.approx(8 * 5.0 / 2.0 / 100.0)
    assert told["ours"]["needed_mfu"] == pytest.approx(8 * 4.0 / 2.0 / 100.0)
    assert told["other"]["time_against_first"] == {"median": 2.0, "lowest": 1.0, "highest": 3.0}


# The command.


def test_variants_are_split_at_the_commas_between_settings():
    words = bench.split_words("pruning.stages=[{layer: 1, lookahead: 1}],model.text.dropout=0.1")
    assert words == ["pruning.stages=[{layer: 1, lookahead: 1}]", "model.text.dropout=0.1"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["preset=nothing"], "nothing"),
        (["preset=demo", "model.vision.depht=3"], "depht"),
        (["preset=demo", "--batch", "0"], "--batch 0: 1 or more"),
        (["preset=demo", "--batch", "1"], "--batch 1: the objectives need at least 2"),
        (["preset=demo", "--count-batch", "7"], "--count-batch 7: an even number from 4"),
        (["preset=demo", "--pairs", "many"], "--pairs"),
        (["preset=demo", "--dtype", "fp8"], "--dtype"),
        (["preset=demo", "--variants", "half"], "--variants 'half': NAME:key=value,key=value"),
        (["preset=demo", "--variants", "ours:run.seed=1"], "there is a variant 'ours' already"),
        (["preset=demo", "--json", "nowhere/x.json"], "--json nowhere/x.json: there is no folder"),
        (["preset=demo", "--dtype", "autocast", "--deepspeed", "z2.json"], "--dtype autocast"),
        (["preset=demo", "--no-such-option"], "--no-such-option"),
    ],
)
def test_a_wrong_call_is_one_line(argv, message):
    with pytest.raises(UserError) as error:
        bench.main(argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_one_line():
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
        bench.main(["preset=demo", "--device", "cuda"])


def run_bench(*argv):
    return subprocess.run(
        [sys.executable, "tools/bench.py", *argv], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_wrong_call_ends_with_status_2():
    done = run_bench("preset=nothing")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_command_counts_times_and_draws(model, tmp_path, capsys):
    file, picture = tmp_path / "out.json", tmp_path / "out.svg"
    deep = "pruning.stages=[{layer: 0, lookahead: 3, keep_ratio: 0.3}]"
    bench.main(
        [
            *tiny_words("run.seed=1", model=model),
            *("--batch", "4", "--count-batch", "4", "--pairs", "2", "--threads", "1"),
            *("--variants", f"deep:{deep},run.seed=2"),
            *("--json", str(file), "--picture", str(picture)),
        ]
    )
    told = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert set(report) == {
        "command", "date", "device", "dtype", "fp32_matmul_precision", "versions", "count_batch",
        "batch", "pairs", "compiled", "deepspeed", "parts", "variants", "matmul_peak",
    }  # fmt: skip
    assert list(report["variants"]) == ["ours", "ours unpruned", "naive", "deep"]
    for name, entry in report["variants"].items():
        assert set(entry) == {"words", "naive", "parts", "total", "time"}
        assert list(entry["parts"]) == list(PARTS)
        for key, value in entry["total"].items():
            assert value == pytest.approx(sum(p[key] for p in entry["parts"].values()))
        time = entry["time"]
        assert set(time) == {
            "images_per_second", "seconds", "all_seconds", "peak_bytes", "mfu",
            "needed_mfu", "time_against_first",
        }  # fmt: skip
        assert len(time["all_seconds"]) == 2 and time["images_per_second"] > 0
        total = entry["total"]
        needed = total["needed_forward"] + total["needed_backward"]
        share = needed / (total["forward"] + total["backward"])
        assert 0 < time["needed_mfu"] < time["mfu"] < 1
        assert time["needed_mfu"] == pytest.approx(share * time["mfu"])
        phases = sum(time["seconds"][phase] for phase in stopwatch.PHASES)
        assert phases <= 1.5 * max(time["all_seconds"])
        assert f"{name}, an image" in told
    ours, naive = (report["variants"][name]["total"] for name in ("ours", "naive"))
    assert ours["forward"] < naive["forward"] and ours["kept_bytes"] < naive["kept_bytes"]
    assert report["variants"]["deep"]["words"] == [deep, "run.seed=2"]
    svg = picture.read_text()
    assert "<svg" in svg and svg.rstrip().endswith("</svg>")


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_lower_precision_keeps_fewer_bytes_and_computes_the_same(plain):
    variant = bench.Variant("one", load_config(tiny_words()), plain=plain)
    full, *lower = (
        bench.count_variant(variant, bench.parse_arguments(["--dtype", dtype]))["total"]
        for dtype in bench.DTYPES
    )
    for low in lower:
        assert low["kept_bytes"] < 0.9 * full["kept_bytes"]
        assert low["forward"] == pytest.approx(full["forward"], rel=0.01)


@pytest.mark.slow
def test_the_command_times_through_deepspeed(tmp_path):
    file = tmp_path / "out.json"
    done = run_bench(
        *tiny_words(), "--deepspeed", "ds_configs/z2.json", "--batch", "4", "--pairs", "2",
        "--json", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    variants = json.loads(file.read_text())["variants"]
    assert all(entry["time"]["images_per_second"] > 0 for entry in variants.values())

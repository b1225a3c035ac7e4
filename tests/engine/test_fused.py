"""Whose kernels run: what is found under the name apex, and that a choice changes no number."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_batch, tiny_task
from torch import nn

from elip_ds.config.schema import EngineConfig, OptimConfig
from elip_ds.engine import fused
from elip_ds.engine.fused import Place, choose_kernels, find_apex, swap_layer_norms
from elip_ds.engine.lamb import Lamb
from elip_ds.engine.optim import build_optimizer
from elip_ds.errors import UserError
from elip_ds.objectives import Progress

CPU, CUDA = Place(torch.device("cpu")), Place(torch.device("cuda"))
ROOT = Path(__file__).parents[2]

# The first line of PyPI's apex 0.9.10.dev0, a toolkit for Pyramid; it imports only with Pyramid.
PYPI = {"__init__.py": "from pyramid_mailer.interfaces import IMailer", "views.py": "", "lib/x": ""}


def nvidia(**texts: str) -> dict[str, str]:
    """Files of a package that is laid out as NVIDIA's."""
    names = {"apex": "", "normalization": "normalization/", "optimizers": "optimizers/"}
    return {f"{folder}__init__.py": texts.get(name, "") for name, folder in names.items()}


@pytest.fixture
def put_apex(tmp_path, monkeypatch):
    """put_apex(files) -> the folder that `import apex` now finds first."""

    def put(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "apex" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path / "apex"

    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_apex(name)}
    yield put
    for name in [name for name in sys.modules if _is_apex(name)]:
        del sys.modules[name]
    sys.modules.update(kept)


def _is_apex(name: str) -> bool:
    return name.partition(".")[0] == "apex"


def test_pypis_apex_is_called_unrelated_and_not_imported(put_apex):
    folder = put_apex(PYPI)
    apex = find_apex()
    assert apex.module is None and apex.unrelated
    assert str(folder) in apex.reason and "PyPI is an unrelated project" in apex.reason
    assert fused.NVIDIA_APEX in apex.reason
    assert "apex" not in sys.modules


def test_a_single_file_called_apex_is_unrelated_too(tmp_path, put_apex, monkeypatch):
    (tmp_path / "apex.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_apex().unrelated


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import amp_C_of_another_version", "ModuleNotFoundError: No module named"),
        ("raise RuntimeError('built for\\nanother CUDA')", "RuntimeError: built for"),
        ("raise OSError", "cannot be imported: OSError"),
        ("print 2", "SyntaxError"),
    ],
)
@pytest.mark.parametrize("where", ["apex", "normalization", "optimizers"])
def test_an_apex_that_cannot_be_imported_is_a_reason(put_apex, where, text, says):
    put_apex(nvidia(**{where: text}))
    apex = find_apex()
    assert apex.module is None and not apex.unrelated
    assert says in apex.reason and "\n" not in apex.reason


def test_an_apex_of_nvidias_layout_is_found(put_apex):
    folder = put_apex(nvidia())
    module = find_apex().module
    assert module is not None and Path(module.__file__).parent == folder


def test_without_any_apex_it_says_where_to_get_it(put_apex, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "apex").exists()])
    apex = find_apex()
    assert apex.module is None and not apex.unrelated
    assert "not installed" in apex.reason and fused.NVIDIA_APEX in apex.reason


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("files", [PYPI, nvidia(), nvidia(apex="raise KeyError(1)")])
@pytest.mark.parametrize("wish", ["auto", "torch", "apex", "deepspeed"])
def test_on_a_cpu_torchs_goes_on_and_a_wish_is_answered_once(
    put_apex, caplog, wish, files, optimizer
):
    put_apex(files)
    with caplog.at_level(logging.INFO, logger=fused.__name__):
        kernels = choose_kernels(wish, CPU, optimizer=optimizer)
    assert (kernels.layer_norm, kernels.optimizer) == ("torch", "torch")
    assert kernels.reasons.keys() == ({"layer_norm", optimizer} if wish != "torch" else set())
    assert all(kernels.reasons.values())
    levels = [record.levelno for record in caplog.records]
    warned = wish in ("apex", "deepspeed") or (wish == "auto" and files is PYPI)
    assert levels == [logging.INFO, *[logging.WARNING] * warned]


@pytest.mark.parametrize(
    ("place", "optimizer", "says"),
    [
        (Place(CUDA.device, stage=1), "lamb", "ZeRO 0"),
        (Place(CUDA.device, stage=0, precision="bf16"), "lamb", "engine.precision=fp32"),
        (Place(CUDA.device, weight_decay=0.0), "lamb", "optim.weight_decay"),
        (Place(CUDA.device, stage=3), "adamw", "ZeRO 3"),
        (Place(CUDA.device, stage=2, offload=True), "adamw", "on the host"),
    ],
)
def test_apex_is_left_where_it_would_be_wrong(put_apex, place, optimizer, says):
    """Whatever hardware is here: these are refused before a kernel is tried."""
    put_apex(nvidia())
    assert says in choose_kernels("apex", place, optimizer=optimizer).reasons[optimizer]


def test_deepspeeds_lamb_is_not_taken_for_lamb():
    kernels = choose_kernels("deepspeed", CUDA, optimizer="lamb")
    assert kernels.optimizer == "torch" and "bias correction" in kernels.reasons["lamb"]


def test_what_does_not_run_is_a_reason_and_not_an_error(put_apex):
    put_apex(nvidia())  # it has no FusedLayerNorm, so that importing that fails
    kernels = choose_kernels("apex", CUDA, optimizer="adamw")
    assert (kernels.layer_norm, kernels.optimizer) == ("torch", "torch")
    assert "does not run" in kernels.reasons["layer_norm"]
    assert "does not run" in kernels.reasons["adamw"]


def test_an_unknown_wish_is_named():
    with pytest.raises(UserError, match=r"engine\.fused='nvidia': choose auto, torch, apex or"):
        EngineConfig(fused="nvidia")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["raise RuntimeError('no driver')", "print 2"])
def test_deepspeed_comes_in_beside_any_apex(put_apex, text):
    """DeepSpeed itself imports what is called apex, and would go down with it."""
    folder = put_apex(nvidia(apex=text))
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder.parent}", "DS_ACCELERATOR": "cpu"}

    def runs(line: str) -> bool:
        return not subprocess.run(
            [sys.executable, "-c", line], env=env, capture_output=True
        ).returncode

    assert not runs("import deepspeed")
    assert runs("import elip_ds.engine, sys; assert 'apex' not in sys.modules")


class Standing(nn.Module):
    """Called and named like apex's FusedLayerNorm, which needs a GPU."""

    def __init__(self, normalized_shape, eps: float = 1e-5) -> None:
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps
        self.weight = nn.Parameter(torch.empty(*normalized_shape))
        self.bias = nn.Parameter(torch.empty(*normalized_shape))

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def test_swapped_layer_norms_keep_names_values_and_outputs():
    task, batch = tiny_task(), random_batch(4)
    norms = sum(type(part) is nn.LayerNorm for part in task.modules())
    parameters = dict(task.named_parameters())
    expected = task(batch, Progress(0, 0, 64)).total
    assert swap_layer_norms(task, Standing) == norms > 10
    assert not any(type(part) is nn.LayerNorm for part in task.modules())
    after = dict(task.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    task.drop_carries()
    assert torch.equal(task(batch, Progress(0, 0, 64)).total, expected)


def test_a_layer_norm_that_apex_has_not_stays():
    class Mine(nn.LayerNorm):
        pass

    module = nn.Sequential(nn.LayerNorm(4, bias=False), Mine(4), nn.Identity())
    assert swap_layer_norms(module, Standing) == 0


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_apex = pytest.mark.skipif(
    importlib.util.find_spec("apex") is None or find_apex().module is None,
    reason="needs NVIDIA's apex",
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.gpu
@needs_gpu
@needs_apex
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_apexs_layer_norm_is_torchs(dtype):
    from apex.normalization import FusedLayerNorm

    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(64, eps=1e-6)).to("cuda", dtype)
    nn.init.normal_(module[0].weight)
    x = torch.randn(8, 64, device="cuda", dtype=dtype, requires_grad=True)
    seen = []
    for _ in range(2):
        out = module(x)
        seen.append(
            (out, *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()]))
        )
        swap_layer_norms(module, FusedLayerNorm)
    tolerance = TOLERANCE[dtype]
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance * one.abs().max().item()
        )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        pytest.param("apex", "adamw", marks=needs_apex),
        pytest.param("apex", "lamb", marks=needs_apex),
        ("deepspeed", "adamw"),
    ],
)
def test_every_optimizer_steps_as_torchs(kernel, name):
    chosen = choose_kernels(kernel, CUDA, optimizer=name)
    if chosen.optimizer != kernel:
        pytest.skip(chosen.reasons[name])
    ends = []
    for kind in ("torch", kernel):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).cuda()
        config = OptimConfig(name=name, lr=1e-2, weight_decay=0.1, eps=1e-6)
        optimizer = build_optimizer(module, config, kernel=kind)
        if isinstance(optimizer, Lamb):
            optimizer.bind_whole()
        for _ in range(5):
            module(torch.randn(8, 16, device="cuda")).square().mean().backward()
            optimizer.step()
            module.zero_grad()
        ends.append(list(module.parameters()))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

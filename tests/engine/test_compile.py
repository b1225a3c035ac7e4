"""Compiled blocks: the numbers of plain ones, no graph in pieces, nothing compiled twice."""

import pytest
import torch
import torch._dynamo
from conftest import random_batch, tiny_task

from elip_ds import registry
from elip_ds.engine.compile import check_compile, compile_blocks
from elip_ds.errors import UserError
from elip_ds.objectives import Progress
from elip_ds.towers.layers import PreNormBlock

# The compiler looks at .grad of tensors inside the graph, and torch warns about it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

PROGRESS = Progress(step=1, samples_seen=100, samples_per_epoch=1000)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def step(task, seed):
    task.zero_grad()
    result = task(random_batch(4, seed=seed), PROGRESS)
    result.total.backward()
    grads = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    return result.values, grads


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "recompute"), [*((model, "none") for model in registry.MODELS), ("albef", "full")]
)
def test_compiled_blocks_give_the_same_numbers_and_are_compiled_once(model, recompute):
    words = [f"model.vision.recompute={recompute}", f"model.text.recompute={recompute}"]
    plain, compiled = tiny_task(*words, model=model), tiny_task(*words, model=model)
    # Graphs and their derivatives are what is tested here; machine code for them comes below.
    assert compile_blocks(compiled, backend="aot_eager") > 0
    after_first = None
    for seed in range(3):
        values, grads = step(compiled, seed)
        expected_values, expected_grads = step(plain, seed)
        for name, value in values.items():
            torch.testing.assert_close(value, expected_values[name], atol=1e-5, rtol=1e-5)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[name], atol=1e-5, rtol=1e-4)
        after_first = after_first or graphs()
    assert after_first and graphs() == after_first
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_machine_code_of_a_block_gives_its_numbers():
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(PreNormBlock(32, 2, 64, eps=1e-6) for _ in range(2))
    x = torch.randn(2, 9, 32, requires_grad=True)
    expected = blocks[1](blocks[0](x))
    compile_blocks(blocks)
    torch.testing.assert_close(blocks[1](blocks[0](x)), expected, atol=1e-5, rtol=1e-5)
    assert graphs() == 1  # one graph for both


def test_names_of_weights_do_not_change():
    task = tiny_task()
    names = list(task.state_dict())
    compile_blocks(task)
    assert list(task.state_dict()) == names


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stages_that_keep_whole_weights_may_be_compiled(stage):
    check_compile(True, stage)


def test_stage_3_is_refused_only_where_compiling_is_asked_for():
    check_compile(False, 3)
    with pytest.raises(UserError, match=r"engine\.compile=true does not work with ZeRO stage 3"):
        check_compile(True, 3)

"""Checkpoint folders, DeepSpeed's file layer and the whole weights, without an engine."""

import os

import pytest
import torch
from conftest import tiny_task
from safetensors.torch import load_file, save_file

from elip_ds.engine import load_weights, read_weights
from elip_ds.engine.checkpoint import (
    META,
    CarefulFiles,
    checkpoint_name,
    clear_leftovers,
    publish,
)
from elip_ds.engine.weights import saved_name
from elip_ds.errors import UserError
from elip_ds.run import WEIGHTS, find_checkpoint, list_checkpoints


def write_partial(folder, step: int, text: str = "{}"):
    partial = folder / f".{checkpoint_name(step)}.partial"
    partial.mkdir(parents=True)
    (partial / META).write_text(text)
    (partial / WEIGHTS).write_bytes(b"weights")
    return partial


def publish_step(folder, step: int, *, keep: int = 2, text: str = "{}"):
    final = folder / checkpoint_name(step)
    publish(write_partial(folder, step, text), final, keep)
    return final


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_published_folder_has_its_name_and_its_files(tmp_path):
    final = publish_step(tmp_path, 7)
    assert final == tmp_path / "step-00000007"
    assert names(final) == [META, WEIGHTS]
    assert names(tmp_path) == ["latest", "step-00000007"]


def test_the_newest_stay_in_order_and_latest_names_the_last(tmp_path):
    for step in (8, 16, 100, 120):
        publish_step(tmp_path, step, keep=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step-00000016", "step-00000100", "step-00000120",
    ]  # fmt: skip
    assert (tmp_path / "latest").read_text() == "step-00000120"
    assert names(tmp_path) == ["latest", *(p.name for p in list_checkpoints(tmp_path))]


def test_keeping_one_leaves_one(tmp_path):
    for step in (1, 2):
        publish_step(tmp_path, step, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002"]


def test_the_same_step_again_takes_the_place_of_the_first(tmp_path):
    publish_step(tmp_path, 8, text="first")
    final = publish_step(tmp_path, 8, text="second")
    assert (final / META).read_text() == "second"
    assert names(tmp_path) == ["latest", "step-00000008"]


def test_a_kill_while_the_same_step_is_replaced_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """Files go one by one; what has lost some must have lost its name before."""
    final = publish_step(tmp_path, 8)
    partial = write_partial(tmp_path, 8)

    def cut(path, *args, **kwargs):
        (path / WEIGHTS).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("elip_ds.engine.checkpoint.shutil.rmtree", cut)
    with pytest.raises(KeyboardInterrupt):
        publish(partial, final, keep=2)
    assert all((path / WEIGHTS).exists() for path in list_checkpoints(tmp_path))


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
    publish_step(tmp_path, 8)
    write_partial(tmp_path, 16)
    (tmp_path / ".old-step-00000004").mkdir()
    (tmp_path / ".old-step-00000004" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (tmp_path / ".latest.partial").write_text("step")
    (tmp_path / "notes.txt").write_text("mine")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "notes.txt", "step-00000008"]


def test_a_folder_without_its_meta_file_is_no_checkpoint(tmp_path):
    publish_step(tmp_path, 8)
    (tmp_path / "step-00000016").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000008"]


def test_a_run_or_a_checkpoint_of_it_may_be_named(tmp_path):
    for step in (8, 16):
        publish_step(tmp_path / "ckpt", step)
    old, new = list_checkpoints(tmp_path / "ckpt")
    assert find_checkpoint(tmp_path) == new
    assert find_checkpoint(old) == old


@pytest.mark.parametrize("name", ["", "nowhere", "file"])
def test_what_holds_no_checkpoint_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        find_checkpoint(tmp_path / name)


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    file, sign = tmp_path / "states.pt", tmp_path / "run"
    torch.save({"optimizer": Payload(str(sign))}, file)
    with pytest.raises(Exception, match="Weights only load failed"):
        CarefulFiles().load(str(file))
    assert not sign.exists()


def test_tensors_and_deepspeeds_own_classes_come_back(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    state = {
        "moment": torch.arange(6.0).view(2, 3),
        "stage": ZeroStageEnum.gradients,
        "scaler": LossScaler(4.0),
        "nested": [{"step": 3}],
    }
    files = CarefulFiles()
    files.save(state, str(tmp_path / "states.pt"))
    loaded = files.load(str(tmp_path / "states.pt"), map_location="cpu")
    assert files.failure is None
    assert torch.equal(loaded["moment"], state["moment"])
    assert loaded["stage"] is ZeroStageEnum.gradients
    assert loaded["scaler"].cur_scale == 4.0
    assert loaded["nested"] == [{"step": 3}]


def test_a_failed_write_is_remembered_and_does_not_raise(tmp_path):
    files = CarefulFiles()
    files.save({}, str(tmp_path / "good.pt"))
    assert files.failure is None
    first = tmp_path / "missing" / "a.pt"
    files.save({}, str(first))
    files.save({}, str(tmp_path / "missing" / "b.pt"))
    assert files.failure is not None and files.failure.startswith(str(first))


def test_a_full_disk_is_remembered(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    files = CarefulFiles()
    files.save({"x": torch.zeros(100_000)}, "/dev/full")
    assert files.failure is not None and files.failure.startswith("/dev/full")


def test_a_mistake_of_ours_is_not_taken_for_a_failed_write(tmp_path):
    with pytest.raises(KeyError), CarefulFiles().attempt(tmp_path):
        raise KeyError("name")


@pytest.fixture
def checkpoint(tmp_path):
    """The weights of a tiny task, each shifted by one."""
    save_file(
        {saved_name(n): (p.detach() + 1).contiguous() for n, p in tiny_task().named_parameters()},
        tmp_path / WEIGHTS,
    )
    return tmp_path


def change(checkpoint, change_weights) -> None:
    weights = load_file(checkpoint / WEIGHTS)
    change_weights(weights)
    save_file(weights, checkpoint / WEIGHTS)


def test_weights_come_back_into_a_task_student_and_teacher(checkpoint):
    task, before = tiny_task(), tiny_task().state_dict()
    load_weights(checkpoint, task)
    for name, parameter in task.named_parameters():
        assert torch.equal(parameter.detach(), before[name] + 1), name
    assert any(name.startswith("teacher.") for name in load_file(checkpoint / WEIGHTS))


def test_a_missing_weight_is_named(checkpoint):
    change(checkpoint, lambda weights: weights.pop("model.text_proj.bias"))
    with pytest.raises(UserError, match=r"missing \['model.text_proj.bias'\].*1 missing, 0 left"):
        read_weights(checkpoint, tiny_task())


def test_a_left_over_weight_is_named(checkpoint):
    change(checkpoint, lambda weights: weights.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"left over \['model.extra'\].*0 missing, 1 left over"):
        read_weights(checkpoint, tiny_task())


def test_of_weights_of_other_shape_the_first_by_name_is_told(checkpoint):
    task = tiny_task("model.embed_dim=8")
    with pytest.raises(UserError, match=r"model\.text_proj\.bias is \(16,\), here \(8,\)"):
        load_weights(checkpoint, task)


def test_a_refused_checkpoint_leaves_the_task_as_it_was(checkpoint):
    change(checkpoint, lambda weights: weights.pop("objectives.itm.head.bias"))
    task, before = tiny_task(), tiny_task().state_dict()
    with pytest.raises(UserError):
        load_weights(checkpoint, task)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_truncated_file_is_one_line(checkpoint, size):
    file = checkpoint / WEIGHTS
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_weights(checkpoint, tiny_task())
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_an_absent_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path, tiny_task())

"""A training step never makes the host wait for the device: no number is read back, none sent."""

import dataclasses

import pytest
import torch
from conftest import random_batch, tiny_task
from torch.utils._python_dispatch import TorchDispatchMode

from elip_ds.data import Batch
from elip_ds.data.batch import normalise
from elip_ds.objectives import Progress

READS = (
    "_local_scalar_dense",  # item(), int(), float(), bool()
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
    "bincount",
    "repeat_interleave",
)
"Operations whose result, or its size, the host has to know."
SENDS = ("lift_fresh",)
"A tensor made of the host's numbers: on a GPU it is copied there, and the host waits for it."

CASES = {
    "albef": ("albef", ["model.text.dropout=0.1"]),
    "albef, student's choice": ("albef", ["teacher.prune=student", "data.pad=longest"]),
    "albef, own choice, scheduled": (
        "albef",
        [
            "teacher.prune=own",
            "pruning.schedule=[{after: 8 samples, keep_ratios: [0.9, 0.5]}]",
            "model.vision.recompute=cheap",
        ],
    ),
    "blip": ("blip", ["model.text.recompute=full"]),
    "meter": ("meter", []),
    "clip": ("clip", ["model.guide=released"]),
}
cases = pytest.mark.parametrize(("model", "words"), CASES.values(), ids=CASES)


class Waiting(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises Waiting at an operation for which a GPU's host would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS + SENDS:
            raise Waiting(func)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise Waiting(f"{func} by a mask")
        return func(*args, **(kwargs or {}))


def step(task, batch, progress):
    task(batch, progress).total.backward()
    task.after_step(progress, lambda parameter: parameter.data)


@cases
def test_a_step_of_every_model_asks_the_device_nothing(model, words):
    task = tiny_task(*words, model=model)
    batch = random_batch(8)
    with NoWaiting():
        step(task, batch, Progress(3, 24, 64))


@cases
def test_a_step_needs_no_value_at_all(model, words):
    """On the meta device there are shapes only: nothing could be read back, or mixed with a CPU's
    tensor.
    """
    task = tiny_task(*words, model=model).to("meta")
    batch = random_batch(8)._each(lambda x: x.to("meta"))
    step(task, batch, Progress(3, 24, 64))
    assert {p.grad.device.type for p in task.parameters() if p.grad is not None} == {"meta"}


def test_accumulated_micro_batches_that_are_contrasted_as_one_ask_nothing_either():
    task = tiny_task(model="clip")
    batches = [random_batch(4, seed) for seed in (0, 1)]
    progress = Progress(3, 24, 64)
    with NoWaiting():
        for i, batch in enumerate(batches):
            with torch.no_grad():
                task(batch, progress.at(i, 2), first_pass=True)
        task.cache.settle(progress)
        for i, batch in enumerate(batches):
            task(batch, progress.at(i, 2)).total.backward()
        task.after_step(progress, lambda parameter: parameter.data)


def test_normalising_sends_no_constants():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    with NoWaiting():
        normalise(images)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: bool(x.any()),
        lambda x: x.unique(),
        lambda x: x.__setitem__(x > 0, torch.ones(())),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor([1.0, 2.0]),
    ],
)
def test_what_would_wait_is_noticed(wait):
    x = torch.arange(-2.0, 3.0)
    with NoWaiting(), pytest.raises(Waiting):
        wait(x)


def test_a_list_of_values_is_noticed_on_the_meta_device():
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        torch.arange(3.0, device="meta").tolist()


@pytest.mark.gpu
@cases
def test_cuda_itself_sees_no_waiting_in_a_step(model, words):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    task = tiny_task(*words, model=model).to(device)
    host = dataclasses.replace(
        random_batch(8), images=torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    ).pin_memory()
    batch = host.to(device, torch.float32)
    step(task, batch, Progress(0, 0, 64))  # kernels and workspaces are made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(task, host.to(device, torch.float32), Progress(1, 8, 64))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_batch_names_all_its_tensors():
    """What is moved, pinned and kept alive on a stream is every tensor that there is."""
    tensors = random_batch(2)._tensors()
    hints = {field.name for field in dataclasses.fields(Batch) if "Tensor" in str(field.type)}
    assert set(tensors) == hints == {"images", "input_ids", "attention_mask", "sample_key"}

"""What counts as memory that ran out. A rank that really runs out: launching/test_real_steps.py."""

import errno

import pytest
import torch

from elip_ds.engine.out_of_memory import asked_bytes, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_known_by_any_of_its_names(error):
    assert is_out_of_memory(error)
    wrapped = ValueError("while loading")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4242"),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error)


def test_the_allocator_of_this_torch_is_known_and_what_was_asked_is_read():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert asked_bytes(caught.value) == 2**50


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0", 5 * 2**29),
        ("CUDA out of memory. Tried to allocate 512 bytes.", 512),
        ("could not create a primitive", None),
    ],
)
def test_what_was_asked_is_in_bytes(message, expected):
    assert asked_bytes(RuntimeError(message)) == expected

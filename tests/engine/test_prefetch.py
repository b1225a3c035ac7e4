"""The next batch moves while the present one computes; which batches come does not change."""

import itertools

import pytest
import torch
from conftest import random_batch

from elip_ds.data import Batch
from elip_ds.engine.prefetch import Prefetcher

CPU = torch.device("cpu")


def host_batch(seed: int, size: int = 4, side: int = 8) -> Batch:
    """As the loader's collate makes it."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (size, 12), generator=draw)
    return Batch(
        images=torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=draw),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        sample_key=torch.randint(-(2**62), 2**62, (size,), generator=draw),
        keys=tuple(str(seed) for _ in range(size)),
    )


def same(a: Batch, b: Batch) -> bool:
    pairs = zip(a._tensors().values(), b._tensors().values(), strict=True)
    return a.keys == b.keys and all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_passes_batches_through_and_takes_none_ahead(dtype):
    taken = []

    def source():
        for seed in range(3):
            taken.append(seed)
            yield host_batch(seed)

    ahead = Prefetcher(source(), CPU, dtype, None)
    assert taken == []
    for seed, batch in enumerate(ahead):
        assert taken == list(range(seed + 1))
        ahead.start_next()
        assert taken == list(range(seed + 1))
        assert same(batch, host_batch(seed).to(CPU, dtype))
    assert len(taken) == 3


def test_the_end_of_the_batches_is_the_end_and_a_fault_comes_through():
    def broken():
        yield host_batch(0)
        raise RuntimeError("unreadable")

    ahead = Prefetcher(iter([host_batch(0)]), CPU, torch.float32, None)
    next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)
    ahead = Prefetcher(broken(), CPU, torch.float32, None)
    next(ahead)
    with pytest.raises(RuntimeError, match="unreadable"):
        next(ahead)


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
def test_on_a_gpu_batches_arrive_whole_while_the_device_is_busy(cuda):
    """Memory that the other stream handed on is not reused before the present one has read it."""
    count, size, side = 24, 32, 224
    ahead = Prefetcher(
        (host_batch(seed, size, side).pin_memory() for seed in range(count)),
        cuda,
        torch.bfloat16,
        torch.cuda.Stream(cuda),
    )
    work = torch.randn(4096, 4096, device=cuda)
    sums = []
    for batch in ahead:
        for _ in range(4):
            work = (work @ work).clamp(-1, 1)  # the sums below are queued behind it
        sums.append(batch.images.float().sum(dim=(1, 2, 3)))
        del batch
        ahead.start_next()
    assert len(sums) == count
    for seed, found in enumerate(sums):
        expected = host_batch(seed, size, side).to(cuda, torch.bfloat16).images.float()
        assert torch.equal(found, expected.sum(dim=(1, 2, 3)))


@pytest.mark.gpu
def test_on_a_gpu_one_batch_is_taken_ahead_when_told_to(cuda):
    taken = []

    def source():
        for seed in itertools.count():
            taken.append(seed)
            yield random_host(seed)

    def random_host(seed):
        return host_batch(seed).pin_memory()

    ahead = Prefetcher(source(), cuda, torch.float32, torch.cuda.Stream(cuda))
    first = next(ahead)
    assert taken == [0] and first.images.device.type == "cuda"
    ahead.start_next()
    ahead.start_next()
    assert taken == [0, 1]
    assert same(next(ahead), host_batch(1).to(CPU, torch.float32))
    assert taken == [0, 1]


@pytest.mark.gpu
def test_every_tensor_of_a_batch_is_pinned(cuda):
    pinned = random_batch(2).pin_memory()
    assert all(tensor.is_pinned() for tensor in pinned._tensors().values())

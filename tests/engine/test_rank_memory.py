"""What a process takes, as the kernel or the device tells it, and the limit on it."""

import mmap
import resource

import numpy as np
import pytest
import torch

from elip_ds.engine.rank_memory import AROUND, PAGE, CudaMemory, HostMemory

MIB = 2**20


def test_the_peak_of_host_memory_is_that_since_the_reset():
    memory = HostMemory()
    memory.reset()
    before = memory.peak()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    with_it = memory.peak()
    del held
    memory.reset()
    assert with_it - before == pytest.approx(64 * MIB, rel=0.05)
    assert with_it - memory.peak() == pytest.approx(64 * MIB, rel=0.05)


def test_a_limit_on_host_memory_leaves_what_was_mapped_and_not_resident(monkeypatch):
    # The numbers only: under the real limit this process would stay for all tests after this one.
    calls = []
    monkeypatch.setattr(resource, "setrlimit", lambda number, limits: calls.append(limits[0]))
    sizes = {"VmPeak": 3500, "VmSize": 3300, "VmData": 1100, "VmRSS": 950}
    monkeypatch.setattr(HostMemory, "_read", lambda self, name: sizes[name] * MIB)
    HostMemory().limit(1000 * MIB)
    assert calls == [(1000 + 20 + 200 + 150) * MIB]
    with pytest.raises(MemoryError, match="in use at rest"):
        HostMemory().limit(950 * MIB)


def test_what_a_neighbour_kept_the_kernel_from_mapping_is_mapped(tmp_path):
    """Of a library's pages those around the ones in use, and no others."""
    path = tmp_path / "library"
    path.write_bytes(bytes(8 * AROUND * PAGE))
    with path.open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    where = int(np.frombuffer(library, np.uint8).ctypes.data) // PAGE
    library.madvise(mmap.MADV_DONTNEED)
    used = where + 3 * AROUND
    library[(used - where) * PAGE]  # the kernel maps its neighbours, too
    library.madvise(mmap.MADV_DONTNEED, (used - where + 1) * PAGE, PAGE)
    before = resident(where, 8 * AROUND)
    HostMemory().settle()
    after = resident(where, 8 * AROUND)
    windows = (where + np.arange(8 * AROUND)) // AROUND
    assert before[used - where] and not before[used - where + 1]
    # One window, or all of the file where its folio and its mapping begin at the same boundary.
    assert (after == np.isin(windows, windows[before])).all()


def resident(first: int, count: int) -> np.ndarray:
    """Of so many pages from this one on."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(8 * first)
        return np.frombuffer(pagemap.read(8 * count), np.uint64) >> np.uint64(63) == 1


@pytest.mark.gpu
def test_the_peak_and_the_limit_of_a_device_are_the_allocators():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    memory = CudaMemory(torch.device("cuda", 0))
    memory.reset()
    before = memory.peak()
    held = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    assert memory.peak() - before == 64 * MIB
    del held
    memory.reset()
    assert memory.peak() == before
    assert memory.more()["reserved_bytes"] >= before + 64 * MIB
    memory.limit(before + 256 * MIB)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

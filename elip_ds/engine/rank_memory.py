"""The memory that this process takes, and a limit on it: of the host, or of a CUDA device.

Both classes tell the peak in bytes since a reset, and what is in use; settle() is called once after
the first steps, limit() after it.
"""

import ctypes
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

UNTOUCHED = 0.02
"""Of a CPU's limit: pages at the ends of tensors that are mapped and never resident; 6 to 11 MiB of
1100 were seen. Who stays in this margin is refused by the peak, not by an error."""
PAGE, AROUND = resource.getpagesize(), 16
"Bytes, and how many pages Linux maps at once where they are in its cache."
MADV_POPULATE_READ = 22
LIBC = ctypes.CDLL(None)
LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class HostMemory:
    """Of this process, on a CPU."""

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Most bytes in use since the reset."""
        return self._read("VmHWM")

    def in_use(self) -> int:
        return self._read("VmRSS")

    def settle(self) -> None:
        """Map the pages of libraries around those in use, as the kernel does at a page's first use,
        but for pages that another process is just mapping, too. By that two ranks that start
        together have 13 MiB more or less from start to start, which no size of a batch explains.
        Where the system does not tell or do it, that difference stays.
        """
        with suppress(OSError), Path("/proc/self/pagemap").open("rb") as pagemap:
            for line in Path("/proc/self/maps").read_text().splitlines():
                ends, kind, _, _, inode = line.split()[:5]
                first, last = (int(end, 16) // PAGE for end in ends.split("-"))
                if inode == "0" or "w" in kind or "r" not in kind:
                    continue
                pagemap.seek(8 * first)
                entries = np.frombuffer(pagemap.read(8 * (last - first)), np.uint64)
                used = (first + np.flatnonzero(entries >> np.uint64(63))) // AROUND
                for window in np.unique(used).tolist():
                    start = max(first, window * AROUND)
                    size = min(last, (window + 1) * AROUND) - start
                    LIBC.madvise(start * PAGE, size * PAGE, MADV_POPULATE_READ)

    def limit(self, limit_bytes: int) -> None:
        """Make allocations fail before much more than so many bytes are in use.

        Resident memory has no limit that raises an error, so the limit is on data (RLIMIT_DATA),
        as much higher as there was data in the warm-up that was mapped and not resident: what is
        now, and what came and went, such as DeepSpeed's buckets of gradients, which are filled in
        part. It is never stricter than the resident peaks, which the caller compares with the same
        number, and laxer by what the smallest step takes and gives back, and by UNTOUCHED.
        """
        names = ("VmPeak", "VmSize", "VmData", "VmRSS")
        size_peak, size, data, resident = (self._read(name) for name in names)
        if resident >= limit_bytes:
            raise MemoryError(f"{resident} bytes in use at rest, {limit_bytes} allowed")
        allowed = int((1 + UNTOUCHED) * limit_bytes) + (size_peak - size) + (data - resident)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard != resource.RLIM_INFINITY:
            allowed = min(allowed, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))

    def unlimit(self) -> None:
        """So that a rank that ran out can still write down where."""
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))

    def more(self) -> dict[str, int]:
        return {}

    def device(self) -> dict[str, Any]:
        return {"name": "cpu"}

    def _read(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


class CudaMemory:
    """Of this process, on its device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._reserved, self._outside = device, 0, 0
        self._free_at_start, self._total = torch.cuda.mem_get_info(device)

    def reset(self) -> None:
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Most bytes in use since the reset."""
        return torch.cuda.max_memory_allocated(self._device) + self._outside

    def in_use(self) -> int:
        return torch.cuda.memory_allocated(self._device) + self._outside

    def settle(self) -> None:
        """From now on what the device holds outside of the allocator counts: context,
        communicators, workspaces, and what the driver keeps.
        """
        free, total = torch.cuda.mem_get_info(self._device)
        self._outside = max(0, total - free - torch.cuda.memory_reserved(self._device))

    def limit(self, limit_bytes: int) -> None:
        """Make an allocation fail that would bring what is reserved, and what is outside of the
        allocator, above so many bytes.

        What the warm-up left in the allocator's cache is given back first.
        """
        torch.cuda.empty_cache()
        if limit_bytes <= self._outside:
            raise MemoryError(f"{self._outside} bytes outside of torch, {limit_bytes} allowed")
        share = min(1.0, (limit_bytes - self._outside) / self._total)
        torch.cuda.set_per_process_memory_fraction(share, self._device)

    def unlimit(self) -> None:
        """Writing down where a rank ran out takes no memory of the device."""

    def more(self) -> dict[str, int]:
        """reserved: from the device, most so far.  retries: allocations that needed a clean-up.
        device_used: by all processes now.
        """
        self.reset()
        free, total = torch.cuda.mem_get_info(self._device)
        return {
            "reserved_bytes": self._reserved,
            "retries": torch.cuda.memory_stats(self._device)["num_alloc_retries"],
            "device_used_bytes": total - free,
        }

    def device(self) -> dict[str, Any]:
        return {
            "name": torch.cuda.get_device_name(self._device),
            "total_bytes": self._total,
            "free_at_start_bytes": self._free_at_start,
        }

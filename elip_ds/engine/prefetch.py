"""Batches on the device, the next one on its way while the present one computes.

The copy and the normalising run on a CUDA stream of their own. On a CPU nothing runs ahead.
"""

from collections.abc import Iterator

import torch

from elip_ds.data import Batch


class Prefetcher:
    """batches: from the host, pinned where a copy is to be asynchronous.  side: the stream to copy
    on, one for all that follow each other, as the allocator keeps memory for each stream apart;
    None on a CPU.

    One batch more than is used lies on the device.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        device: torch.device,
        dtype: torch.dtype,
        side: torch.cuda.Stream | None,
    ) -> None:
        self.batches = batches
        self._device, self._dtype, self._side = device, dtype, side
        self._coming: Batch | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch, for the present stream."""
        batch = self._coming if self._coming is not None else self._move()
        self._coming = None
        if self._side is not None:
            present = torch.cuda.current_stream(self._device)
            present.wait_stream(self._side)
            # Its memory belongs to the other stream, which would reuse it too early.
            batch.record_stream(present)
        return batch

    def start_next(self) -> None:
        """Begin to move the next one. The time for it is when the work of the present one is
        queued: then the device is busy while the host waits for the data.
        """
        if self._side is None or self._coming is not None:
            return
        try:
            self._coming = self._move()
        except StopIteration:  # it comes again when the batch is asked for
            return

    def _move(self) -> Batch:
        batch = next(self.batches)
        if self._side is None:
            return batch.to(self._device, self._dtype)
        with torch.cuda.stream(self._side):
            return batch.to(self._device, self._dtype)

"""What the plan says of a configuration at any micro-batch, each asked of the tracer once.

Peaks are remembered from start to start, as long as nothing that they depend on changes.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from elip_ds.batching import Peaks, Plan
from elip_ds.batching.cache import Cache, fingerprint
from elip_ds.batching.predict import FIRST, Prediction, largest_fitting
from elip_ds.batching.zero import read_zero
from elip_ds.config import Config
from elip_ds.engine.ds_config import fill_ds_config
from elip_ds.launching.facts import memory_facts
from elip_ds.launching.tracing import Setting, StepTracer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Forecast:
    """tree: the DeepSpeed JSON, as read_ds_config gave it.  device: cpu or cuda, which need not be
    here; "auto" precision is then bf16.  accumulation: micro-batches an optimizer step.
    keep_ratios: of the pruning stages; None: those of the schedule that cost most.
    """

    def __init__(
        self,
        config: Config,
        tree: dict[str, Any],
        *,
        world_size: int,
        device: str,
        accumulation: int = 1,
        attention: str = "fused",
        keep_ratios: Sequence[float] | None = None,
        cache: Cache | None = None,
    ) -> None:
        full = complete_tree(config, tree, device, world_size)
        precision = next((n for n in ("bf16", "fp16") if full[n]["enabled"]), "fp32")
        self.precision = precision
        zero = read_zero(full, world_size, DTYPES[precision])
        self._setting = Setting(
            zero=zero, device=device, attention=attention, accumulation=accumulation
        )
        self.accumulation = accumulation
        self._config, self._ratios, self._cache = config, keep_ratios, cache
        self._tracer: StepTracer | None = None
        self._seen: dict[int, Prediction] = {}
        facts = memory_facts(
            config,
            full,
            world_size=world_size,
            local_ranks=0,
            device={"name": device},
            accumulates=accumulation > 1,
        )
        ratios = None if keep_ratios is None else list(keep_ratios)
        self._facts = facts | {"attention": attention, "keep_ratios": ratios}

    def at(self, micro_batch_size: int) -> Peaks:
        """Bytes, without what a process takes outside of torch."""
        if micro_batch_size in self._seen:
            return self._seen[micro_batch_size].peaks
        key = fingerprint(self._facts | {"forecast": micro_batch_size})
        known = None if self._cache is None else self._cache.read(key)
        if known is not None:
            return Peaks(**known)
        peaks = self.prediction(micro_batch_size).peaks
        if self._cache is not None:
            self._cache.write(key, vars(peaks))
        return peaks

    def prediction(self, micro_batch_size: int) -> Prediction:
        """With the parts. Takes seconds."""
        if micro_batch_size not in self._seen:
            if self._tracer is None:
                self._tracer = StepTracer(self._config, self._setting, self._ratios)
            self._seen[micro_batch_size] = self._tracer.predict(micro_batch_size)
        return self._seen[micro_batch_size]

    def largest(self, budget_bytes: int, sizes: Sequence[int], first: int = FIRST) -> int | None:
        """Of sizes, ascending, the largest whose peak is within the budget; None: not even the
        first.  first: tried first, such as one that is asked for anyway.
        """
        found, _ = largest_fitting(self.prediction, budget_bytes, at_most=sizes[-1], first=first)
        if found is None or found.micro_batch_size < sizes[0]:
            return None
        return sizes[bisect_right(sizes, found.micro_batch_size) - 1]

    def slope(self) -> float | None:
        """Bytes that a sample more takes, between the two largest sizes asked so far."""
        if len(self._seen) < 2:
            return None
        low, high = sorted(self._seen)[-2:]
        more = self._seen[high].peaks.highest - self._seen[low].peaks.highest
        return more / (high - low)

    def curve(self, around: int) -> "Curve":
        """Peaks as a function that costs nothing, from a few sizes up to twice this one."""
        for share in (0.25, 1, 2):
            self.prediction(max(1, int(share * around)))
        return Curve({size: seen.peaks for size, seen in self._seen.items()})


class Curve:
    """Peaks between traced sizes on a line, and beyond them on the last one's."""

    def __init__(self, peaks: dict[int, Peaks]) -> None:
        self._sizes = sorted(peaks)
        self._peaks = peaks

    def __call__(self, micro_batch_size: int) -> Peaks:
        sizes = self._sizes
        if len(sizes) == 1:
            return self._peaks[sizes[0]]
        right = min(max(1, bisect_right(sizes, micro_batch_size)), len(sizes) - 1)
        low, high = sizes[right - 1], sizes[right]
        share = (micro_batch_size - low) / (high - low)

        def between(phase: str) -> int:
            a, b = (getattr(self._peaks[size], phase) for size in (low, high))
            return max(0, round(a + share * (b - a)))

        return Peaks(between("forward"), between("backward"), between("step"))


def complete_tree(
    config: Config, tree: dict[str, Any], device: str, world_size: int
) -> dict[str, Any]:
    """The DeepSpeed JSON with "auto" filled for a device that need not be here."""
    engine = config.engine
    fixed = [name for name in ("bf16", "fp16") if tree.get(name, {}).get("enabled") is True]
    if device == "cuda" and engine.precision == "auto" and not fixed:
        off = tree.get("bf16", {}).get("enabled") is False
        engine = replace(engine, precision="fp32" if off else "bf16")
    return fill_ds_config(
        tree,
        engine=engine,
        optim=config.optim,
        plan=Plan(1, 1, world_size),  # the batch is what is asked
        device=torch.device(device),
    )

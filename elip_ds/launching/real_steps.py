"""Try micro-batches with real steps, in processes of their own: what a search asks for.

measure() and verify() each start a fresh group of ranks, as retrying in a process that has run out
of memory fails more often than not. Memory that runs out is an answer, anything else an exception.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from elip_ds.batching.memory import Outcome, Peaks
from elip_ds.engine.trial_job import TrialJob
from elip_ds.errors import UserError
from elip_ds.launching.endings import Ending, RankFailed, read_records
from elip_ds.launching.local_ranks import Patience, run_ranks
from elip_ds.tasks import min_micro_batch

VERIFY_STEPS = 6
COMMAND = (sys.executable, "-m", "elip_ds.engine.trial")


@dataclass
class RealSteps:
    """job: without sizes.  ranks: on this node.  folder: a subfolder for every start, which stays.
    evaluate, save: what verify() does besides, because the run does so on its way.
    captions: of verify(), see TrialJob.

    started: for the report, every start's folder, sizes, and results as each rank wrote them.
    """

    job: TrialJob
    ranks: int
    folder: Path
    patience: Patience = field(default_factory=Patience)
    evaluate: bool = True
    save: bool = True
    verify_steps: int = VERIFY_STEPS
    captions: Literal["alternate", "random"] = "alternate"
    started: list[dict[str, Any]] = field(default_factory=list)
    _suspected: bool = False

    def measure(self, sizes: Sequence[int]) -> list[Outcome]:
        """sizes: ascending. The list ends with the first that ran out of memory.

        Raises RankFailed, RankHung, or the ranks' own UserError.
        """
        return self._try(replace(self.job, sizes=list(sizes)), "measure")

    def verify(self, size: int) -> Outcome:
        """At one size more steps, of captions of several lengths, and what else a run does.

        On CUDA an allocation that needed a second attempt counts as memory that ran out.
        """
        job = replace(
            self.job,
            sizes=[size],
            steps=self.verify_steps,
            captions=self.captions,
            evaluate=self.evaluate,
            save=self.save,
        )
        return self._try(job, "verify")[-1]

    def _try(self, job: TrialJob, name: str) -> list[Outcome]:
        folder = self.folder / f"{len(self.started):02d}-{name}"
        shutil.rmtree(folder, ignore_errors=True)  # an earlier launcher's, whose results are stale
        folder.mkdir(parents=True)
        started: dict[str, Any] = {"folder": str(folder), "sizes": job.sizes, "results": []}
        self.started.append(started)
        job.write(folder)
        ending = self._run(folder)
        started["results"] = read_records(folder, "result")
        if ending.how == "refused":
            raise UserError(ending.reason)
        if ending.how == "failed" or (ending.how == "suspected" and self._clear(ending)):
            raise RankFailed(f"{ending.reason}; not memory, so not retried; more in {folder}")
        outcomes = _outcomes(started["results"], self.ranks)
        if ending.how != "done" and all(outcome.peaks for outcome in outcomes):
            tried = ending.micro_batch_size or job.sizes[0]
            outcomes.append(Outcome(tried, None, ending.reason, ending.reached_bytes))
        return outcomes

    def _clear(self, suspected: Ending) -> bool:
        """Whether memory is cleared of it: it happens again, or nothing smaller can be tried."""
        size = suspected.micro_batch_size or 0
        again, self._suspected = self._suspected, True
        return again or size <= min_micro_batch(self.job.config)

    def _run(self, folder: Path) -> Ending:
        try:
            return run_ranks(
                [*COMMAND, str(folder)],
                ranks=self.ranks,
                folder=folder,
                patience=self.patience,
            )
        finally:
            shutil.rmtree(folder / "run", ignore_errors=True)  # a checkpoint of the whole model


def _outcomes(results: Sequence[dict[str, Any]], ranks: int) -> list[Outcome]:
    """Of the sizes that all ranks have done, the highest peak of each phase over them."""
    by_size: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        for point in result["points"]:
            by_size.setdefault(point["micro_batch_size"], []).append(point)
    outcomes: list[Outcome] = []
    for size, points in by_size.items():
        if len(points) == ranks and all(outcome.peaks for outcome in outcomes):
            outcomes.append(_outcome(size, points))
    return outcomes


def _outcome(size: int, points: Sequence[dict[str, Any]]) -> Outcome:
    retries = [point.get("retries", 0) for point in points]
    if any(retries):
        rank = retries.index(max(retries))
        reason = f"rank {rank}'s allocator had to clean up {retries[rank]} times at {size}"
        return Outcome(size, None, reason)
    names = ("forward", "backward", "step")
    return Outcome(size, Peaks(*(max(p["peaks"][name] for p in points) for name in names)))

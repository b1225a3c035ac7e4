"""One node's answer: the largest micro-batch that every rank on it can hold.

From the cheapest source that will do: the user's number, an earlier answer, the plan where it
leaves no doubt, else real steps.
"""

import json
import logging
import shutil
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from elip_ds.batching import find_micro_batch, micro_batches, none_fits
from elip_ds.batching.cache import Cache, default_folder, fingerprint
from elip_ds.batching.search import NothingFits
from elip_ds.batching.sizes import show_bytes
from elip_ds.config import Config, PruningConfig
from elip_ds.engine.out_of_memory import OOM_FOLDER, answers_of
from elip_ds.engine.schedule import choose_optimizer
from elip_ds.engine.trial_job import TrialJob
from elip_ds.errors import UserError
from elip_ds.launching.advice import advice
from elip_ds.launching.budget import REPEATS, Memory, beside_loader, least_memory, node_memory
from elip_ds.launching.endings import DeviceBusy, DoesNotFit
from elip_ds.launching.facts import memory_facts
from elip_ds.launching.forecast import Forecast
from elip_ds.launching.limits import host_budget
from elip_ds.launching.loaders import loader_bytes, within_shared_memory
from elip_ds.launching.real_steps import RealSteps
from elip_ds.tasks import min_micro_batch
from elip_ds.towers.pruning import at_ratios

log = logging.getLogger(__name__)

PLAN_HEADROOM = 0.15
"Where the plan alone decides."
EASY = 0.5
"Share of the memory: a plan that needs no more of it is not worth measuring."

THOROUGH, BRISK = 0.01, 0.02
"Gain in size for which one more group of processes is started: without headroom, and with some."


@dataclass(frozen=True)
class Node:
    """What is asked of it.

    tree: the DeepSpeed JSON.  asked: global batch and micro-batch, as json_batch gives them.
    device: cpu or cuda.  folder: the run's, which all nodes see.  first_rank: of this node.
    """

    config: Config
    tree: dict[str, Any]
    asked: tuple[int | str, int | str]
    world_size: int
    local_ranks: int
    device: str
    folder: Path
    first_rank: int = 0

    @property
    def probe_folder(self) -> Path:
        """Nodes probe at the same time, each in a folder of its own."""
        return self.folder / ("probe" if self.first_rank == 0 else f"probe-{self.first_rank}")


def answer_for_node(node: Node, cache: Cache | None = None) -> dict[str, Any]:
    """What goes to rank 0 and into plan.json: largest, source (given, cache, plan or probe), told
    (in words), verified, warnings, keep_ratios, and the figures behind it; later: the same for each
    further stretch of the pruning schedule.

    Raises UserError and its kinds, each with the status to leave with.
    """
    cache = cache or Cache(default_folder())
    # A trial's batch is a small one: which optimizer it steps with is the real one's to say. One
    # still to be found may be any.
    total = inf if node.asked[0] == "auto" else int(node.asked[0])
    optim = choose_optimizer(node.config.optim, total)
    node = replace(node, config=replace(node.config, optim=optim))
    try:
        memory = node_memory(node.config, node.local_ranks, node.device)
    except DeviceBusy as error:
        if node.asked[1] == "auto":
            raise
        return _unchecked(int(node.asked[1]), str(error))
    answer: dict[str, Any] = {"memory": asdict(memory) | {"budget_bytes": memory.budget_bytes}}
    if node.asked[1] != "auto":
        answer |= _given(node, memory, cache)
    else:
        first, *others = stretches(node.config.pruning)
        answer |= _of_stretch(node, first, memory, cache)
        answer["later"] = [_of_stretch(node, ratios, memory, cache) for ratios in others]
    most = max(part["largest"] for part in answers_of(answer))
    answer["warnings"] = [*answer["warnings"], *_host_warnings(node, most)]
    return answer


def stretches(pruning: PruningConfig) -> list[tuple[float, ...]]:
    """The keep ratios of a run, each once, in the order in which they come."""
    ratios = [tuple(stage.keep_ratio for stage in pruning.stages)]
    return list(dict.fromkeys([*ratios, *(tuple(c.keep_ratios) for c in pruning.schedule)]))


def _of_stretch(
    node: Node, ratios: tuple[float, ...], memory: Memory, cache: Cache
) -> dict[str, Any]:
    pruning = at_ratios(node.config.pruning, ratios)
    there = replace(node, config=replace(node.config, pruning=pruning))
    return {"keep_ratios": list(ratios)} | _largest(there, memory, cache)


def _largest(node: Node, memory: Memory, cache: Cache) -> dict[str, Any]:
    """Of one stretch, its answer."""
    sizes = wanted_sizes(node)
    key, failure_key = fingerprint(_facts(node, memory, sizes)), _failure_key(node)
    sizes = _below_failures(sizes, node.folder, failure_key)
    held, why = within_shared_memory(node.config, sizes, node.local_ranks)
    if not held:
        raise DoesNotFit(f"micro-batch {sizes[0]}: {why}")
    known = cache.read(key)
    if known is not None and known["sizes"] == [sizes[0], len(sizes), sizes[-1]]:
        found = known | {"source": "cache", "told": f"as found before: {known['told']}"}
    else:
        found = _find(node, memory, sizes, cache)
        if found["source"] == "probe":
            cache.write(key, found | {"sizes": [sizes[0], len(sizes), sizes[-1]]})
    if found["largest"] > sizes[held - 1]:  # what is free there now is nothing to remember
        found = found | {"largest": sizes[held - 1], "warnings": [*found["warnings"], why]}
    return found | {"fingerprint": key, "failure_key": failure_key}


def wanted_sizes(node: Node) -> list[int]:
    """Micro-batches that the run could take, ascending."""
    batching, least = node.config.batching, min_micro_batch(node.config)
    total = None if node.asked[0] == "auto" else int(node.asked[0])
    world_size, most = node.world_size, batching.max_global
    if batching.hetero == "per_node":  # any number, as long as the other ranks have some
        whole = total or most
        most = None if whole is None else max(least, whole - least * (world_size - 1))
        world_size, total = 1, None
    return micro_batches(
        total,
        world_size=world_size,
        multiple_of=batching.multiple_of,
        min_micro_batch=least,
        max_global=most,
    )


def _facts(node: Node, memory: Memory, sizes: Sequence[int]) -> dict[str, Any]:
    return memory_facts(
        node.config,
        node.tree,
        world_size=node.world_size,
        local_ranks=node.local_ranks,
        # Not the budget: what a bare process takes differs by a page or two from start to start.
        device={
            "name": memory.name,
            "limit_bytes": memory.limit.bytes,
            "headroom": [node.config.batching.headroom, node.config.batching.headroom_bytes],
            "workers": node.config.data.workers if memory.share else None,
        },
        accumulates=_accumulates(node, sizes),
    )


def _failure_key(node: Node) -> str:
    """Of what a record of memory that ran out counts against: not of how much is free at a moment,
    and not of what a start from a checkpoint changes.
    """
    facts = memory_facts(
        node.config,
        node.tree,
        world_size=node.world_size,
        local_ranks=node.local_ranks,
        device={"given": node.config.batching.device_memory},
        accumulates=False,
    )
    return fingerprint({name: fact for name, fact in facts.items() if name != "optimizer"})


def _accumulates(node: Node, sizes: Sequence[int]) -> bool:
    """Whether a smaller micro-batch means more of them a step; then gradients stay meanwhile."""
    return node.asked[0] != "auto" and len(sizes) > 1


def _forecast(node: Node, cache: Cache, accumulates: bool) -> Forecast:
    return Forecast(
        node.config,
        node.tree,
        world_size=node.world_size,
        device=node.device,
        accumulation=2 if accumulates else 1,
        cache=cache,
    )


def _unchecked(micro_batch_size: int, why: str) -> dict[str, Any]:
    """A number that was given is obeyed even where nobody can say what there is."""
    warning = f"{why}; micro-batch {micro_batch_size} is taken as given, unchecked"
    return {
        "largest": micro_batch_size,
        "source": "given",
        "told": "as given, unchecked",
        "tight": False,
        "verified": False,
        "warnings": [warning],
    }


def _given(node: Node, memory: Memory, cache: Cache) -> dict[str, Any]:
    """The user's number is obeyed; where the plan says otherwise, a warning has both figures."""
    micro = int(node.asked[1])
    held, why = within_shared_memory(node.config, [micro], node.local_ranks)
    warnings = [] if held else [why]
    told, planned = "as given", {}
    limit, tight = beside_loader(node.config, memory, micro).limit, False
    if node.config.batching.probe != "never":
        total = node.asked[0]
        accumulates = total != "auto" and int(total) > micro * node.world_size
        peak = memory.taken(_forecast(node, cache, accumulates).at(micro).highest)
        told = f"as given; the plan takes {show_bytes(peak)} of {show_bytes(limit.bytes)}"
        planned, tight = {"planned_bytes": peak}, peak > EASY * limit.bytes
        if peak > limit.bytes:
            warnings.append(
                f"micro-batch {micro} takes {show_bytes(peak)} by the plan, there are "
                f"{show_bytes(limit.bytes)} ({limit.name}); it may run out of memory"
            )
    return {
        "largest": micro,
        "source": "given",
        "told": told,
        "tight": tight,
        "verified": False,
        "warnings": warnings,
        **planned,
    }


def _below_failures(sizes: list[int], folder: Path, key: str) -> list[int]:
    """Without those that ran out of memory in this run, by records that count against this key."""
    records = [json.loads(path.read_text()) for path in (folder / OOM_FOLDER).glob("oom-*.json")]
    failed = [x["micro_batch_size"] for x in records if key in x.get("fingerprints", ())]
    left = [size for size in sizes if not failed or size <= 0.9 * min(failed)]
    if not left:
        raise DoesNotFit(
            f"micro-batch {min(failed)} ran out of memory and the batch has no smaller divisor; "
            f"change batching.global_batch_size, or remove {folder / OOM_FOLDER}"
        )
    return left


def _find(node: Node, memory: Memory, sizes: list[int], cache: Cache) -> dict[str, Any]:
    forecast = _forecast(node, cache, _accumulates(node, sizes))
    mode, most = node.config.batching.probe, sizes[-1]
    if mode != "always":
        limit = beside_loader(node.config, memory, most).limit.bytes
        taken = memory.taken(forecast.at(most).highest)
        if taken <= EASY * limit:
            told = f"all of a rank's share; the plan takes {show_bytes(taken)}"
            return _planned(most, taken, f"{told} of {show_bytes(limit)}", tight=False)
    memory = _with_loader(node, memory, sizes, forecast)
    if mode == "never":
        allowed = memory.planned(memory.limit.bytes * (1 - PLAN_HEADROOM))
        best = forecast.largest(allowed, sizes)
        if best is None:
            raise _does_not_fit(node, memory, forecast, sizes[0], memory.taken(allowed))
        taken = memory.taken(forecast.at(best).highest)
        told = f"by the plan alone, {show_bytes(taken)} of {show_bytes(memory.limit.bytes)}"
        return _planned(best, taken, f"{told}; not verified", tight=True)
    return _probe(node, memory, sizes, forecast, cache)


def _with_loader(node: Node, memory: Memory, sizes: Sequence[int], forecast: Forecast) -> Memory:
    """At the size at which the step and its loader together take the budget, by the plan."""
    if memory.share is None:
        return memory
    guess = forecast.largest(memory.planned(memory.budget_bytes), sizes) or sizes[0]
    curve = forecast.curve(guess)

    def over(size: int) -> bool:
        there = beside_loader(node.config, memory, size)
        return there.taken(curve(size).highest) > there.budget_bytes

    fits = bisect_left(sizes, True, key=over)
    return beside_loader(node.config, memory, sizes[max(0, fits - 1)])


def _host_warnings(node: Node, micro_batch_size: int) -> list[str]:
    """Beside a GPU nothing else watches what the loaders take of the node's own memory."""
    taken = loader_bytes(node.config, micro_batch_size).total
    there = host_budget(node.local_ranks) if node.device == "cuda" else None
    if there is None or taken <= there.bytes:
        return []
    return [
        f"a rank's loader takes {show_bytes(taken)} of the node's memory at micro-batch "
        f"{micro_batch_size}, and there are {show_bytes(there.bytes)} ({there.name}): lower "
        f"data.workers={node.config.data.workers}, or ask for more memory"
    ]


def _planned(largest: int, taken: int, told: str, *, tight: bool) -> dict[str, Any]:
    """tight: memory is so short that what is freed has to be given back at once."""
    return {
        "tight": tight,
        "largest": largest,
        "source": "plan",
        "told": told,
        "verified": False,
        "warnings": [],
        "planned_bytes": taken,
    }


def _probe(
    node: Node, memory: Memory, sizes: list[int], forecast: Forecast, cache: Cache
) -> dict[str, Any]:
    folder = node.probe_folder
    shutil.rmtree(folder, ignore_errors=True)
    guess = forecast.largest(memory.planned(memory.budget_bytes), sizes)
    log.info(
        "probing with real steps: %s per rank (%s), %s of it left free, plan %s",
        *(show_bytes(memory.limit.bytes), memory.limit.name, show_bytes(memory.headroom_bytes)),
        guess or "below the smallest",
    )
    more = _more_than_in_the_run(node, memory, forecast, guess or sizes[0], cache)
    budget = memory.budget_bytes + more
    steps = RealSteps(
        TrialJob(
            config=node.config,
            deepspeed=node.tree,
            sizes=[],
            accumulation=2 if _accumulates(node, sizes) else 1,
            limit_bytes=budget,
        ),
        ranks=node.local_ranks,
        folder=folder,
    )
    try:
        answer = find_micro_batch(
            steps.measure,
            steps.verify,
            budget,
            sizes,
            guess=guess,
            shape=forecast.curve(guess or sizes[0]),
            worthwhile=THOROUGH if memory.headroom_bytes <= REPEATS[node.device] else BRISK,
        )
    except NothingFits as error:
        raise _does_not_fit(node, memory, forecast, sizes[0], memory.budget_bytes, error) from None
    size = answer.micro_batch_size
    peak = answer.verified.peaks.highest if answer.verified and answer.verified.peaks else None
    took = "" if peak is None else f", {show_bytes(peak)} of {show_bytes(memory.limit.bytes)}"
    return {
        "largest": size,
        "source": "probe",
        "tight": True,
        "told": f"measured{took}" + ("" if answer.verified else "; not verified"),
        "verified": answer.verified is not None,
        "warnings": list(answer.warnings),
        "planned_bytes": memory.taken(forecast.at(size).highest),
        "guess": guess,
        "more_than_in_the_run_bytes": more,
        "tries": answer.tries,
        "points": [asdict(point) for point in answer.points],
        "started": steps.started,
    }


def _more_than_in_the_run(
    node: Node, memory: Memory, forecast: Forecast, size: int, cache: Cache
) -> int:
    """Bytes, by the plan, that a rank takes more while probing than it will in a run of more nodes,
    where its part of ZeRO's states is smaller and it gathers more samples' features.

    At most what is left free, because what is verified must fit here.
    """
    if node.world_size == node.local_ranks:
        return 0
    here = replace(node, world_size=node.local_ranks)
    alone = _forecast(here, cache, forecast.accumulation > 1).at(size).highest
    return min(alone - forecast.at(size).highest, memory.headroom_bytes)


def _does_not_fit(
    node: Node,
    memory: Memory,
    forecast: Forecast,
    size: int,
    there_bytes: int,
    error: NothingFits | None = None,
) -> UserError:
    """Of memory; or of the batch, where samples fewer than its divisors would fit."""
    planned = memory.taken(forecast.at(size).highest)
    needed = max(planned, (error and error.needed_bytes) or 0)
    total, smallest = node.asked[0], min_micro_batch(node.config)
    if total != "auto" and size > smallest:
        budget = memory.planned(there_bytes - (needed - planned))
        fits = forecast.largest(budget, range(smallest, size))
        if fits is not None:
            return none_fits(size, fits, int(total), node.world_size, smallest)
    # What was seen says what the plan leaves out, here and where it says what would help.
    helps = advice(
        node.config,
        node.tree,
        size,
        needed,
        world_size=node.world_size,
        device=node.device,
        accumulation=forecast.accumulation,
        taken=lambda other: memory.taken(other) + needed - planned,
    )
    told = f" ({error.reason})" if error and error.reason else ""
    if node.config.batching.probe == "never":
        least = int(needed / (1 - PLAN_HEADROOM))
    else:
        least = least_memory(node.config.batching, needed, memory.outside_bytes, node.device)
    return DoesNotFit(
        f"micro-batch {size} needs at least {show_bytes(needed)} a rank, {show_bytes(least)} with "
        f"what is left free, and there are {show_bytes(memory.limit.bytes)} "
        f"({memory.limit.name}){told}; {helps}"
    )

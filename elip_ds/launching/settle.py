"""The batch of a run, settled before its ranks join: given, remembered, planned or measured.

The first rank of every node answers for its node: the largest micro-batch that fits there. Rank 0
takes the smallest answer, makes the run's batch of it, and tells all. No device is touched by the
ranks themselves; what is measured is measured in processes that end before training starts.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elip_ds import dist
from elip_ds.batching import Plan, choose_micro_batch, plan_batch, share_out
from elip_ds.batching.plan import better_batches
from elip_ds.config import Config, read_config
from elip_ds.engine import json_batch
from elip_ds.engine.heap import return_at_once
from elip_ds.engine.out_of_memory import answers_of, ran_out_of_memory
from elip_ds.engine.schedule import settle_optim
from elip_ds.errors import PassingError, UserError
from elip_ds.launching.limits import count_oom_kills
from elip_ds.launching.node import Node, answer_for_node, stretches
from elip_ds.run import CONFIG, PLAN, Run, hold_folder, open_run
from elip_ds.tasks import min_micro_batch

log = logging.getLogger(__name__)

SCHEMA = 1
ANSWER_SECONDS = 1800.0
"The longest that a node may take to answer, its probe among it."


def settle_batch(
    config: Config,
    tree: dict[str, Any],
    run: Run,
    check: Callable[[Config, Run], None] = lambda config, run: None,
) -> tuple[Config, Plan]:
    """The config with the batch in numbers, and the plan. Every rank calls it, before joining.

    tree: the DeepSpeed JSON, as read_ds_config gave it.  check: what else has to be right before
    anything is measured, for rank 0 to see.  Raises UserError, the same on all ranks.
    """
    asked = json_batch(tree, config.batching, run.world_size)
    resumes = run.resumes
    if asked[0] == "auto" and (resumes or ran_out_of_memory(run.dir)):
        # The run goes on with the batch that it has, whatever this machine could hold.
        asked = read_config(run.dir / CONFIG).batching.global_batch_size, asked[1]
    if resumes and config.batching.hetero == "common":
        check_ranks(int(asked[0]), asked[1], run.world_size, min_micro_batch(config))
    leads = run.ranks.local_rank == 0
    about = {"name": dist.node_name(), "leads": leads, "device": run.device.type}
    dist.leave_note(f"node-{run.rank}", about)
    if run.first:
        dist.leave_note("door", _told(_all_there, config, run, check))
    _raise_if_refused(_read("door", ANSWER_SECONDS))
    if leads:
        dist.leave_note(f"answer-{run.rank}", _told(_answer, config, tree, run, asked))
    if run.first:
        dist.leave_note("decision", _told(_decide, config, run, asked))
    decision = _read("decision", ANSWER_SECONDS + 60)
    _raise_if_refused(decision)
    if decision["tight"] and run.device.type == "cpu":
        return_at_once()
    plan = Plan(
        decision["micro_batch_size"],
        decision["gradient_accumulation_steps"],
        decision["world_size"],
        {tuple(part["keep_ratios"]): part["micro_batch_size"] for part in decision["later"]},
        tuple(decision["unequal"]),
    )
    batching = replace(
        config.batching,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
    )
    return replace(config, batching=batching), plan


def _read(note: str, seconds: float) -> dict[str, Any]:
    try:
        return dist.read_note(note, seconds)
    except TimeoutError as error:
        raise UserError(f"the batch was not settled: {error}") from None


def _all_there(config: Config, run: Run, check: Callable[[Config, Run], None]) -> dict[str, Any]:
    _nodes_of_ranks(run)
    check(config, run)
    return {}


def check_ranks(total: int, micro: int | str, world_size: int, least: int) -> None:
    """Raises UserError where a run that goes on cannot keep its global batch on so many ranks.

    least: samples per rank and pass that the objectives need.
    """
    would_do = [n for n in range(1, total // least + 1) if total % n == 0]
    if world_size not in would_do:
        near = [
            *[n for n in would_do if n < world_size][-1:],
            *[n for n in would_do if n > world_size][:1],
        ]
        raise UserError(
            f"this run goes on with its global batch of {total}, which {world_size} ranks cannot "
            f"share equally with {least} or more samples each; nearest numbers of ranks that can: "
            f"{', '.join(map(str, near))}"
        )
    share = total // world_size
    if micro != "auto" and share % int(micro):
        raise UserError(
            f"this run goes on with its global batch of {total}, {share} for each of {world_size} "
            f"ranks, which micro-batches of {micro} do not make; set batching.micro_batch_size=auto"
        )


class Refused(UserError):
    """As another rank raised it, with the exit status that it had."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _told(function: Any, *args: Any) -> dict[str, Any]:
    """What a function gives, or the error of a person's making that it raises, as a note."""
    try:
        return function(*args)
    except UserError as error:
        return {"error": str(error), "status": error.status}


def _raise_if_refused(note: dict[str, Any]) -> None:
    if "error" in note:
        raise Refused(note["error"], note["status"])


def _answer(
    config: Config, tree: dict[str, Any], run: Run, asked: tuple[int | str, int | str]
) -> dict[str, Any]:
    ranks = run.ranks
    return answer_for_node(
        Node(
            config,
            tree,
            asked,
            world_size=run.world_size,
            local_ranks=ranks.local_world_size,
            device=ranks.device.type,
            folder=run.dir,
            first_rank=run.rank,
        )
    )


def probe_here(config: Config, tree: dict[str, Any], local_ranks: int | None) -> dict[str, Any]:
    """`launch probe`: this machine's answer, and what a run here would make of it.

    local_ranks: None: as many as there are devices. Raises UserError and its kinds.
    """
    device = dist.read_ranks().device
    ranks = local_ranks or max(1, torch.cuda.device_count())
    if device.type == "cuda" and ranks > torch.cuda.device_count():
        raise UserError(f"--ranks {ranks}: torch sees {torch.cuda.device_count()} GPUs here")
    asked = json_batch(tree, config.batching, ranks)
    folder = Path(config.run.dir) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    hold_folder(folder)
    node = Node(
        config,
        tree,
        asked,
        world_size=ranks,
        local_ranks=ranks,
        device=device.type,
        folder=folder,
    )
    answer = answer_for_node(node)
    plan = decide_plan(config, asked, [answer] * ranks)
    record = _record(config, plan, {dist.node_name(): answer}, device.type)
    (folder / PLAN).write_text(json.dumps(record, indent=1))
    _warn(dist.node_name(), answer)
    log.info("%s", one_line(record, answer))
    return record


def _warn(name: str, answer: dict[str, Any]) -> None:
    """What a node's answer has to say besides, in all stretches of the schedule."""
    for part in answers_of(answer):
        for warning in part["warnings"]:
            log.warning("%s: %s", name, warning)


def probe_as_rank(config: Config, tree: dict[str, Any]) -> dict[str, Any] | None:
    """`launch probe` as one rank of several: what their run would settle, and finds remembered.

    Returns the record on rank 0.
    """
    run = open_run(config)
    settle_batch(config, tree, run)
    return json.loads((run.dir / PLAN).read_text()) if run.first else None


def _decide(config: Config, run: Run, asked: tuple[int | str, int | str]) -> dict[str, Any]:
    """The plan that every node can do."""
    of_ranks = _nodes_of_ranks(run)
    answers = _answers(of_ranks)
    smallest = min(answers.values(), key=lambda answer: answer["largest"])
    plan = decide_plan(config, asked, [answers[name] for name, _ in of_ranks])
    for name, answer in answers.items():
        if answer["largest"] > smallest["largest"] and not plan.unequal:
            log.warning(
                "micro-batch %d: another node limits it; %s could hold %d",
                *(plan.micro_batch_size, name, answer["largest"]),
            )
        _warn(name, answer)
    better = better_batches(plan, smallest["largest"], min_micro_batch(config))
    if better and "auto" in asked and not plan.unequal:
        log.warning(
            "global batch %d has no divisor near the %d samples that fit; nearest that have: %s",
            *(plan.global_batch_size, smallest["largest"], ", ".join(map(str, better))),
        )
    decision = _record(config, plan, answers, run.device.type)
    run.write_text(run.dir / PLAN, json.dumps(decision, indent=1))
    log.info("%s", one_line(decision, smallest))
    return decision


def _record(config: Config, plan: Plan, answers: dict[str, Any], device: str) -> dict[str, Any]:
    optim = settle_optim(config.optim, plan.global_batch_size)
    return {
        "schema": SCHEMA,
        "created": time.time(),
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "world_size": plan.world_size,
        "global_batch_size": plan.global_batch_size,
        "optimizer": optim.name,
        "peak_learning_rate": optim.lr,
        "lr_rule": config.optim.lr_rule,
        "min_micro_batch": min_micro_batch(config),
        "device": device,
        "oom_kills": count_oom_kills(),
        "tight": any(part["tight"] for answer in answers.values() for part in answers_of(answer)),
        "unequal": plan.unequal,
        "later": [
            {"keep_ratios": list(ratios), "micro_batch_size": size}
            for ratios, size in plan.later.items()
        ],
        "nodes": answers,
    }


def _nodes_of_ranks(run: Run) -> list[tuple[str, int]]:
    """Of every rank its node's name and first rank; a name that several nodes have gets that rank.

    Raises UserError when a rank is missing, or when some have a GPU and others have none.
    """
    nodes: list[tuple[str, int]] = []
    by_device: dict[str, str] = {}
    for rank in range(run.world_size):
        try:
            note = dist.read_note(f"node-{rank}", 300)
        except TimeoutError:
            raise UserError(f"rank {rank} is missing; see its log") from None
        name = note["name"]
        by_device.setdefault(note["device"], name)
        if note["leads"]:
            taken = any(name == other for other, _ in nodes)
            nodes.append((f"{name}-{rank}" if taken else name, rank))
        else:  # of nodes with one name the last to have begun
            own = [node for node in nodes if node[0] in (name, f"{name}-{node[1]}")]
            nodes.append(own[-1])
    if len(by_device) > 1:
        raise PassingError(
            f"torch sees no GPU on {by_device['cpu']}, and one on {by_device['cuda']}: look at "
            "nvidia-smi there, or do without that node (sbatch --exclude)"
        )
    return nodes


def _answers(nodes: list[tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """By node."""
    answers: dict[str, dict[str, Any]] = {}
    for name, rank in dict.fromkeys(nodes):
        try:
            answers[name] = dist.read_note(f"answer-{rank}", ANSWER_SECONDS)
        except TimeoutError:
            raise UserError(f"the probe of node {name} is missing; see its log") from None
        _raise_if_refused(answers[name])
    return answers


def decide_plan(
    config: Config,
    asked: tuple[int | str, int | str],
    answers: list[dict[str, Any]],
) -> Plan:
    """asked: global batch and micro-batch, as json_batch gives them; a number is obeyed.
    answers: of the ranks; the smallest counts, in each stretch of the pruning schedule, unless
    batching.hetero lets them differ.
    """
    total, micro = asked
    least, world_size = min_micro_batch(config), len(answers)
    if micro != "auto":
        size = int(micro)
        total = size * world_size if total == "auto" else int(total)
        return plan_batch(total, size, world_size=world_size, min_micro_batch=least)

    def choose(largest: int, total: int | None) -> Plan:
        return choose_micro_batch(
            largest,
            total,
            world_size=world_size,
            multiple_of=config.batching.multiple_of,
            min_micro_batch=least,
            max_global=config.batching.max_global,
        )

    if config.batching.hetero == "per_node":
        return share_out(
            [answer["largest"] for answer in answers],
            None if total == "auto" else int(total),
            multiple_of=config.batching.multiple_of,
            min_micro_batch=least,
            max_global=config.batching.max_global,
        )
    first = min(answer["largest"] for answer in answers)
    plan = choose(first, None if total == "auto" else int(total))
    later = {}
    for parts in zip(*(answer["later"] for answer in answers), strict=True):
        largest = min(part["largest"] for part in parts)
        ratios = tuple(parts[0]["keep_ratios"])
        later[ratios] = choose(largest, plan.global_batch_size).micro_batch_size
    if later:
        later[stretches(config.pruning)[0]] = plan.micro_batch_size
    return replace(plan, later=later)


def one_line(decision: dict[str, Any], answer: dict[str, Any]) -> str:
    """What was settled, and how."""
    unequal = sorted(set(decision["unequal"]))
    micro = " to ".join(map(str, unequal[:: len(unequal) - 1])) if unequal else None
    return (
        f"batch: micro-batch {micro or decision['micro_batch_size']} x accumulation "
        f"{decision['gradient_accumulation_steps']} x {decision['world_size']} ranks = "
        f"{decision['global_batch_size']} on {decision['device']}, "
        f"peak learning rate {decision['peak_learning_rate']:.4g} ({answer['told']})"
    )

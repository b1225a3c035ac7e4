"""The panels of the dashboards, of which tools/make_dashboards.py makes Grafana's and the page.

$run is the run that is looked at, $other one that it is compared with, $__rate_interval Grafana's
word for the shortest range over which a rate is sure to have samples.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Panel:
    """shown: expression -> legend, in which {{label}} stands for its value.  unit: as Grafana calls
    it (s, bytes, percentunit, short).  kind: timeseries, or stat, which is the last value alone.
    stacked: the lines are parts of a whole.  log: a logarithmic scale.
    """

    title: str
    shown: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    stacked: bool = False
    log: bool = False
    about: str = ""


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    panels: list[Panel] = field(default_factory=list)
    compares: bool = False


def rate(name: str, by: str = "", where: str = "") -> str:
    """Of a counter, summed."""
    more = f", {where}" if where else ""
    grouped = f" by ({by})" if by else ""
    return f'sum{grouped} (rate({name}{{run="$run"{more}}}[$__rate_interval]))'


def of_run(name: str, where: str = "") -> str:
    return f'{name}{{run="$run"{", " + where if where else ""}}}'


IMAGES = rate("elip_samples_total")
MFU = f"{rate('elip_model_flops_total')} / sum({of_run('elip_device_peak_flops')})"
AGE = f"time() - max({of_run('elip_last_step_timestamp_seconds')})"
SAVED = of_run("elip_checkpoint_last_success_timestamp_seconds")


TEXT = 'modality="text"'
CHECKPOINT = "elip_step_phase_duration_seconds"
CHECKPOINTS = '{run="$run", phase="checkpoint"}'
BOTH = 'run=~"$run|$other"'


def stat(title: str, expression: str, unit: str = "short", about: str = "") -> Panel:
    return Panel(title, {expression: ""}, unit, kind="stat", about=about)


def phases() -> str:
    """Seconds a step in each phase, mean over ranks and the steps of a moment."""
    spent = rate("elip_step_phase_duration_seconds_sum", "run, phase", 'phase!="checkpoint"')
    return f"{spent} / on (run) group_left () {rate('elip_step_duration_seconds_count', 'run')}"


def phase(which: str) -> str:
    """Seconds a step in the phases that match, of each rank."""
    spent = rate("elip_step_phase_duration_seconds_sum", "node, rank", f'phase=~"{which}"')
    return f"{spent} / {rate('elip_step_duration_seconds_count', 'node, rank')}"


def share(which: str) -> str:
    """Of the time of all ranks' steps."""
    spent = rate("elip_step_phase_duration_seconds_sum", where=f'phase="{which}"')
    return f"{spent} / {rate('elip_step_duration_seconds_sum')}"


OVERVIEW = Dashboard(
    "elip-run",
    "ELIP: run",
    [
        stat("Seconds since the last step", AGE, "s", "Grows while nothing is trained."),
        stat("Images a second", IMAGES),
        stat("MFU", MFU, "percentunit", "Counted operations over what the devices can do."),
        stat(
            "Done",
            f"{of_run('elip_samples_seen')} / {of_run('elip_length_samples')}",
            "percentunit",
        ),
        stat(
            "Left at this speed",
            f"({of_run('elip_length_samples')} - {of_run('elip_samples_seen')})"
            f" / on (run) sum by (run) (rate({of_run('elip_samples_total')}[15m]))",
            "s",
        ),
        stat("Since the last checkpoint", f"time() - {SAVED}", "s"),
        stat("Epoch", of_run("elip_epoch")),
        stat("Step", of_run("elip_step")),
        stat(
            "Alerts firing", 'count(ALERTS{alertstate="firing", run="$run"}) or vector(0)', "short"
        ),
        Panel("Images a second", {IMAGES: "images/s"}),
        Panel("Loss, mean over an interval", {of_run("elip_loss"): "{{objective}}"}),
        Panel(
            "Seconds of a step, by phase",
            {phases(): "{{phase}}"},
            "s",
            stacked=True,
            about="Mean over ranks. On a GPU collectives hide in the other phases.",
        ),
        Panel("Share of what the devices can do", {MFU: "MFU"}, "percentunit"),
        Panel("Operations a second", {rate("elip_model_flops_total"): "operations/s"}),
        Panel(
            "Tokens a second", {rate("elip_tokens_total", "modality"): "{{modality}}"}, stacked=True
        ),
        Panel(
            "Similarities within a batch",
            {of_run("elip_similarity"): "{{pair}}"},
            about="Pairs above non-pairs is learning; all near one value is collapse.",
        ),
        Panel(
            "Recall",
            {
                of_run("elip_in_batch_recall_ratio"): "in batch, {{objective}}",
                of_run("elip_recall_ratio"): "held out, at {{at}}",
            },
            "percentunit",
        ),
        Panel("Learning rate", {of_run("elip_learning_rate"): "rate"}),
        Panel("Gradient norm", {of_run("elip_gradient_norm"): "norm"}, log=True),
        Panel("Temperature", {of_run("elip_temperature"): "temperature"}),
        Panel("Twin's distance", {of_run("elip_ema_distance_ratio"): "distance"}, "percentunit"),
        Panel("What objectives tell", {of_run("elip_signal"): "{{name}}"}),
        Panel(
            "Steps that changed nothing",
            {
                of_run("elip_optimizer_steps_skipped_total"): "{{reason}}",
                of_run("elip_nonfinite_losses_total"): "intervals with NaN",
            },
        ),
        Panel("Loss scale", {of_run("elip_loss_scale"): "scale"}, log=True),
        Panel("Steps a second", {rate("elip_optimizer_steps_total"): "steps/s"}),
        Panel(
            "Starts",
            {
                f"time() - {of_run('elip_start_timestamp_seconds')}": "seconds since this start",
                of_run("elip_slurm_restarts"): "restarts by Slurm",
            },
        ),
        Panel("What runs", {of_run("elip_run_info"): "{{preset}} {{git}} torch {{torch}}"}),
    ],
)

RANKS = Dashboard(
    "elip-ranks",
    "ELIP: ranks and nodes",
    [
        Panel(
            "Ranks alive",
            {f"sum by (node) ({of_run('elip_rank_up')})": "{{node}}"},
            stacked=True,
        ),
        Panel(
            "Own seconds of a step: data and forward",
            {phase("data|forward"): "{{node}} {{rank}}"},
            "s",
            about="One line above the others is the rank that all wait for.",
        ),
        Panel(
            "Seconds of a step in collectives",
            {phase("communication"): "{{node}} {{rank}}"},
            "s",
            about="The rank that waits least is the slow one.",
        ),
        Panel(
            "Seconds of a step",
            {
                f"histogram_quantile({q}, "
                f"{rate('elip_step_duration_seconds_bucket', 'le')})": f"{100 * q:.0f} %"
                for q in (0.5, 0.95, 0.99)
            },
            "s",
        ),
        Panel(
            "Seconds since the last step",
            {f"time() - {of_run('elip_last_step_timestamp_seconds')}": "{{node}} {{rank}}"},
            "s",
        ),
        Panel("Memory used", {of_run("elip_memory_used_bytes"): "{{node}} {{rank}}"}, "bytes"),
        Panel(
            "Operations a second",
            {rate("elip_model_flops_total", "node, rank"): "{{node}} {{rank}}"},
        ),
        Panel("What a device can do", {of_run("elip_device_peak_flops"): "{{node}} {{rank}}"}),
        Panel(
            "Share of the time that telemetry takes",
            {rate("elip_telemetry_seconds_total", "node, rank"): "{{node}} {{rank}}"},
            "percentunit",
        ),
        Panel("Ranks of the job", {of_run("elip_world_size"): "ranks"}),
    ],
)

DATA = Dashboard(
    "elip-data",
    "ELIP: data",
    [
        stat("Share of a step that waits for data", share("data"), "percentunit"),
        stat("Epoch", of_run("elip_epoch")),
        stat("Samples lost", f"sum({of_run('elip_samples_skipped_total')})"),
        Panel("Share of a step that waits for data", {share("data"): "data"}, "percentunit"),
        Panel(
            "Batches that the workers have ready",
            {of_run("elip_loader_ready_batches"): "{{node}} {{rank}}"},
            about="At 0 the run waits for its data; always 0 without workers.",
        ),
        Panel("Seconds of a step in data", {phase("data"): "{{node}} {{rank}}"}, "s"),
        Panel(
            "Samples that could not be used, a minute",
            {
                f"60 * {rate('elip_samples_skipped_total', 'source, reason')} > 0": (
                    "{{source}}: {{reason}}"
                )
            },
            stacked=True,
        ),
        Panel(
            "Shards behind, in the present pass",
            {
                of_run("elip_shard_position"): "{{source}}",
                of_run("elip_shards"): "{{source}}: all",
            },
        ),
        Panel("Samples seen", {of_run("elip_samples_seen"): "samples"}),
        Panel(
            "Text tokens a sample",
            {f"{rate('elip_tokens_total', where=TEXT)} / {IMAGES}": "tokens"},
        ),
    ],
)

MEMORY = Dashboard(
    "elip-memory",
    "ELIP: memory and batch",
    [
        stat("Micro-batch", of_run("elip_micro_batch_size")),
        stat("Accumulation", of_run("elip_gradient_accumulation_steps")),
        stat("Ranks", of_run("elip_world_size")),
        stat("Global batch", of_run("elip_global_batch_size")),
        stat("Starts after memory ran out", of_run("elip_oom_retries")),
        Panel(
            "Memory of a rank",
            {
                f"max({of_run('elip_memory_used_bytes')})": "used, most of all ranks",
                f"max({of_run('elip_memory_peak_bytes')})": "peak, most of all ranks",
                of_run("elip_memory_planned_peak_bytes"): "planned peak",
                f"min({of_run('elip_memory_limit_bytes')})": "limit",
            },
            "bytes",
        ),
        Panel(
            "Share of the limit",
            {
                f"{of_run('elip_memory_used_bytes')} / {of_run('elip_memory_limit_bytes')}": (
                    "{{node}} {{rank}}"
                )
            },
            "percentunit",
        ),
        Panel(
            "Micro-batch and accumulation",
            {
                of_run("elip_micro_batch_size"): "micro-batch",
                of_run("elip_gradient_accumulation_steps"): "accumulation",
            },
        ),
        Panel("Vision tokens after a stage", {of_run("elip_kept_tokens"): "stage {{stage}}"}),
        Panel(
            "Share of the image's tokens after a stage",
            {of_run("elip_kept_token_ratio"): "stage {{stage}}"},
            "percentunit",
        ),
        Panel(
            "Vision tokens a second",
            {rate("elip_vision_tokens_total", "stage, outcome"): "stage {{stage}}, {{outcome}}"},
        ),
        Panel(
            "Checkpoints",
            {
                f"time() - {SAVED}": "seconds since the last",
                f"max({CHECKPOINT}_sum{CHECKPOINTS}) / max({CHECKPOINT}_count{CHECKPOINTS})": (
                    "seconds of one, mean"
                ),
            },
            "s",
        ),
        Panel("Size of a checkpoint", {of_run("elip_checkpoint_size_bytes"): "size"}, "bytes"),
        Panel("Checkpoints that failed", {of_run("elip_checkpoint_failures_total"): "failed"}),
    ],
)

COMPARED = Dashboard(
    "elip-compare",
    "ELIP: two runs",
    [
        Panel(title, {expression.replace('run="$run"', BOTH): legend}, unit)
        for title, expression, legend, unit in (
            ("Images a second", rate("elip_samples_total", "run"), "{{run}}", "short"),
            (
                "MFU",
                f"{rate('elip_model_flops_total', 'run')}"
                f" / sum by (run) ({of_run('elip_device_peak_flops')})",
                "{{run}}",
                "percentunit",
            ),
            (
                "Seconds of a step",
                f"{rate('elip_step_duration_seconds_sum', 'run')}"
                f" / {rate('elip_step_duration_seconds_count', 'run')}",
                "{{run}}",
                "s",
            ),
            ("Samples seen", of_run("elip_samples_seen"), "{{run}}", "short"),
            ("Loss", of_run("elip_loss"), "{{run}} {{objective}}", "short"),
            ("Held-out recall", of_run("elip_recall_ratio"), "{{run}} at {{at}}", "percentunit"),
            (
                "Recall in the batch",
                of_run("elip_in_batch_recall_ratio"),
                "{{run}} {{objective}}",
                "percentunit",
            ),
            (
                "Share of the image's tokens after a stage",
                of_run("elip_kept_token_ratio"),
                "{{run}} stage {{stage}}",
                "percentunit",
            ),
            (
                "Memory, most of all ranks",
                f"max by (run) ({of_run('elip_memory_used_bytes')})",
                "{{run}}",
                "bytes",
            ),
            ("Learning rate", of_run("elip_learning_rate"), "{{run}}", "short"),
        )
    ],
    compares=True,
)

DASHBOARDS = (OVERVIEW, RANKS, DATA, MEMORY, COMPARED)

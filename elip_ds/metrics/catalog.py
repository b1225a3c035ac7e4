"""Every Prometheus series there is: name, kind, labels and what it means.

Names carry base units; counters end in _total. Rates and ratios over time are for PromQL.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """kind: counter, gauge, histogram or info.  labels: few values each."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


CATALOG = (
    Series("elip_samples_total", "counter", "Image-text pairs trained on since this start."),
    Series("elip_optimizer_steps_total", "counter", "Optimizer steps done since this start."),
    Series(
        "elip_optimizer_steps_skipped_total",
        "counter",
        "Optimizer steps that an overflow skipped since this start.",
    ),
    Series(
        "elip_samples_skipped_total",
        "counter",
        "Samples that could not be used, of all ranks.",
        ("source", "reason"),
    ),
    Series("elip_step", "gauge", "Optimizer steps done in the whole run."),
    Series("elip_samples_seen", "gauge", "Image-text pairs trained on in the whole run."),
    Series("elip_epoch", "gauge", "Passes over the training data."),
    Series("elip_step_duration_seconds", "histogram", "Wall time of an optimizer step on rank 0."),
    Series(
        "elip_step_phase_seconds_total",
        "counter",
        "Time spent per phase of the step on rank 0.",
        ("phase",),
    ),
    Series("elip_loss", "gauge", "Loss of the last interval, mean over ranks.", ("objective",)),
    Series("elip_signal", "gauge", "Accuracies and other signs of health.", ("name",)),
    Series(
        "elip_kept_tokens",
        "gauge",
        "Vision tokens after a pruning stage, counted from 0.",
        ("stage",),
    ),
    Series("elip_learning_rate", "gauge", "Learning rate of the last step."),
    Series("elip_gradient_norm", "gauge", "Gradient norm of the last step, before clipping."),
    Series("elip_global_batch_size", "gauge", "Samples per optimizer step."),
    Series("elip_micro_batch_size", "gauge", "Samples per rank and pass."),
    Series("elip_gradient_accumulation_steps", "gauge", "Passes per optimizer step."),
    Series(
        "elip_oom_retries",
        "gauge",
        "How often the launcher has started this run again with a smaller micro-batch.",
    ),
    Series("elip_world_size", "gauge", "Ranks of the job."),
    Series("elip_recall_ratio", "gauge", "Held-out retrieval recall, 0..1.", ("at",)),
    Series(
        "elip_memory_used_bytes",
        "gauge",
        "Memory of rank 0: allocated on the GPU, else the process's resident set.",
    ),
    Series("elip_memory_peak_bytes", "gauge", "The most of it since this start."),
    Series(
        "elip_checkpoint_last_success_timestamp_seconds",
        "gauge",
        "Unix time of the last whole checkpoint.",
    ),
    Series(
        "elip_run",
        "info",
        "What is running: run, model, zero_stage, precision, version, torch.",
    ),
)

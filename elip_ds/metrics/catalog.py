"""Every Prometheus series there is: name, kind, unit, labels, what it is and how to read it.

Names carry base units; counters end in _total and begin at 0 with every start. Rates and ratios
over time are for PromQL. Besides its own labels every series has run and node, and those of scope
rank have rank.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """kind: counter, gauge, histogram or info.  labels: few values each.  scope: run, one for all
    ranks; rank, one of each rank; or endpoint, made where a node's ranks are served.
    meaning: what its values tell.
    """

    name: str
    kind: str
    unit: str
    help: str
    meaning: str
    labels: tuple[str, ...] = ()
    scope: str = "run"


PHASES = ("data", "forward", "backward", "communication", "optimizer", "checkpoint")
"Of elip_step_phase_duration_seconds."

CATALOG = (
    # What went in.
    Series(
        "elip_samples_total",
        "counter",
        "samples",
        "Image-text pairs trained on since this start.",
        "Its rate is the throughput, images a second.",
    ),
    Series(
        "elip_tokens_total",
        "counter",
        "tokens",
        "Tokens that the student's towers took in since this start.",
        "Of images before pruning, of text without padding.",
        ("modality",),
    ),
    Series(
        "elip_vision_tokens_total",
        "counter",
        "tokens",
        "Vision tokens that went past a pruning stage, or were merged by it.",
        "Stages count from 0; kept / (kept + pruned) of a stage is what it lets through.",
        ("stage", "outcome"),
    ),
    Series(
        "elip_optimizer_steps_total",
        "counter",
        "steps",
        "Optimizer steps done since this start.",
        "Flat: the run is stalled.",
    ),
    Series(
        "elip_optimizer_steps_skipped_total",
        "counter",
        "steps",
        "Optimizer steps that changed nothing.",
        "A few at the start of fp16 are its scale being found; a streak is divergence.",
        ("reason",),
    ),
    Series(
        "elip_nonfinite_losses_total",
        "counter",
        "intervals",
        "Log intervals in which a loss was NaN or infinite.",
        "Any increase is a fault.",
    ),
    Series(
        "elip_samples_skipped_total",
        "counter",
        "samples",
        "Samples that could not be used, of all ranks.",
        "skipped.jsonl in the run's folder names them.",
        ("source", "reason"),
    ),
    # Where the run is.
    Series(
        "elip_run",
        "info",
        "1",
        "What is running: preset, model, precision, zero_stage, slurm_job_id, git, versions.",
        "As elip_run_info; join it by run to have these as labels.",
    ),
    Series(
        "elip_start_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time of this start.",
        "Every change is a restart.",
    ),
    Series(
        "elip_slurm_restarts",
        "gauge",
        "starts",
        "How often Slurm has started the job again.",
        "0 at the first start, and outside of Slurm.",
    ),
    Series(
        "elip_step",
        "gauge",
        "steps",
        "Optimizer steps done in the whole run.",
        "Falls back when a killed run goes on from its checkpoint.",
    ),
    Series(
        "elip_samples_seen",
        "gauge",
        "samples",
        "Image-text pairs trained on in the whole run.",
        "Falls back as elip_step does.",
    ),
    Series(
        "elip_length_samples",
        "gauge",
        "samples",
        "Image-text pairs at the end of the run.",
        "elip_samples_seen / elip_length_samples is how far it is.",
    ),
    Series(
        "elip_epoch",
        "gauge",
        "epochs",
        "Passes over the training data.",
        "A source of weight 2 is visited twice in one.",
    ),
    Series("elip_world_size", "gauge", "ranks", "Ranks of the job.", "Constant within a start."),
    # How long it takes.
    Series(
        "elip_step_duration_seconds",
        "histogram",
        "seconds",
        "Wall time of an optimizer step.",
        "Evaluations and checkpoints left out. All ranks of a job show the same, as they wait for "
        "each other.",
        scope="rank",
    ),
    Series(
        "elip_step_phase_duration_seconds",
        "histogram",
        "seconds",
        "Time of the host in a phase of a step.",
        "On a CPU: data is the wait for the loader and the copy; communication is all time in "
        "collectives, waiting for slower ranks included, and in no other phase. On a GPU work is "
        "queued: forward, backward and optimizer are what queuing it takes and what the host waits "
        "for, and collectives hide in them. checkpoint is seen once for each save.",
        ("phase",),
        scope="rank",
    ),
    Series(
        "elip_last_step_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time at which the last step ended.",
        "Its age grows while a run is stalled.",
        scope="rank",
    ),
    Series(
        "elip_telemetry_seconds_total",
        "counter",
        "seconds",
        "Time that the training process spent on these figures.",
        "Its rate is the share of the time that telemetry costs.",
        scope="rank",
    ),
    Series(
        "elip_model_flops_total",
        "counter",
        "operations",
        "Floating-point operations of this rank since its start.",
        "Counted, two a multiply-add, when a kind of pass first runs: matrix products, "
        "convolutions and attention, of student, twin and look-ahead, recomputed ones among them. "
        "Its rate over elip_device_peak_flops is the MFU.",
        scope="rank",
    ),
    Series(
        "elip_device_peak_flops",
        "gauge",
        "operations a second",
        "What the rank's device can do.",
        "metrics.device_peak_tflops, else what a large matrix product reached at the start.",
        scope="rank",
    ),
    # What is learned.
    Series(
        "elip_loss",
        "gauge",
        "1",
        "Loss of the last interval, mean over its steps and ranks.",
        "NaN and infinities come as they are.",
        ("objective",),
    ),
    Series("elip_learning_rate", "gauge", "1", "Learning rate.", "Of the last step."),
    Series(
        "elip_temperature",
        "gauge",
        "1",
        "What similarities are divided by in the contrastive loss.",
        "Learned; at its lower bound the loss has stopped to pull.",
    ),
    Series(
        "elip_gradient_norm",
        "gauge",
        "1",
        "Gradient norm of the last step, before clipping.",
        "Spikes come before divergence.",
    ),
    Series(
        "elip_loss_scale",
        "gauge",
        "1",
        "Factor of the loss in fp16, else 1.",
        "Halved at every overflow.",
    ),
    Series(
        "elip_similarity",
        "gauge",
        "1",
        "Mean cosine within a micro-batch: of pairs, of non-pairs, of the hardest non-pair.",
        "positive above negative is learning; all near one value is collapse.",
        ("pair",),
    ),
    Series(
        "elip_in_batch_recall_ratio",
        "gauge",
        "ratio",
        "Share of images whose own text is the nearest of all candidates of the step.",
        "Near 1 / batch: nothing is learned, or all features are one.",
        ("objective",),
    ),
    Series(
        "elip_ema_distance_ratio",
        "gauge",
        "ratio",
        "Distance of the momentum twin from the model, over the model's length.",
        "0 at the start; it grows with the learning rate.",
    ),
    Series(
        "elip_signal",
        "gauge",
        "1",
        "Accuracies and what else objectives tell of themselves.",
        "Means over the last interval.",
        ("name",),
    ),
    Series(
        "elip_recall_ratio",
        "gauge",
        "ratio",
        "Held-out retrieval recall, mean of both directions.",
        "Of the last evaluation.",
        ("at",),
    ),
    # What a batch is.
    Series(
        "elip_kept_tokens",
        "gauge",
        "tokens",
        "Vision tokens after a pruning stage.",
        "Class token and merged tokens included; stages count from 0.",
        ("stage",),
    ),
    Series(
        "elip_kept_token_ratio",
        "gauge",
        "ratio",
        "elip_kept_tokens over the tokens of the unpruned image.",
        "1 while a stage does nothing.",
        ("stage",),
    ),
    Series("elip_global_batch_size", "gauge", "samples", "Samples per optimizer step.", "Fixed."),
    Series(
        "elip_micro_batch_size",
        "gauge",
        "samples",
        "Samples per rank and pass.",
        "May grow as a pruning schedule keeps fewer tokens.",
    ),
    Series(
        "elip_gradient_accumulation_steps",
        "gauge",
        "passes",
        "Passes per optimizer step.",
        "Micro-batch x this x ranks is the global batch.",
    ),
    Series(
        "elip_oom_retries",
        "gauge",
        "starts",
        "How often the launcher has started this run again with a smaller micro-batch.",
        "Above 0 the plan was wrong.",
    ),
    # Memory.
    Series(
        "elip_memory_used_bytes",
        "gauge",
        "bytes",
        "Memory of the rank: what torch holds of the GPU, else the process's resident set.",
        "Read when the series are written.",
        scope="rank",
    ),
    Series(
        "elip_memory_peak_bytes",
        "gauge",
        "bytes",
        "The most of it since this start.",
        "Compare with planned and limit.",
        scope="rank",
    ),
    Series(
        "elip_memory_limit_bytes",
        "gauge",
        "bytes",
        "What the rank may take.",
        "Of the GPU, the control group, or the rank's share of the machine; see plan.json.",
        scope="rank",
    ),
    Series(
        "elip_memory_planned_peak_bytes",
        "gauge",
        "bytes",
        "What the plan of the batch says that a rank takes at most.",
        "NaN where the micro-batch was given or measured without a plan.",
    ),
    # Data.
    Series(
        "elip_loader_ready_batches",
        "gauge",
        "batches",
        "Batches that the loader's workers have ready.",
        "Mostly 0: the run waits for its data. Always 0 without workers.",
        scope="rank",
    ),
    Series(
        "elip_shard_position",
        "gauge",
        "shards",
        "Shards of a source that its present pass has behind it.",
        "On average over the window in which samples are shuffled.",
        ("source",),
    ),
    Series("elip_shards", "gauge", "shards", "Shards of a source.", "Constant.", ("source",)),
    # Checkpoints.
    Series(
        "elip_checkpoint_last_success_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time of the last whole checkpoint of this start.",
        "At first that of the start itself; its age is what a kill would cost.",
    ),
    Series(
        "elip_checkpoint_size_bytes",
        "gauge",
        "bytes",
        "The last checkpoint on disk.",
        "0 before the first of this start.",
    ),
    Series(
        "elip_checkpoint_failures_total",
        "counter",
        "checkpoints",
        "Checkpoints that could not be written.",
        "The log says why; the one before stays.",
    ),
    # The endpoint's own.
    Series(
        "elip_rank_up",
        "gauge",
        "1",
        "1 while the rank's process lives.",
        "0 with others at 1: that rank died and the rest will wait for it.",
        scope="endpoint",
    ),
)

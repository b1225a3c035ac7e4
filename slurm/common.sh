# What the scripts beside it share; sourced inside a job, in the repository's folder.
set -uo pipefail

if [ -d .venv ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
if [ -f slurm/site.env ]; then . slurm/site.env; fi

# Ranks meet on the first node, by its address: a node's name need not be a host's. The port is
# another one for each job and each start, as one that was just in use is not free at once.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
start=${SLURM_RESTART_COUNT:-0}    # which Slurm does not set at the first start
export MASTER_ADDR=${MASTER_ADDR:-${address:-$first}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + 7919 * start) % 12000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# The signal ahead of the time limit comes to this script alone: one that enters a step reaches every
# process of it, compilers and loaders' workers too. Rank 0 runs on this node and sees the file.
ELIP_STOP_FILE=$(mktemp -d)/stop
export ELIP_STOP_FILE
trap 'echo "$(date +%T) the time is nearly over: asking the ranks to save"; : > "$ELIP_STOP_FILE"' USR2
trap 'rm -rf "${ELIP_STOP_FILE%/stop}"' EXIT

# run_step COMMAND...: one process for each task, then leave with its status; when the ranks were
# asked to stop and did, ask Slurm for another start, which goes on where they saved.
run_step() {
    echo "$(date +%T) start $start of job $SLURM_JOB_ID: $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST," \
        "meeting at $MASTER_ADDR:$MASTER_PORT"
    # A minute after the first task ended the others are killed, and not at once: when all refuse a
    # setting, the status shall be theirs. srun does not take --cpus-per-task over from the job. It
    # runs in the background, because a trap waits for what runs in the foreground.
    srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$@" &
    local step=$! status
    while kill -0 "$step" 2> /dev/null; do wait "$step"; done    # which returns at each signal, too
    wait "$step"
    status=$?
    if [ "$status" = 0 ] && [ -e "$ELIP_STOP_FILE" ]; then
        # One element of an array, of which the last has the number of them all.
        local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
        scontrol requeue "${job:-$SLURM_JOB_ID}" || status=1
    fi
    exit "$status"
}

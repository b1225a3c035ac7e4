# What the scripts beside it share; sourced inside a job, in the repository's folder.

# The site's modules may bring a python of their own, so .venv's comes before it, unless the site's
# lines have activated another one.
active=${VIRTUAL_ENV:-} conda=${CONDA_PREFIX:-}
if [ -f slurm/site.env ]; then . slurm/site.env; fi
if [ -d .venv ] && [ "${VIRTUAL_ENV:-} ${CONDA_PREFIX:-}" = "$active $conda" ]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
set -uo pipefail    # not before: modules and conda read variables that are not set
MAX_TRIES=${MAX_TRIES:-20}                 # failures of a job, of which the last one ends it
STUCK_AFTER=${STUCK_AFTER:-3}              # failures at one and the same checkpoint, likewise
EXCLUDE_AFTER=${EXCLUDE_AFTER:-2}          # failures of a node, until the job does without it
STALL_SECONDS=${STALL_SECONDS:-3600}       # without a step: longer than any evaluation or save
LINGER_SECONDS=${LINGER_SECONDS:-60}       # until all are killed, once the first task has ended
DEEPSPEED=${DEEPSPEED:-ds_configs/z2.json}
WRAP=${WRAP:-}                             # words before each rank's command: a container's

# One element of an array, of which the last has the number of them all.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
start=${SLURM_RESTART_COUNT:-0}            # which Slurm does not set at the first start

# Ranks meet on the first node, by its address: a node's name need not be a host's. The port is
# another one for each job and each start, as one that was just in use is not free at once.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-${address:-$first}}
export MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + 7919 * start) % 12000))}
# A task's CPUs, where nobody said: its share of the smallest node, such as 32 of "64(x2),32".
smallest=$(tr ',' '\n' <<< "${SLURM_JOB_CPUS_PER_NODE:-1}" | sed 's/(.*//' | sort -n | head -n 1)
cpus=$((smallest / ${SLURM_NTASKS_PER_NODE:-1}))
if [ "$cpus" -lt 1 ] || [ -n "${SLURM_HINT:-}${SLURM_THREADS_PER_CORE:-}" ]; then cpus=1; fi
cpus=${SLURM_CPUS_PER_TASK:-$cpus}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
# Each task keeps to its cores, and so to the memory beside them, where the cluster can do that.
case $(scontrol show config | sed -n 's/^TaskPlugin *= //p') in
    *affinity*) export SLURM_CPU_BIND=${SLURM_CPU_BIND:-cores} ;;
esac
# Neighbours on a socket, as GPUs are; Slurm would deal them out in turn.
export SLURM_DISTRIBUTION=${SLURM_DISTRIBUTION:-block:block}
# Nodes may be of several kinds, and what is compiled for one runs on no other: not in the home.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-${TMPDIR:-/tmp}/torch_extensions_$UID}
ulimit -Sc 0    # no core file of every rank when a collective is given up

# The signal ahead of the time limit comes to this script alone: one that enters a step reaches every
# process of it, compilers and loaders' workers too. Rank 0 runs on this node and sees the file.
folder=$(mktemp -d) || folder=$(mktemp -d -p "$PWD" .job-XXXXXX) || exit
export ELIP_STOP_FILE=$folder/stop ELIP_BEAT_FILE=$folder/beat
trap 'say "the time is nearly over: asking the ranks to save"; : > "$ELIP_STOP_FILE"' USR2
trap 'rm -rf "$folder"' EXIT

say() { echo "$(date +%T) $*"; }

# words_of FILE: in an array, sets `words` to those of the line that has this element's number.
words_of() {
    local line
    : "${SLURM_ARRAY_TASK_ID:?give sbatch --array=1-N}"
    line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
    if [ -z "$line" ]; then say "error: $1 has no line $SLURM_ARRAY_TASK_ID"; exit 2; fi
    eval "words=($line)"
}

# step COMMAND...: one process for each task. Returns the highest status of them. The run's folder,
# its newest checkpoint at the start and its end are the lines of ELIP_BEAT_FILE then (elip_ds/run.py).
steps=0
step() {
    say "start $start of job $job: $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST," \
        "meeting at $MASTER_ADDR:$MASTER_PORT"
    : > "$ELIP_BEAT_FILE"
    # When the first task has ended the others are not killed at once: when all refuse a setting, the
    # status shall be theirs. srun does not take --cpus-per-task over from the job. It runs in the
    # background, because a trap waits for what runs in the foreground. What it says is kept.
    {
        # shellcheck disable=SC2086    # WRAP is words
        srun --export=ALL --kill-on-bad-exit=0 --wait="$LINGER_SECONDS" \
            --cpus-per-task="$cpus" $WRAP "$@" 2>&1 >&3 | tee "$folder/said" >&2
    } 3>&1 &
    watch_step $! "$SLURM_JOB_ID.$steps"
    steps=$((steps + 1))
    wait "$running"
}

# watch_step PROCESS ID: until the step is over; ends it when rank 0 has done no step for too long, or
# has ended long ago. Time is counted here, not read: a job that was suspended has not stalled.
watch_step() {
    local tick=$((LINGER_SECONDS / 10 + 1)) still=0 seen='' now limit
    running=$1
    while kill -0 "$running" 2> /dev/null; do
        sleep "$tick" &
        wait -n "$running" $!    # which returns at each signal, too
        now=$(stat -c %y "$ELIP_BEAT_FILE" 2> /dev/null)
        if [ "$now" = "$seen" ]; then still=$((still + tick)); else still=0; fi
        seen=$now limit=$STALL_SECONDS
        if [ -n "$(told 3)" ]; then limit=$((2 * LINGER_SECONDS)); fi
        if [ ! -s "$ELIP_BEAT_FILE" ] || [ "$still" -lt "$limit" ]; then continue; fi
        if [ $((still - limit)) -lt "$tick" ]; then
            say "nothing from rank 0 for $still s: ending step $2"
            scancel --signal=KILL "$2"
        elif [ $((still - limit)) -ge 10 ]; then
            pkill -KILL -P "$running" -x srun    # its daemons have died, and it never hears of it
        fi
    done
}

told() { sed -n "$1p" "$ELIP_BEAT_FILE"; }

# train WORD...: train.py with these words, to its end; asks Slurm for another start when it was
# stopped, and when it failed and another start goes on from a checkpoint, or with a smaller
# micro-batch. Ends the script.
train() {
    local status
    # What fits is found before the training step, and remembered for it and for later starts.
    if [ "$start" = 0 ] && [[ " $* " != *" batching.micro_batch_size="[0-9]* ]]; then
        step python -m elip_ds.launch probe --deepspeed "$DEEPSPEED" "$@" || exit
    fi
    : > "$folder/begun"
    step python elip_ds/train.py --deepspeed "$DEEPSPEED" "$@"
    status=$?
    case $(told 3) in
        done) exit 0 ;;
        stopped)
            if [ ! -e "$ELIP_STOP_FILE" ]; then
                say "the ranks stopped where nobody asked: signalled, or a step daemon has died"
            fi
            again
            exit
            ;;
    esac
    # Refused: it would be refused again. Where a start of this job was not, and saved, it is the
    # node or a file system.
    if [ "$status" = 2 ] && { [ "$start" = 0 ] || [ "$(told 2)" = none ]; }; then exit 2; fi
    if [ "$status" = 0 ]; then status=1; fi
    recover "$status" || exit
    exit "$status"
}

# again [NODES]: put the job back into the queue, to do without these nodes; 75 where Slurm will not.
# Slurm signals the script and all that it runs at once.
again() {
    trap '' TERM
    if ! scontrol requeue "$job"; then
        say "not requeued (sbatch --requeue, where the cluster allows it): submit it again"
        return 75
    fi
    if [ -n "${1:-}" ] && ! scontrol update "JobId=$job" "ExcNodeList=$1"; then
        say "$1 could not be excluded: the job starts where Slurm puts it"
    fi
}

# nodes_but NODES: how many others of the partition are neither down nor drained.
nodes_but() {
    sinfo --noheader --partition="$SLURM_JOB_PARTITION" --Node --format='%N %T' |
        grep -v -e ' down' -e ' drain' -e ' fail' | cut -d ' ' -f 1 | sort -u |
        grep -cvxF -f <(scontrol show hostnames "$1")
}

# recover STATUS: after a failure start again, but only from a checkpoint, or with a smaller
# micro-batch, and not for ever. Which node failed first stays in the run's folder. 75 where Slurm
# will not.
recover() {
    local run node='' failures others exclude='' short='' latest
    run=$(told 1)
    # As it was at the start, where the file system does not answer.
    latest=$(cat "$run/ckpt/latest" 2> /dev/null || told 2)
    # A rank whose memory ran out says so there, and on which answers of the launcher its batch was
    # built: then the next start takes fewer samples at once.
    if [ -n "$run" ]; then
        short=$(find "$run/memory" -name 'oom-*.json' -newer "$folder/begun" \
            -exec grep -l '"fingerprints": \["' {} + 2> /dev/null)
    fi
    if grep -q "oom.kill event" "$folder/said"; then
        say "the kernel ended a rank or a loader's worker: ask for more memory, or lower data.workers"
    fi
    if [ -z "$run" ]; then
        say "failed with status $1 before any rank had opened the run's folder: not starting again"
        return
    fi
    if [ -z "$short" ] && [ "$latest" = none ]; then
        say "failed with status $1, and there is no checkpoint: not starting again"
        return
    fi
    failures=$run/failures-$job
    # Not where a node never answered: srun names only those whose ranks have lost their peer by it.
    # Nor where all refuse to go on: what they read is not there.
    if [ -n "$short" ]; then
        node=memory
    elif [ "$1" != 2 ] && [ "$1" != 14 ] && ! grep -q -e "^srun: error: Timed out waiting for job step" \
        -e "collective operation timeout" -e "Timed out waiting [0-9]*ms" "$folder/said"; then
        node=$(sed -n 's/^srun: error: \([^ :]*\): tasks\{0,1\} .*/\1/p' "$folder/said" | head -n 1)
    fi
    echo "${node:-unknown} $(date +%FT%T) start $start status $1 at $latest" >> "$failures"
    if [ "$(wc -l < "$failures")" -ge "$MAX_TRIES" ]; then
        say "failed with status $1, $MAX_TRIES times by now: not starting again"
        return
    fi
    if [ -z "$short" ] && [ "$(grep -v '^memory ' "$failures" | tail -n "$STUCK_AFTER" |
        grep -c " at $latest\$")" -ge "$STUCK_AFTER" ]; then
        say "failed with status $1, for the $STUCK_AFTER. time from $latest: not starting again"
        return
    fi
    if [ -n "$short" ]; then
        say "memory ran out ($run/memory): starting again with a smaller micro-batch"
        again
        return
    fi
    if [ -n "$node" ] && [ "$(grep -c "^$node " "$failures")" -ge "$EXCLUDE_AFTER" ]; then
        others=$(scontrol show job "$job" --oneliner | sed -n 's/.* ExcNodeList=\([^( ]*\).*/\1/p')
        exclude=$node${others:+,$others}
        say "$node failed first in $EXCLUDE_AFTER starts of this job ($failures): doing without it"
        # Slurm would hold the job for good.
        if [ "$(nodes_but "$exclude")" -lt "$SLURM_JOB_NUM_NODES" ]; then
            say "no, $SLURM_JOB_PARTITION has too few others: look at $node, or give the job fewer"
            exclude=''
        fi
    fi
    say "failed with status $1${node:+, $node first}: starting again from $latest"
    again "$exclude"
}

#!/bin/bash
# Score a run or a checkpoint on held-out pairs, in one process:
#   sbatch --gpus=1 slurm/eval.sh runs/mine --json
#   sbatch --dependency=afterok:JOB slurm/eval.sh runs/mine         # once that job has ended well
#SBATCH --job-name=eval --nodes=1 --ntasks=1 --time=4:00:00

cd "$SLURM_SUBMIT_DIR" || exit    # Slurm runs a copy of this file
. slurm/common.sh || exit

step python elip_ds/eval.py "$@"

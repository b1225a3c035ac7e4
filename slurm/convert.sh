#!/bin/bash
# Convert weights, as tools/convert_weights.py does:
#   sbatch --dependency=afterok:JOB slurm/convert.sh --from elip_ds runs/mine --to albef --out mine.pth
#SBATCH --job-name=convert --nodes=1 --ntasks=1 --time=1:00:00

cd "$SLURM_SUBMIT_DIR" || exit    # Slurm runs a copy of this file
. slurm/common.sh || exit

step python tools/convert_weights.py "$@"

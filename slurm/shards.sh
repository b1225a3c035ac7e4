#!/bin/bash
# Make shards of raw data sets, one for each element of an array: a line of the file has what
# tools/make_shards.py is to be told (folder and prefix of its own), quoted as in a shell.
#   karpathy file=dataset_coco.json images=coco --out shards/coco --prefix train --resize 384
#   img2dataset folder=cc3m --out shards/cc3m --dedup
#   sbatch --array=1-2 --cpus-per-task=16 slurm/shards.sh shards.txt
# Shards are whole or not there: an element that was stopped goes on with those that are missing.
#SBATCH --job-name=shards --nodes=1 --ntasks=1 --cpus-per-task=4 --time=24:00:00
#SBATCH --requeue --open-mode=append

cd "$SLURM_SUBMIT_DIR" || exit    # Slurm runs a copy of this file
. slurm/common.sh || exit

words_of "${1:?name a file with a line for each element}"
step python tools/make_shards.py --workers "$SLURM_CPUS_PER_TASK" "${words[@]}"

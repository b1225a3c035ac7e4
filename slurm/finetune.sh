#!/bin/bash
# Go on from the weights of a run that has ended, on other data and by a schedule of its own:
#   FROM=runs/albef_4m sbatch slurm/finetune.sh run.name=coco 'data.train=/data/coco/train-*.tar' 'data.val=/data/coco/val-*.tar'
# PRESET is the one that the weights were trained by. The rate and the length are small ones to begin
# with, for all presets but meter_4m, which was trained at this rate; any key=value that follows the
# script changes them.
#SBATCH --job-name=finetune --nodes=2 --ntasks-per-node=1
#SBATCH --time=24:00:00 --signal=B:USR2@120
#SBATCH --requeue --open-mode=append

cd "$SLURM_SUBMIT_DIR" || exit    # Slurm runs a copy of this file
. slurm/common.sh || exit

train preset="${PRESET:-albef_4m}" run.name=finetuned checkpoint.every_minutes=30 \
    model.init_from="[${FROM:?name a run, a checkpoint or a file of weights}]" \
    optim.lr=1e-5 schedule.min_lr=1e-6 schedule.warmup="0 samples" schedule.length="5 epochs" "$@"

#!/bin/bash
# What fits on these nodes, and nothing else: by real steps, unless the plan alone says that there is
# room in plenty or an answer is remembered. Ask for what the run will have:
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 slurm/plan.sh data.root=/data
# The answer is in the log and in the run's plan.json, and is remembered for the run. Without any node:
#   python -m elip_ds.launch plan preset=albef_4m --deepspeed ds_configs/z2.json --device-memory a100-80 --ranks 32
#SBATCH --job-name=plan --nodes=2 --ntasks-per-node=1 --time=1:00:00

cd "$SLURM_SUBMIT_DIR" || exit    # Slurm runs a copy of this file
. slurm/common.sh || exit

step python -m elip_ds.launch probe --deepspeed "$DEEPSPEED" preset="${PRESET:-albef_4m}" "$@"

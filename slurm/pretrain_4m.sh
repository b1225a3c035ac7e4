#!/bin/bash
# Pre-train, by ALBEF's recipe unless told otherwise. Submit it in the repository's folder:
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 slurm/pretrain_4m.sh \
#       data.root=/data model.init_from=[deit_base_patch16_224.pth,bert-base-uncased.safetensors]
#   PRESET=blip_4m sbatch [as above] slurm/pretrain_4m.sh [as above] run.name=mine   # any key=value follows
#   sbatch slurm/pretrain_4m.sh preset=demo                         # two nodes of any cluster, no GPU
#   SWEEP=rates.txt sbatch --array=1-3 slurm/pretrain_4m.sh         # a line each: run.name=a optim.lr=1e-4
# A task is a rank: on nodes with GPUs ask for as many tasks as GPUs. No line here asks for GPUs,
# since a cluster that does not count them would refuse the job.
#SBATCH --job-name=pretrain --nodes=2 --ntasks-per-node=1
#SBATCH --time=24:00:00 --signal=B:USR2@120
#SBATCH --requeue --open-mode=append

cd "$SLURM_SUBMIT_DIR" || exit    # Slurm runs a copy of this file
. slurm/common.sh || exit

words=()
if [ -n "${SWEEP:-}" ]; then words_of "$SWEEP"; fi
train preset="${PRESET:-albef_4m}" checkpoint.every_minutes=30 "$@" "${words[@]}"

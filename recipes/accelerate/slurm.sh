#!/bin/bash
# Two machines with 8 GPUs each, under SLURM: one torchrun on each machine starts 8 processes. sbatch recipes/accelerate/slurm.sh RECIPE
# Where one machine's torchrun fails, those of the others are ended too. Two minutes before its time is over every process gets SIGTERM, finishes its step and saves; the same command goes on.
#SBATCH --job-name=llmkd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -eu
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint "$first:29500" --rdzv_id "$SLURM_JOB_ID" \
    -m llmkd train --config "$1" --train.shard full --resume

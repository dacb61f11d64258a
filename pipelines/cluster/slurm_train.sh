#!/bin/bash
# Stage two on several nodes: torchrun starts one rank per GPU on each.
#
#   sbatch --nodes=2 pipelines/cluster/slurm_train.sh shards/ --model vitds --name big
#
# Tried: Slurm 22.05 with two nodes on one machine without GPUs (gloo), one of them lost in mid-run;
# Slurm started the job again, and it gave the numbers of an undisturbed run (tests/long/slurm.py).
# Not tried: GPUs, nccl. A job that was preempted continues where it stopped when it is submitted
# again with the same --name.
#
#SBATCH --job-name=ci2p-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-4}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head_node:29500" \
    -m ci2p_cache train "$@"

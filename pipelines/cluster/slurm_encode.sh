#!/bin/bash
# Stage one as a Slurm job array: each task encodes its part of the shards, the last one finalises.
#
#   sbatch --array=1-16 pipelines/cluster/slurm_encode.sh imagenet/ shards/ [options of encode]
#
# Tried: Slurm 22.05 with four nodes on one machine without GPUs, one of them drained and one lost in
# mid-run; the result has the bytes of one process (tests/long/slurm.py). Not tried: GPUs.
# A task that was killed is submitted again with the same array; what is committed is not encoded
# again. `ci2p-cache status shards/` says what is left and who works on it.
#
#SBATCH --job-name=ci2p-encode
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
source_images=$1 out=$2
shift 2
# exec: Slurm's SIGTERM reaches the command itself, which drops the shard in flight and exits 143.
exec ci2p-cache encode "$source_images" --out "$out" --shard-range auto "$@"

#!/bin/bash
# The same job on CPU nodes, from a checkpoint of a small model (RA3_CHECKPOINT), on the problems of HopProg.
#   RA3_CHECKPOINT=RUN/checkpoints/mstep-1/final sbatch slurm/rlvr_tiny_cpu.sh [KEY=VALUE …]
#SBATCH --job-name=rlvr_tiny_cpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.txt
RA3_SCRIPT=${RA3_SCRIPT:-$(scontrol show job "$SLURM_JOB_ID" -o | sed -n 's/.* Command=\([^ ]*\).*/\1/p')}
VERB=rlvr
CONFIG=examples/rlvr-hopprog.yaml
SETTINGS=(parallel.threads=1)
ARGUMENTS=("$@")
. "${RA3_HOME:-$(dirname "$RA3_SCRIPT")/..}/slurm/body.sh"

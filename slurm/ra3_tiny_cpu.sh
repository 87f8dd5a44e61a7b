#!/bin/bash
# The same job on CPU nodes, with a model of 2M parameters: tries out a cluster, and what happens when things fail.
#   sbatch slurm/ra3_tiny_cpu.sh [KEY=VALUE …]
#SBATCH --job-name=ra3_tiny_cpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.txt
RA3_SCRIPT=${RA3_SCRIPT:-$(scontrol show job "$SLURM_JOB_ID" -o | sed -n 's/.* Command=\([^ ]*\).*/\1/p')}
CONFIG=examples/quickstart.yaml
SETTINGS=(parallel.pipeline=2 parallel.threads=1)
ARGUMENTS=("$@")
. "${RA3_HOME:-$(dirname "$RA3_SCRIPT")/..}/slurm/body.sh"

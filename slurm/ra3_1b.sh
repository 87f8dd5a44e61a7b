#!/bin/bash
# RA3 of Llama-3.2-1B on 2 nodes of 8 H100.
#   RA3_MODEL=DIR RA3_DATA='DIR/*.parquet' sbatch slurm/ra3_1b.sh [KEY=VALUE …]
# FP8: model.precision=fp8_tensorwise behind the script's name.
# docs/clusters.md explains the variables; `ra3 launch slurm/ra3_1b.sh --dry-run` shows what would run, memory and step time.
#SBATCH --job-name=ra3_1b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gres=gpu:8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.txt
RA3_SCRIPT=${RA3_SCRIPT:-$(scontrol show job "$SLURM_JOB_ID" -o | sed -n 's/.* Command=\([^ ]*\).*/\1/p')}
RA3_GRACE=${RA3_GRACE:-540}
CONFIG=examples/mid_training.yaml
MODEL=Llama-3.2-1B
SETTINGS=(mstep.micro_batch_size=4 estep.micro_batch_size=4 mstep.optimizer.learning_rate=2e-5)
ARGUMENTS=("$@")
. "${RA3_HOME:-$(dirname "$RA3_SCRIPT")/..}/slurm/body.sh"

#!/bin/bash
# RLVR (GRPO) of an 8B model on 4 nodes of 8 H100, vLLM on the same GPUs, from a checkpoint of slurm/ra3_8b.sh.
#   RA3_CHECKPOINT=RUN/checkpoints/mstep-2/final RA3_PROBLEMS=problems.jsonl sbatch slurm/rlvr_8b.sh [KEY=VALUE …]
# From the Hugging Face model itself: RA3_MODEL=DIR instead of RA3_CHECKPOINT. bubblewrap must be installed on the nodes.
# docs/rlvr.md and docs/clusters.md explain the rest.
#SBATCH --job-name=rlvr_8b
#SBATCH --nodes=4
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
VERB=rlvr
CONFIG=examples/rlvr.yaml
SETTINGS=(parallel.tensor=2 parallel.sequence=true rollout.vllm.tensor=2)
ARGUMENTS=("$@")
. "${RA3_HOME:-$(dirname "$RA3_SCRIPT")/..}/slurm/body.sh"

#!/bin/bash
# Evaluation of a model on one node (`ra3 eval`); a job that is requeued uses the samples that it has again.
#   sbatch slurm/eval.sh --checkpoint RUN/checkpoints/mstep-2/final --suite humaneval,mbpp --data DIR --out DIR --mode both
#   sbatch --gres=gpu:4 slurm/eval.sh --hf DIR --suite gsm8k --out DIR --engine vllm --set rollout.vllm.tensor=4
# Without GPUs: sbatch --gres=none slurm/eval.sh …   bubblewrap and `make install-eval` must be there (docs/evaluation.md).
#SBATCH --job-name=ra3_eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --gres=gpu:1
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
RA3_SCRIPT=${RA3_SCRIPT:-$(scontrol show job "$SLURM_JOB_ID" -o | sed -n 's/.* Command=\([^ ]*\).*/\1/p')}
. "${RA3_HOME:-$(dirname "$RA3_SCRIPT")/..}/slurm/site_setup.sh"
exec "${SRUN[@]}" ra3 eval "$@"

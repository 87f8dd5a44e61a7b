#!/bin/bash
# Conversion on one CPU node; a job that is requeued goes on where it was.
#   sbatch slurm/convert.sh hf-to-megatron --hf DIR --out DIR [--workers N]
#   sbatch slurm/convert.sh megatron-to-hf --checkpoint DIR --out DIR
#   sbatch slurm/convert.sh check --hf DIR --checkpoint DIR
#SBATCH --job-name=ra3_convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
RA3_SCRIPT=${RA3_SCRIPT:-$(scontrol show job "$SLURM_JOB_ID" -o | sed -n 's/.* Command=\([^ ]*\).*/\1/p')}
. "${RA3_HOME:-$(dirname "$RA3_SCRIPT")/..}/slurm/site_setup.sh"
exec "${SRUN[@]}" ra3 convert "$@"

# Where the checkout is, and what the site adds to it: the scripts beside this file source it, or body.sh, which does.
# It sets RA3_HOME, PATH and SRUN, the command that starts processes. Variables: see body.sh.

set -uo pipefail

say() { printf '%s  %s\n' "$(date +%FT%T)" "$*"; }
mistake() {
  say "$*"
  exit 2
}

# The checkout is where the submitted script lies: sbatch copies the script, but remembers where from.
if [ -z "${RA3_HOME:-}" ]; then
  RA3_HOME=$(cd "$(dirname "$RA3_SCRIPT")/.." && pwd)
fi
export RA3_HOME
[ -f "$RA3_HOME/slurm/site.sh" ] && . "$RA3_HOME/slurm/site.sh"
RA3_RUNS=${RA3_RUNS:-$RA3_HOME/runs}

RA3_VENV=${RA3_VENV:-$RA3_HOME/.venv}
[ -x "$RA3_VENV/bin/ra3" ] && PATH=$RA3_VENV/bin:$PATH
# shellcheck disable=SC2206  # several options
SRUN=(srun --kill-on-bad-exit=1 ${RA3_SRUN:-})
[ -n "${RA3_CONTAINER:-}" ] && SRUN+=(--container-image="$RA3_CONTAINER" --container-mounts="${RA3_MOUNTS:-$RA3_HOME,$RA3_RUNS}")
# srun does not take it from the job by itself
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
if [ -z "${RA3_RENDER:-}" ]; then
  if [ -n "${RA3_MODULES:-}" ]; then
    # shellcheck disable=SC2086  # several modules
    module load $RA3_MODULES
  fi
  if [ -z "${RA3_CONTAINER:-}" ] && ! command -v ra3 >/dev/null; then
    mistake "ra3 is not installed: neither $RA3_VENV/bin/ra3 nor ra3 on PATH; set RA3_VENV (slurm/site.sh)"
  fi
fi

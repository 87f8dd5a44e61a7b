# What every job here does; the scripts beside this file source it. It runs in the batch shell, on the job's first node.
#
# A script sets, before it sources this file:
#   CONFIG     configuration, relative to the checkout or absolute
#   SETTINGS   array of overrides, the layout among them; arguments behind the script's name come after these and win
#
# Sites differ in what site.sh (from site.example.sh) or the environment sets; everything has a default:
#   RA3_VENV        virtual environment with ra3                        (the checkout's .venv, if it is there)
#   RA3_MODULES     modules to load before, separated by spaces
#   RA3_CONTAINER   image for srun --container-image (pyxis); RA3_MOUNTS for --container-mounts
#   RA3_RUNS        shared folder of runs                               (runs in the checkout)
#   RA3_RUN_DIR     folder of this run                                  ($RA3_RUNS/NAME-JOB)
#   RA3_RETRIES     attempts after a failure, in all                    (3)
#   RA3_GRACE       seconds that a stop may take before a requeue       (100)
#   MASTER_ADDR, MASTER_PORT   rendezvous                               (the first node's address; from the job's number)
# Partition, account, qos, …: sbatch reads SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS itself.
#
# Exit code 0: the run is finished. 2: what no retry mends (a mistake in the configuration, a full disk, a loss that
# diverged). 1: failed after all attempts.

set -uo pipefail

say() { printf '%s  %s\n' "$(date +%FT%T)" "$*"; }

# The checkout is where the submitted script lies: sbatch copies the script, but remembers where from.
if [ -z "${RA3_HOME:-}" ]; then
  RA3_HOME=$(cd "$(dirname "$RA3_SCRIPT")/.." && pwd)
fi
export RA3_HOME
[ -f "$RA3_HOME/slurm/site.sh" ] && . "$RA3_HOME/slurm/site.sh"

if [ -n "${RA3_MODULES:-}" ]; then
  # shellcheck disable=SC2086  # several modules
  module load $RA3_MODULES
fi
RA3_VENV=${RA3_VENV:-$RA3_HOME/.venv}
[ -x "$RA3_VENV/bin/ra3" ] && PATH=$RA3_VENV/bin:$PATH
if [ -z "${RA3_CONTAINER:-}" ] && ! command -v ra3 >/dev/null; then
  say "ra3 is not installed: neither $RA3_VENV/bin/ra3 nor ra3 on PATH; set RA3_VENV (slurm/site.sh)"
  exit 2
fi

# One run, however often the job is requeued: its number stays.
RA3_RUNS=${RA3_RUNS:-$RA3_HOME/runs}
RA3_RUN_DIR=${RA3_RUN_DIR:-$RA3_RUNS/$SLURM_JOB_NAME-$SLURM_JOB_ID}
LOGS=$RA3_RUN_DIR.logs
if ! mkdir -p "$LOGS"; then
  say "$LOGS cannot be written: set RA3_RUNS or RA3_RUN_DIR to a folder that all nodes share"
  exit 2
fi

# Names of nodes need not resolve here; Slurm knows their addresses.
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "$FIRST" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT
export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

STEP=
STOPPING=
pass_on() { # the time limit is near, or the job is preempted: srun hands the signal to every process
  STOPPING=$1
  say "SIG$1: asking the run to save and stop"
  [ -n "$STEP" ] && kill -"$1" "$STEP" 2>/dev/null
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

attempt() { # attempt NUMBER: one srun over all nodes; its exit code
  local logs launch=()
  logs=$LOGS/$(printf 'attempt-%03d' "$1")
  mkdir -p "$logs"
  ln -sfn "$(basename "$logs")" "$LOGS/latest"
  [ -n "${RA3_CONTAINER:-}" ] && launch+=(--container-image="$RA3_CONTAINER" --container-mounts="${RA3_MOUNTS:-$RA3_HOME,$RA3_RUNS}")
  say "attempt $1 on $SLURM_JOB_NODELIST: $SLURM_NTASKS processes, logs in $logs"
  cd "$RA3_HOME" || return 2
  srun --kill-on-bad-exit=1 --output="$logs/rank-%t.txt" "${launch[@]}" \
    ra3 train "$CONFIG" --resume --run-dir "$RA3_RUN_DIR" "${SETTINGS[@]}" "${ARGUMENTS[@]}" &
  STEP=$!
  local code deadline=
  while :; do # a trapped signal ends `wait` before srun has ended
    wait "$STEP"
    code=$?
    kill -0 "$STEP" 2>/dev/null || break
    if [ -n "$STOPPING" ] && [ -z "$deadline" ]; then
      deadline=1
      (sleep "${RA3_GRACE:-100}" && kill -KILL "$STEP") 2>/dev/null &
    fi
  done
  STEP=
  # the first process that ends makes Slurm end the others, so srun's exit code need not be that of a stop
  [ "$code" -ne 0 ] && grep -q '^stopped by SIG' "$logs/rank-0.txt" 2>/dev/null && code=75
  # … or of a mistake: of what ra3 says as it ends, that alone does not go on
  [ "$code" -ne 0 ] && grep -s '^ra3: ' "$logs/rank-0.txt" | grep -qv -e '--resume goes on$' && code=2
  return "$code"
}

requeue() { # give the nodes back and go on later
  say "requeueing: $1"
  scontrol requeue "$SLURM_JOB_ID" || say "this job may not be requeued: submit it again with RA3_RUN_DIR=$RA3_RUN_DIR"
  exit 0
}

number=$(find "$LOGS" -maxdepth 1 -name 'attempt-*' | wc -l)
touch "$LOGS/failures"
failures=0
while :; do
  number=$((number + 1))
  attempt "$number"
  code=$?
  case $code in
    0)
      say "finished: $RA3_RUN_DIR"
      exit 0
      ;;
    2)
      say "a mistake that no retry mends, or a full disk (exit code 2): see $LOGS/latest/rank-0.txt"
      say "nothing that was saved is lost: mend it and submit again with RA3_RUN_DIR=$RA3_RUN_DIR"
      exit 2
      ;;
  esac
  [ -n "$STOPPING" ] && requeue "stopped by SIG$STOPPING (exit code $code)"
  [ "$code" -eq 75 ] && requeue "the run was asked to stop"
  echo "attempt $number: exit code $code" >>"$LOGS/failures"
  failures=$((failures + 1)) # a full disk may hold no line of it
  counted=$(wc -l <"$LOGS/failures")
  [ "$counted" -gt "$failures" ] && failures=$counted
  say "attempt $number failed with exit code $code ($failures of $((${RA3_RETRIES:-3} + 1))): see $LOGS/latest"
  if [ "$failures" -gt "${RA3_RETRIES:-3}" ]; then
    say "no attempts are left"
    exit 1
  fi
  sleep 2
done

# What every training job here does; the scripts beside this file source it. It runs in the batch shell, on the job's first node.
#
# A script sets, before it sources this file:
#   CONFIG     configuration, relative to the checkout or absolute
#   SETTINGS   array of overrides; arguments behind the script's name come after these and win
#   MODEL      (GPU nodes) name of a Hugging Face folder, such as Llama-3.1-8B
#   VERB       what of ra3 it runs: train, or rlvr                      (train)
# parallel.data is set here: as many replicas of the model as the job's processes hold.
#
# Sites differ in what site.sh (from site.example.sh) or the environment sets; everything else has a default:
#   RA3_HOME        this checkout                                       (found by the script's path)
#   RA3_MODEL       folder of the Hugging Face model                    ($RA3_MODELS/$MODEL)
#   RA3_MODELS      folder of such folders
#   RA3_DATA        corpus.path: files with the expert's code           (none: what the configuration says)
#   RA3_CHECKPOINT  (rlvr) checkpoint folder that RLVR starts from      (none: RA3_MODEL, or what the configuration says)
#   RA3_PROBLEMS    (rlvr) rlvr.problems.path: jsonl file of problems   (none: what the configuration says)
#   RA3_CONFIG      configuration instead of the script's
#   RA3_ROLLOUT_NODES  the last nodes of the job run vLLM alone         (0: vLLM runs on the trainer's GPUs)
#   RA3_ENGINES_PER_NODE  engines that each of them takes               (tasks of a node / rollout.vllm.tensor)
#   RA3_VENV        virtual environment with ra3                        (the checkout's .venv, if it is there)
#   RA3_MODULES     modules to load before, separated by spaces
#   RA3_CONTAINER   image for srun --container-image (pyxis); RA3_MOUNTS for --container-mounts ($RA3_HOME,$RA3_RUNS)
#   RA3_SRUN        further options of srun, separated by spaces
#   RA3_RUNS        shared folder of runs                               (runs in the checkout)
#   RA3_RUN_DIR     folder of this run                                  ($RA3_RUNS/NAME-JOB)
#   RA3_RETRIES     attempts after a failure, in all of a job           (3)
#   RA3_PREFLIGHT   0: train without a check of the nodes before         (1)
#   RA3_PREFLIGHT_OPTIONS   options of ra3 preflight, separated by spaces
#   RA3_GRACE       seconds that a stop may take before a requeue       (100; on GPU nodes 540)
#   MASTER_ADDR, MASTER_PORT   rendezvous                               (the first node's address; from the job's number)
# Partition, account, qos, …: sbatch reads SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS itself.
#
# Exit code 0: the run is finished, or the job is requeued. 2: what no retry mends (a mistake in the configuration, a full disk, a loss that
# diverged). 1: failed after all attempts, stopped and not requeued, four time limits with nothing saved, or the nodes are not fit to train on.
# With RA3_RENDER set it prints what it would run, and runs nothing (`ra3 launch` reads that).

. "${RA3_HOME:-$(dirname "$RA3_SCRIPT")/..}/slurm/site_setup.sh"
CONFIG=${RA3_CONFIG:-$CONFIG}
VERB=${VERB:-train}

if [ -n "${MODEL:-}" ]; then
  RA3_MODEL=${RA3_MODEL:-${RA3_MODELS:+$RA3_MODELS/$MODEL}}
  [ -n "$RA3_MODEL" ] || mistake "RA3_MODEL is not set: the folder of the Hugging Face model $MODEL (or RA3_MODELS, the folder that holds it)"
  SETTINGS=("model.hf=$RA3_MODEL" "${SETTINGS[@]}")
fi
if [ "$VERB" = rlvr ]; then
  SETTINGS+=(method=rlvr)
  if [ -n "${RA3_CHECKPOINT:-}" ]; then
    SETTINGS+=("rlvr.checkpoint=$RA3_CHECKPOINT")
  elif [ -n "${RA3_MODEL:-}" ]; then
    SETTINGS+=("model.hf=$RA3_MODEL")
  fi
  [ -z "${RA3_PROBLEMS:-}" ] || SETTINGS+=("rlvr.problems.path=$RA3_PROBLEMS")
fi
setting() { # setting KEY DEFAULT: its value among the overrides
  local value=$2 each
  for each in "${SETTINGS[@]}" "${ARGUMENTS[@]}"; do
    [ "${each%%=*}" = "$1" ] && value=${each#*=}
  done
  printf %s "$value"
}
if [ -n "${RA3_DATA:-}" ] && [ "$VERB" = train ]; then
  SETTINGS+=("corpus.path=$RA3_DATA")
elif [ -n "${MODEL:-}" ] && [ -z "${RA3_CONFIG:-}$(setting corpus.path "")$(setting corpus.source "")" ]; then
  mistake "RA3_DATA is not set: files with the code to train on, such as /shared/python/*.parquet"
fi

# Processes of the trainer, and the replicas of the model that they hold.
ROLLOUT_NODES=${RA3_ROLLOUT_NODES:-0}
PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
TRAIN_NODES=$((SLURM_JOB_NUM_NODES - ROLLOUT_NODES))
[ "$TRAIN_NODES" -gt 0 ] || mistake "RA3_ROLLOUT_NODES=$ROLLOUT_NODES leaves no node to train on: the job has $SLURM_JOB_NUM_NODES"
TRAINERS=$((TRAIN_NODES * PER_NODE))
REPLICA=$(($(setting parallel.tensor 1) * $(setting parallel.pipeline 1) * $(setting parallel.context 1)))
[ $((TRAINERS % REPLICA)) -eq 0 ] || mistake "$TRAINERS processes on $TRAIN_NODES nodes hold no whole number of replicas of $REPLICA (parallel.tensor * pipeline * context): change --nodes or the layout"
[ -n "$(setting parallel.data "")" ] || SETTINGS+=("parallel.data=$((TRAINERS / REPLICA))")
if [ "$ROLLOUT_NODES" -gt 0 ]; then
  ENGINES_PER_NODE=${RA3_ENGINES_PER_NODE:-$((PER_NODE / $(setting rollout.vllm.tensor 1)))}
  ENGINES=$((ROLLOUT_NODES * ENGINES_PER_NODE))
  [ "$ENGINES" -gt 0 ] || mistake "rollout.vllm.tensor=$(setting rollout.vllm.tensor 1): an engine needs more than the $PER_NODE GPUs of a node"
  SETTINGS+=(rollout.engine=vllm rollout.placement=nodes)
  [ -n "$(setting rollout.replicas "")" ] || SETTINGS+=("rollout.replicas=$ENGINES")
fi

# One run, however often the job is requeued: its number stays.
RA3_RUN_DIR=${RA3_RUN_DIR:-$RA3_RUNS/$SLURM_JOB_NAME-$SLURM_JOB_ID}
LOGS=$RA3_RUN_DIR.logs

TRAIN=(ra3 "$VERB" "$CONFIG" --resume --run-dir "$RA3_RUN_DIR" "${SETTINGS[@]}" "${ARGUMENTS[@]}")

if [ -n "${RA3_RENDER:-}" ]; then
  printf '%s\0' "home=$RA3_HOME" "verb=$VERB" "config=$CONFIG" "run_dir=$RA3_RUN_DIR" "logs=$LOGS" "trainers=$TRAINERS" \
    "train_nodes=$TRAIN_NODES" "rollout_nodes=$ROLLOUT_NODES" "srun=${SRUN[*]}"
  printf 'setting=%s\0' "${SETTINGS[@]}" "${ARGUMENTS[@]}"
  exit 0
fi

mkdir -p "$LOGS" || mistake "$LOGS cannot be written: set RA3_RUNS or RA3_RUN_DIR to a folder that all nodes share"

# Names of nodes need not resolve here; Slurm knows their addresses.
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "$FIRST" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT
export LOCAL_WORLD_SIZE=$PER_NODE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

STEP=
STOPPING=
pass_on() { # the time limit is near, or the job is preempted: srun hands the signal to every process
  STOPPING=$1
  say "SIG$1: asking the run to save and stop"
  [ -n "$STEP" ] && kill -USR1 "$STEP" 2>/dev/null # on SIGTERM, srun would end its processes at once
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

await() { # wait for the srun that was started last; its exit code
  STEP=$!
  [ -n "$STOPPING" ] && kill -USR1 "$STEP" 2>/dev/null # it came before there was anything to pass it on to
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
  return "$code"
}

UNFIT=
preflight() { # preflight FOLDER: are all nodes fit to train on? It sets UNFIT if they are not, having named them
  local code nodes
  # shellcheck disable=SC2086  # several options
  "${SRUN[@]}" --kill-on-bad-exit=0 --wait=30 --output="$1/preflight-%t.txt" \
    ra3 preflight "$CONFIG" --run-dir "$RA3_RUN_DIR" ${RA3_PREFLIGHT_OPTIONS:-} "${SETTINGS[@]}" "${ARGUMENTS[@]}" &
  await
  code=$?
  cat "$1/preflight-0.txt" 2>/dev/null
  [ "$code" -eq 0 ] || [ -n "$STOPPING" ] && return "$code"
  grep -hs '^ra3: rank [0-9]*: ' "$1"/preflight-*.txt | head -n 10 # a mistake on another node alone
  nodes=$(sed -n 's/^node \([^:]*\):.*/\1/p' "$1"/preflight-*.txt | sort -u | paste -sd ' ')
  [ -n "$nodes" ] || return "$code"
  # what others say when the first process has nothing to say any more
  grep -q '^node ' "$1/preflight-0.txt" 2>/dev/null || sed -n '/^node /p' "$1"/preflight-*.txt | sort -u | head -n 20
  say "nodes not fit to train on: $nodes"
  UNFIT=$nodes
  return 1
}

HOSTS=
host_engines() { # host_engines LOGS: a process on each rollout node, until the trainers have gone
  # one process, and all of its node's CPUs
  env -u SRUN_CPUS_PER_TASK "${SRUN[@]}" --nodes="$ROLLOUT_NODES" --ntasks="$ROLLOUT_NODES" --ntasks-per-node=1 --relative="$TRAIN_NODES" \
    --cpu-bind=none --output="$1/engines-%t.txt" \
    ra3 engines --run-dir "$RA3_RUN_DIR" --engines-per-node "$ENGINES_PER_NODE" &
  HOSTS=$!
}
end_engines() { # they end by themselves when the run is finished; else srun ends its step on SIGTERM, at once
  [ -n "$HOSTS" ] || return 0
  local deadline=$((SECONDS + ${RA3_GRACE:-100}))
  kill -TERM "$HOSTS" 2>/dev/null
  while kill -0 "$HOSTS" 2>/dev/null; do
    [ "$SECONDS" -lt "$deadline" ] || kill -KILL "$HOSTS"
    sleep 0.2
  done
  HOSTS=
}

attempt() { # attempt NUMBER: one srun over all nodes; its exit code
  local logs code
  logs=$LOGS/$(printf 'attempt-%03d' "$1")
  mkdir -p "$logs"
  ln -sfn "$(basename "$logs")" "$LOGS/latest"
  say "attempt $1 on $SLURM_JOB_NODELIST: $TRAINERS processes, logs in $logs"
  cd "$RA3_HOME" || return 2
  if [ "${RA3_PREFLIGHT:-1}" != 0 ]; then
    preflight "$logs" || return
    [ -n "$STOPPING" ] && return 75
  fi
  [ "$ROLLOUT_NODES" -gt 0 ] && host_engines "$logs"
  "${SRUN[@]}" --nodes="$TRAIN_NODES" --ntasks="$TRAINERS" --ntasks-per-node="$PER_NODE" --relative=0 \
    --output="$logs/rank-%t.txt" "${TRAIN[@]}" &
  await
  code=$?
  end_engines
  # the first process that ends makes Slurm end the others, so srun's exit code need not be that of a stop
  [ "$code" -ne 0 ] && grep -q '^stopped by SIG' "$logs/rank-0.txt" 2>/dev/null && code=75
  # … or of a mistake: of what ra3 says as it ends, that alone does not go on
  [ "$code" -ne 0 ] && grep -s '^ra3: ' "$logs/rank-0.txt" | grep -qv -e '--resume goes on$' -e '^ra3: interrupted$' && code=2
  # a mistake on another node alone, where a folder is missing, say
  [ "$code" -ne 0 ] && [ -z "$STOPPING" ] && grep -hs '^ra3: rank [0-9]*: ' "$logs"/rank-*.txt | head -n 10
  return "$code"
}

field() { # field NAME: what Slurm says of this job
  scontrol show job "$SLURM_JOB_ID" -o 2>/dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"
}
ended_by() { # why Slurm ends this job: "***" when somebody has cancelled it, else "DUE TO …"; it writes that to our stderr
  [ -f "/proc/$$/fd/2" ] && sed -n "s/.*\*\*\* JOB $SLURM_JOB_ID ON .* CANCELLED AT [^ ]* //p" "/proc/$$/fd/2" | tail -n 1
}
requeue() { # give the nodes back and go on later, unless somebody has cancelled the job
  local state restarts
  state=$(field JobState) restarts=$(field Restarts)
  if [ "$state" = COMPLETING ] || [ "$state" = CANCELLED ]; then # Slurm is about to end it; it does not say as what
    if [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
      say "Slurm requeues the job: $1"
      exit 0
    fi
    case $(ended_by) in
      DUE*) ;; # its time is over, or a site that preempts by cancelling
      *)
        say "cancelled: saved and not requeued; to go on, submit it again with RA3_RUN_DIR=$RA3_RUN_DIR"
        exit 1
        ;;
    esac
  fi
  say "requeueing: $1"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
  say "this job may not be requeued: submit it again with RA3_RUN_DIR=$RA3_RUN_DIR"
  exit 1
}

saved() { # what a run has left that it need not do again
  find "$RA3_RUN_DIR" \( -name checkpoint.json -o -name '*.stats.json' -o -name manifest.json -o -path '*/evaluations/*' \) \
    -printf '%P %T@\n' 2>/dev/null | sort | cksum
}
in_time() { # whether another time limit may help: of the last ones, one was long enough to save anything
  [ "$STOPPING" = USR1 ] || return 0 # a preemption comes at any moment
  if [ "$(saved)" != "$BEGUN" ]; then
    rm -f "$LOGS/idle"
    return 0
  fi
  echo "job $SLURM_JOB_ID: stopped by SIG$STOPPING with nothing saved" >>"$LOGS/idle"
  [ "$(wc -l <"$LOGS/idle" || echo 0)" -le 3 ] && return
  rm -f "$LOGS/idle"
  return 1
}

BEGUN=$(saved)
number=$(find "$LOGS" -maxdepth 1 -name 'attempt-*' | wc -l)
touch "$LOGS/failures"
failures=0
while :; do
  number=$((number + 1))
  attempt "$number"
  code=$?
  if [ "$code" -eq 0 ]; then
    say "finished: $RA3_RUN_DIR"
    exit 0
  elif [ "$code" -eq 2 ]; then
    say "nothing that was saved is lost: mend it and submit again with RA3_RUN_DIR=$RA3_RUN_DIR"
    mistake "a mistake that no retry mends, or a full disk (exit code 2): see $LOGS/latest"
  fi
  if [ -n "$STOPPING" ] && ! in_time; then
    say "nothing was saved within the time limit, four times in a row: submit it again with a longer --time and RA3_RUN_DIR=$RA3_RUN_DIR"
    exit 1
  fi
  [ -n "$STOPPING" ] && requeue "stopped by SIG$STOPPING (exit code $code)"
  [ "$code" -eq 75 ] && requeue "the run was asked to stop"
  if [ -n "$UNFIT" ]; then
    say "no retry on the same nodes: submit it again without them (sbatch --exclude=…) and RA3_RUN_DIR=$RA3_RUN_DIR"
    exit 1
  fi
  echo "job $SLURM_JOB_ID, attempt $number: exit code $code" >>"$LOGS/failures"
  failures=$((failures + 1)) # a full disk may hold no line of it
  counted=$(grep -c "^job $SLURM_JOB_ID," "$LOGS/failures") # through all requeues, but not of a job before this one
  [ "$counted" -gt "$failures" ] && failures=$counted
  say "attempt $number failed with exit code $code ($failures of $((${RA3_RETRIES:-3} + 1))): see $LOGS/latest"
  if [ "$failures" -gt "${RA3_RETRIES:-3}" ]; then
    say "no attempts are left"
    exit 1
  fi
  sleep 2
done

#!/usr/bin/env bash
# Train on several nodes under Slurm: the first ones run `accelerate launch`, the last ones may run vLLM servers.
#   sbatch --nodes=3 --gpus-per-node=8 scripts/slurm.sh --config FILE [--key=value ...]
#SBATCH --job-name=paretune
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
set -euo pipefail

usage() {
  cat <<'HELP'
usage: [VARIABLE=value ...] sbatch --nodes=N --gpus-per-node=G scripts/slurm.sh --config FILE [--key=value ...]

Runs `align.train --config FILE ...` with one process per GPU. To be submitted from the project's folder, which all
nodes must see.

  ACCELERATE_FILE    accelerate's configuration (configs/accelerate/zero3.yaml)
  GPUS               GPUs of a node (what Slurm says, else 8)
  SERVER_NODES       how many nodes, the last ones, run vLLM servers instead of the learner (0)
  MODEL              model of the servers: policy.model of the configuration; needed with SERVER_NODES
  TENSOR_PARALLEL    GPUs of one server (1)
  DTYPE              of the servers' weights, float32, bfloat16 or float16 (bfloat16)
  MAX_MODEL_LEN      most tokens of prompt and completion (0: the model's own)
  SYNC               how weights get to the servers: directory or transfer (directory)
  SYNC_PATH          for directory: a folder that all nodes see (runs/sync)
  PARETUNE_VLLM_KEY  what the servers ask callers for; made up when unset
  PYTHON             interpreter (.venv/bin/python)
HELP
}

fail() {
  echo "$*" >&2
  exit 2
}

joined() {
  local IFS=,
  echo "$*"
}

# One learner node.
learner() {
  exec "$PYTHON" -m accelerate.commands.launch --config_file "$ACCELERATE_FILE" --num_machines "$LEARNER_NODES" \
    --num_processes "$((LEARNER_NODES * GPUS))" --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_NODE" \
    --main_process_port "$MAIN_PORT" -m align.train "$@"
}

# One server node: a server for every TENSOR_PARALLEL GPUs. Ends when one of them is beyond help.
servers() {
  local i
  for ((i = 0; i < GPUS / TENSOR_PARALLEL; i++)); do
    server "$i" &
  done
  wait -n
}

# One server; started again when it dies, three times.
server() {
  local first=$(($1 * TENSOR_PARALLEL)) attempt
  CUDA_VISIBLE_DEVICES=$(seq -s, "$first" "$((first + TENSOR_PARALLEL - 1))")
  export CUDA_VISIBLE_DEVICES
  for attempt in 1 2 3 4; do
    echo "server $1 on ${SLURMD_NODENAME:-this node}, attempt $attempt"
    "$PYTHON" -m align.cli worker "$MODEL" --host 0.0.0.0 --port "$((SERVER_PORT + $1))" --dtype "$DTYPE" \
      --max-model-len "$MAX_MODEL_LEN" --tensor-parallel "$TENSOR_PARALLEL" --sync "$SYNC" && return
    sleep 5
  done
  return 1
}

# Starts the servers on the nodes named, and returns when all answer; their addresses are in `urls`.
start_servers() {
  local node i url
  PARETUNE_VLLM_KEY=${PARETUNE_VLLM_KEY:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')}
  export PARETUNE_VLLM_KEY # by the environment, since arguments can be seen by others
  srun --nodes="$#" --ntasks="$#" --ntasks-per-node=1 --nodelist="$(joined "$@")" bash "$SCRIPT" servers &
  servers_step=$!
  trap 'kill "$servers_step" 2>/dev/null || true' EXIT
  for node in "$@"; do
    for ((i = 0; i < GPUS / TENSOR_PARALLEL; i++)); do
      urls+=("http://$node:$((SERVER_PORT + i))")
    done
  done
  for url in "${urls[@]}"; do
    until curl --silent --fail --output /dev/null --noproxy '*' "$url/health"; do
      kill -0 "$servers_step" 2>/dev/null || fail "the servers ended before they were ready; this log says why"
      ((SECONDS < 1800)) || fail "no answer from $url within 30 minutes"
      sleep 5
    done
  done
}

main() {
  [ -n "${SLURM_JOB_NODELIST:-}" ] || fail "not in a Slurm job: start it by sbatch (--help tells how)"
  export SCRIPT=$SLURM_SUBMIT_DIR/scripts/slurm.sh # Slurm runs a copy that only the first node has
  [ -f "$SCRIPT" ] || fail "submit it from the project's folder: there is no $SCRIPT"
  cd "$SLURM_SUBMIT_DIR"
  export PYTHON=${PYTHON:-.venv/bin/python} ACCELERATE_FILE=${ACCELERATE_FILE:-configs/accelerate/zero3.yaml}
  export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}} TENSOR_PARALLEL=${TENSOR_PARALLEL:-1} MODEL=${MODEL:-}
  export DTYPE=${DTYPE:-bfloat16} MAX_MODEL_LEN=${MAX_MODEL_LEN:-0} SYNC=${SYNC:-directory}
  export MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000)) SERVER_PORT=$((30000 + SLURM_JOB_ID % 2000 * 16))
  local server_nodes=${SERVER_NODES:-0} nodes=() urls=() told=("$@")
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export LEARNER_NODES=$((${#nodes[@]} - server_nodes)) MAIN_NODE=${nodes[0]}
  ((LEARNER_NODES > 0)) || fail "SERVER_NODES=$server_nodes of ${#nodes[@]} nodes leaves none for the learner"
  if ((server_nodes > 0)); then
    [ -n "$MODEL" ] || fail "SERVER_NODES needs MODEL: what the servers start with"
    ((GPUS >= TENSOR_PARALLEL)) || fail "TENSOR_PARALLEL=$TENSOR_PARALLEL, and a node has GPUS=$GPUS"
    start_servers "${nodes[@]:LEARNER_NODES}"
    told+=(--rollout.engine.type=vllm "--rollout.engine.dtype=$DTYPE" "--rollout.engine.urls=[$(joined "${urls[@]}")]")
    case $SYNC in
      directory)
        mkdir -p "${SYNC_PATH:=$PWD/runs/sync}"
        told+=("--rollout.engine.sync={type: directory, path: $SYNC_PATH}") ;;
      transfer) told+=("--rollout.engine.sync={type: transfer, address: $MAIN_NODE}") ;;
      *) fail "SYNC=$SYNC is neither directory nor transfer" ;;
    esac
  fi
  srun --nodes="$LEARNER_NODES" --ntasks="$LEARNER_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --nodelist="$(joined "${nodes[@]:0:LEARNER_NODES}")" bash "$SCRIPT" learner "${told[@]}"
}

case ${1:-} in
  -h | --help | '') usage ;;
  learner | servers) "$@" ;;
  *) main "$@" ;;
esac

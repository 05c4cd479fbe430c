#!/usr/bin/env bash
# Every weighting scheme on the quickstart, one after another: does it train, and where do its weights go?
set -euo pipefail

steps=6 output='' launcher=() only=''
usage() {
  cat <<'HELP'
usage: scripts/all_schemes.sh [--steps N] [--output DIR] [--zero3] [--only "NAME ..."] [--key=value ...]

Runs `accelerate launch -m align.train --config configs/quickstart.yaml --weighting.type=X` for every scheme X (or those
of --only), with N steps (6), into DIR/X (a new folder under runs/). --zero3 shards it over two processes with DeepSpeed
ZeRO-3, on a CPU (scripts/setup deepspeed). Other arguments go on to the runs. Prints the last weights of each, and fails
when one of them does.
HELP
}
arguments=(--evaluation.every=2 --checkpoint.every=1000)
while (($#)); do
  case $1 in
    -h | --help) usage; exit ;;
    --steps | --output | --only)
      [ $# -gt 1 ] || { echo "$1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift ;;
    --zero3) launcher=(--config_file configs/accelerate/zero3_cpu.yaml) ;;
    --*=*) arguments+=("$1") ;;
    *) usage >&2; exit 2 ;;
  esac
  shift
done
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
if [ ${#launcher[@]} -gt 0 ]; then scripts/setup deepspeed; export OMP_NUM_THREADS=1; else scripts/setup; fi
mkdir -p runs
output=${output:-$(mktemp -d runs/all-schemes-XXXX)}
known=$(.venv/bin/python -c 'from align.weighting import SCHEMES; print(*SCHEMES)')
only=${only:-$known}
for scheme in $only; do
  case " $known " in *" $scheme "*) ;; *) echo "no scheme $scheme; there are: $known" >&2; exit 2 ;; esac
done

failed=()
for scheme in $only; do
  log=$output/$scheme.log
  echo "==> $scheme ($log)"
  mkdir -p "$output"
  # DeepSpeed's CPU threads may abort when the interpreter ends, so what counts is that the run says it is complete.
  .venv/bin/accelerate launch "${launcher[@]}" -m align.train --config configs/quickstart.yaml --weighting.type="$scheme" \
    --steps="$steps" --output="$output/$scheme" "${arguments[@]}" >"$log" 2>&1 || true
  if grep -q "^trained $steps steps" "$log"; then
    .venv/bin/python - "$scheme" "$output/$scheme/metrics.jsonl" <<'PYTHON'
import json, sys
last = json.loads(open(sys.argv[2]).read().splitlines()[-1])
weights = "  ".join(f"{key.removeprefix('weights/')} {value:.3f}" for key, value in last.items() if key.startswith("weights/"))
print(f"{sys.argv[1]:<22} step {last['step']}  {weights}  step scale {last['step_scale']:.3f}")
PYTHON
  else
    echo "$scheme FAILED; the end of $log:"
    tail -n 15 "$log"
    failed+=("$scheme")
  fi
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }

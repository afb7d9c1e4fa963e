#!/usr/bin/env bash
# shellcheck disable=SC2086,SC2329 # further words are split on purpose; steps are called by name
# What a node of 2, 4 or 8 GPUs is asked, step by step; NVLink multicast stays off throughout.
#
#   benchmarks/node.sh [--again] OUT STEP...      STEP: verify tune kernels decode vllm
#
# Steps run in the order given, the largest group of ranks first. Each is bounded and leaves one log
# and, per group, one JSON in OUT. A step whose JSON lies there is skipped, unless --again; one that
# this machine lacks the GPUs for says so. Tables come last, into OUT/tables.txt.
#
#   RANKS    ranks of the largest group. Default: one per GPU, two where that makes no group
#   LIMIT_S  seconds for all of it: what does not fit is left to the next run
#   VIRTUAL  what virtual_node.py wrote, to compare with; PYTHON: the interpreter
#   VERIFY TUNE KERNELS DECODE VLLM   further words for a step's command
#
# On one GPU `verify` alone runs, its ranks sharing it; on CPUs `verify` and `tune`.

set -uo pipefail

usage() {
  sed -n '3,/^$/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
say() { echo "node: $*"; }

again='' job=''
if [[ ${1-} == --again ]]; then
  again=yes
  shift
fi
[[ $# -ge 2 && $1 != -* ]] || usage
declare -A made=(
  [verify]=verify [tune]=profile [kernels]=native_kernels [decode]=decode [vllm]=vllm_ab
)
for step in "${@:2}"; do
  [[ -n ${made[$step]-} ]] || usage
done
mkdir -p "$1" || exit 3
out=$(realpath "$1") virtual=${VIRTUAL:+$(realpath "$VIRTUAL")}
shift
cd "$(dirname "$0")/.." || exit 3

scratch=$(mktemp -d) || exit 3
trap 'rm -rf "$scratch"' EXIT
trap '[[ -z $job ]] || kill "$job" 2>/dev/null; wait; exit 130' INT TERM
python=${PYTHON:-python3} limit_s=${LIMIT_S:-86400}
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 FUSEWISE_HOME=$scratch/home
gpus=$("$python" -c 'from fusewise.node import gpu_count; print(gpu_count())') || exit 3
most=${RANKS:-$((gpus > 2 ? gpus : 2))}
((most >= 2)) || usage

# bounded SECONDS COMMAND...: no longer than that, nor than what is left of LIMIT_S.
bounded() {
  local left=$((limit_s - SECONDS))
  timeout -k 10 "$(($1 < left ? $1 : left > 1 ? left : 1))" "${@:2}" &
  job=$!
  local code=0
  wait "$job" || code=$?
  job=''
  return "$code"
}

# What a step runs: STEP RANKS RESULT. Its JSON goes to RESULT, all else to its log.
verify() {
  bounded 300 "$python" -m fusewise verify --ranks "$1" --format json ${VERIFY-} >"$2"
}

tune() {
  local budget_s=$((60 + 15 * $1)) # 90 s at two ranks, 180 s at eight
  rm -rf "$scratch/tuned"
  bounded $((budget_s + 180)) "$python" -m fusewise tune --tp "$1" --budget ${budget_s}s \
    --into "$scratch/tuned" --plot "$out/tune_tp$1.svg" ${TUNE-} &&
    mv "$scratch"/tuned/device=*.json "$2" # '=' and ',' in a name do not survive every way home
}

kernels() {
  bounded 540 "$python" -m torch.distributed.run --standalone --nproc-per-node "$1" \
    benchmarks/native_kernels.py --out "$2" ${KERNELS-}
}

decode() { # cut short, it leaves the sizes it came to
  local code=0
  bounded 560 "$python" benchmarks/decode_h200.py --tp "$1" --layers 16 \
    --profile "$out/profile_tp$1.json" --output "$scratch/decode.json" ${DECODE-} || code=$?
  [[ ! -s $scratch/decode.svg ]] || mv "$scratch/decode.svg" "$out/decode_tp$1.svg"
  [[ ! -s $scratch/decode.json ]] || mv "$scratch/decode.json" "$2"
  return "$code"
}

vllm() {
  bounded 1500 env FUSEWISE_PROFILE="$out/profile_tp$1.json" HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 VLLM_FLASHINFER_ALLREDUCE_BACKEND=trtllm \
    "$python" benchmarks/vllm_ab.py --tp "$1" --layers 16 --output "$2" ${VLLM-}
}

# Why a step cannot run with so many ranks here; empty if it can.
lacking() {
  case $1 in
    verify) return ;;
    tune) ((gpus == 0)) && return ;;
  esac
  if ((gpus < $2)); then
    echo "needs $2 GPUs, this machine has $gpus"
  elif [[ $1 == decode || $1 == vllm ]] && [[ ! -s $out/profile_tp$2.json ]]; then
    echo "needs profile_tp$2.json: run tune first"
  elif [[ $1 == vllm ]] && ! "$python" -c 'import importlib.util as u; exit(not u.find_spec("vllm"))'; then
    echo "vLLM is not installed"
  fi
}

# one STEP RANKS: skipped, or run. What is not whole stays in OUT as a .part.json.
one() {
  local result=$out/${made[$1]}_tp$2.json code=0 began=$SECONDS why
  local part=${result%.json}.part.json
  if [[ -z $again && -s $result ]]; then
    say "$1, $2 ranks: ${result##*/} is there, skipped"
    return
  fi
  why=$(lacking "$1" "$2")
  if [[ -n $why ]]; then
    say "$1, $2 ranks: $why, skipped"
    return
  fi
  if ((limit_s - SECONDS < 10)); then
    say "$1, $2 ranks: no time left"
    return 124
  fi
  "$1" "$2" "$part" >>"$out/$1.log" 2>&1 || code=$?
  if [[ -s $part ]] && ((code == 0 || code == 6)); then # 6: verify found a backend that is wrong
    mv "$part" "$result"
    say "$1, $2 ranks: ${result##*/} after $((SECONDS - began)) s, exit code $code"
    return "$code"
  fi
  [[ -s $part ]] || rm -f "$part"
  say "$1, $2 ranks: exit code $code after $((SECONDS - began)) s; the end of $1.log:"
  tail -n 3 "$out/$1.log"
  return $((code ? code : 1))
}

# From what lies in OUT, whichever run left it.
tables() {
  local file
  for file in "$out"/profile_tp*.json; do
    [[ -s $file ]] || continue
    bounded 30 "$python" -m fusewise show --profile "$file"
    ((gpus)) || continue
    for engine in vllm sglang; do
      bounded 30 "$python" -m fusewise audit --engine $engine --profile "$file"
    done
  done
  for file in "$out"/native_kernels_tp*.json; do
    [[ ! -s $file ]] || bounded 30 "$python" benchmarks/native_summary.py "$file"
  done
  for file in "$out"/{profile,native_kernels}_tp*.json; do
    [[ ! -s $file || -z $virtual ]] ||
      bounded 30 "$python" benchmarks/virtual_vs_real.py "$virtual" "$file"
  done
  grep -sh '^|' "$out"/{decode,vllm}.log
}

status=0
for step in "$@"; do
  for ranks in 8 4 2; do
    ((ranks <= most)) || continue
    one "$step" "$ranks" || status=$?
    # tune verifies each candidate with fewer ranks too, and a model runs on the whole node.
    [[ $step == tune || $step == kernels ]] || break
  done
done
limit_s=$((SECONDS + 120)) # tables take seconds
tables >"$out/tables.txt" 2>&1
cat "$out/tables.txt"
exit "$status"

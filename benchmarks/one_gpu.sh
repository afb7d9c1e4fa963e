#!/usr/bin/env bash
# shellcheck disable=SC2086 # further words are split on purpose
# What one GPU is asked, step by step: that all of it is right. Speed is virtual_node.py's matter.
#
#   benchmarks/one_gpu.sh OUT STEP...
#
#   tests     tests/gpu without a model of vLLM's; what is skipped says what it lacks
#   vllm      tests/gpu with vLLM's own kernels and engine, two ranks
#   verify    fusewise verify with 2, 4 and 8 ranks
#   kills     50 ranks killed at random moments
#   sanitize  racecheck, initcheck and synccheck of the kernels under compute-sanitizer
#   soak      a million replays per world size
#
# Steps run in the order given. Each is bounded and leaves a log in OUT, and its JSON where it makes
# one. The log begins with the command and ends with its exit code and its seconds.
#
#   LIMIT_S   seconds for all of it; PYTHON: the interpreter
#   TESTS VERIFY KILLS SANITIZE SOAK   further words for a step's command

set -uo pipefail

usage() {
  sed -n '3,/^$/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[[ $# -ge 2 && $1 != -* ]] || usage
for step in "${@:2}"; do
  [[ $step =~ ^(tests|vllm|verify|kills|sanitize|soak)$ ]] || usage
done
mkdir -p "$1" || exit 3
out=$(realpath "$1") job='' status=0
shift
cd "$(dirname "$0")/.." || exit 3
trap '[[ -z $job ]] || kill "$job" 2>/dev/null; wait; exit 130' INT TERM
python=${PYTHON:-python3} limit_s=${LIMIT_S:-86400}
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# logged NAME SECONDS COMMAND...: no longer than that, nor than is left of LIMIT_S. What it says goes
# into NAME.log, its stdout into $data where that is set.
logged() {
  local log=$out/$1.log left=$((limit_s - SECONDS)) began=$SECONDS code=0
  if ((left < 3)); then
    echo "one_gpu: $1: no time left"
    status=124
    return
  fi
  echo "$ ${*:3}" | sed "s#$out#OUT#g; s#$python#python#" >"$log"
  timeout -k 10 "$(($2 < left ? $2 : left))" "${@:3}" >>"${data:-$log}" 2>>"$log" &
  job=$!
  wait "$job" || code=$?
  job=''
  echo "exit code $code after $((SECONDS - began)) s" | tee -a "$log" | sed "s/^/one_gpu: $1: /"
  ((code == 0)) || status=$code
}

pytest() {
  logged "$1" "$2" "$python" -m pytest -p no:cacheprovider -ra "${@:3}" ${TESTS-}
}

for step in "$@"; do
  case $step in
    tests) pytest tests 590 tests/gpu --ignore tests/gpu/test_vllm_engine.py ;;
    vllm)
      pytest vllm 590 tests/gpu/test_vllm_engine.py tests/gpu/test_vllm_router.py \
        tests/gpu/test_fp8_rule.py
      ;;
    verify)
      for ranks in 2 4 8; do
        rm -f "$out/verify_tp$ranks.json"
        data=$out/verify_tp$ranks.json logged "verify_tp$ranks" 300 \
          "$python" -m fusewise verify --ranks $ranks --format json ${VERIFY-}
      done
      ;;
    kills) logged kills 580 "$python" benchmarks/kills.py --kills 50 --out "$out/kills.json" ${KILLS-} ;;
    sanitize)
      for tool in racecheck initcheck synccheck; do
        # What torch's kernels fill must count as written.
        only='--kernel-name kernel_substring=fusewise'
        [[ $tool != initcheck ]] || only=''
        logged $tool 300 compute-sanitizer --tool $tool $only \
          "$python" benchmarks/sanitize.py ${SANITIZE-}
      done
      ;;
    soak) logged soak 590 "$python" benchmarks/soak.py --out "$out/soak.json" ${SOAK-} ;;
  esac
done
exit "$status"

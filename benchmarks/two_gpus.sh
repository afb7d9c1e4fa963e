#!/usr/bin/env bash
# What a two-GPU node is asked, step by step. Each step is bounded, leaves JSON and logs in OUT and
# prints its table last. NVLink multicast stays off throughout.
#
#   benchmarks/two_gpus.sh OUT STEP...     STEP: tests tune kernels decode
set -uo pipefail

if [[ $# -lt 2 ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
out=$1
shift
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit 1
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 FUSEWISE_HOME=$out/home
python=${PYTHON:-python3}

tests() {
  timeout -k 10 420 "$python" -m pytest tests/gpu -q -p no:cacheprovider 2>&1 | tee "$out/tests.log"
}

tune() {
  timeout -k 10 30 "$python" -m fusewise doctor
  timeout -k 10 400 "$python" -m fusewise tune --budget 90s --plot "$out/tune.svg" \
    --into "$out" 2>"$out/tune.log"
  tail -n 5 "$out/tune.log"
  local profile
  profile=$(find "$out" -maxdepth 1 -name 'device=*.json' | head -n 1)
  [[ -n $profile ]] || return 1
  for version in 0.22 0.33; do
    "$python" -m fusewise audit --engine vllm --version "$version" --profile "$profile"
  done | tee "$out/audit.txt"
}

kernels() {
  timeout -k 10 540 "$python" -m torch.distributed.run --nproc-per-node 2 \
    benchmarks/native_kernels.py --variants --out "$out/native_kernels.json" 2>"$out/kernels.log"
}

decode() {
  timeout -k 10 560 "$python" benchmarks/decode_h200.py --layers 16 2>"$out/decode.log"
  cp benchmarks/results/decode* "$out"/
}

status=0
for step in "$@"; do
  case $step in
    tests | tune | kernels | decode) "$step" || status=$? ;;
    *) echo "two_gpus: unknown step '$step'" >&2; exit 2 ;;
  esac
done
exit "$status"

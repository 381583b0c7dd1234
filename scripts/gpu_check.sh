#!/usr/bin/env bash
# Checks the package on a machine with an NVIDIA GPU, its own torch and nvcc, and no network.
#
#   scripts/gpu_check.sh [OUTPUT] SLICE...      OUTPUT defaults to $OUT, else benchmarks/results/<device>
#
# Slices, each at most 8 minutes: build test sanitize bench-nonlocal bench-masked tune-nonlocal all
# A slice that has succeeded is not repeated: OUTPUT/slices.txt lists those, OUTPUT/gpu_check.log says how.
# PYTHON names the interpreter (default: python3), RLNAS_CUDA_ARCHS the GPU (default: 90a).
set -uo pipefail
cd "$(dirname "$0")/.."

readonly SLICES="build test sanitize bench-nonlocal bench-masked tune-nonlocal"
export PYTHON="${PYTHON:-python3}" PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
export RLNAS_CUDA=1 RLNAS_CUDA_ARCHS="${RLNAS_CUDA_ARCHS:-90a}"

build() { "$PYTHON" setup.py build_ext --inplace; }
built() { "$PYTHON" -c "import torch, rlnas_fast._cpu, rlnas_fast._cuda" 2>/dev/null || build; }

# Most of the time goes into compiling Triton kernels: with pytest-xdist, where it is there, in parallel.
run_tests() {
  local workers=()
  "$PYTHON" -c "import xdist" 2>/dev/null && workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
  # Before 2.10, torch refuses cuBLAS in its deterministic mode without this setting.
  CUBLAS_WORKSPACE_CONFIG=:4096:8 "$PYTHON" -m pytest -q -m gpu "${workers[@]}" -p no:cacheprovider $(grep -rlE "mark\.gpu" tests)
}

# memcheck over the CUDA C++ kernels at odd sizes; Triton's kernels are left to its own bounds masks.
sanitize() {
  compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider \
    tests/ops -k "cuda and (as_exact or empty) and not 31"
}

bench() { # NAME: runs benchmarks/bench_NAME_gpu.py
  local script="benchmarks/bench_$1_gpu.py"
  [ -f "$script" ] || { echo "no $script"; return 1; }
  "$PYTHON" "$script" "${@:2}" --json "$output/$1.json"
}

slice() { # on a machine that another slice has not built on, builds first
  case "$1" in test | sanitize | bench-* | tune-*) built || return 1 ;; esac
  case "$1" in
    build) build ;;
    test) run_tests ;;
    sanitize) sanitize ;;
    bench-nonlocal) bench nonlocal_attention --warm --profile ;;
    bench-masked) bench masked_matmul --warm ;;
    tune-nonlocal) "$PYTHON" benchmarks/tune_nonlocal_attention_gpu.py --json "$output/tune_nonlocal.json" ;;
    *) echo "unknown slice '$1'; known: $SLICES" >&2; exit 2 ;;
  esac
}

device() { "$PYTHON" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))"; }

case " $SLICES all " in
  *" ${1:-} "*) output="${OUT:-benchmarks/results/$(device)}" ;;
  *) output="${1:?name an output folder or a slice}"; shift ;;
esac
mkdir -p "$output"
[ $# -gt 0 ] || set -- all
[ "$1" = all ] && set -- $SLICES

status=0
for name in "$@"; do
  if grep -qs "^$name " "$output/slices.txt"; then
    echo "== $name: done before"
    continue
  fi
  started=$SECONDS
  echo "== $name" | tee -a "$output/gpu_check.log"
  if (slice "$name") 2>&1 | tee -a "$output/gpu_check.log"; then
    echo "$name $((SECONDS - started)) s" | tee -a "$output/slices.txt"
  else
    status=1
    echo "== $name: FAILED after $((SECONDS - started)) s" | tee -a "$output/gpu_check.log"
  fi
done
exit $status

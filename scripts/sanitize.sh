#!/bin/sh
# Runs the tests of the native code under AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: scripts/sanitize.sh [pytest arguments]; PYTHON chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
build=build/sanitize
mkdir -p "$build/package"
PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
for module in _cpu _torch; do
  cmake -S . -B "$build/$module" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DRLNAS_SANITIZE=address,undefined \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    -DRLNAS_TORCH="$("$python" -c 'import torch; print(*torch.__path__)')" \
    -DRLNAS_MODULE="$module" -DRLNAS_OUTPUT="$PWD/$build/package/rlnas_fast"
  cmake --build "$build/$module"
done
# The package's Python files beside the sanitized module.
(cd rlnas_fast && find . -name '*.py' -exec cp --parents {} "../$build/package/rlnas_fast/" \;)
libasan=$(${CXX:-g++} -print-file-name=libasan.so)
libubsan=$(${CXX:-g++} -print-file-name=libubsan.so)
libstdcxx=$(${CXX:-g++} -print-file-name=libstdc++.so)
[ $# -gt 0 ] || set -- tests/ops -k "not compile and not gradcheck and not finite and not gpu"
# Python and PyTorch leak by design; PyTorch's own code is not instrumented.
LD_PRELOAD="$libasan $libubsan $libstdcxx" \
  ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  PYTHONPATH="$PWD/$build/package" "$python" -m pytest -q -p no:cacheprovider "$@"

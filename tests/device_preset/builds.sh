#!/usr/bin/env bash
# The preset `device`, which a bare GPU machine builds: it compiles, and its checks run where a device is and say so where
# none is. What is found broken there costs an hour of that machine.
#
# Usage: builds.sh SOURCE_FOLDER BUILD_FOLDER
set -euo pipefail
command -v nvcc >/dev/null || { echo "skipped: no nvcc"; exit 77; }
cmake --preset device -S "$1" -B "$2" >"$2.log" 2>&1 || { cat "$2.log"; exit 1; }
cmake --build "$2" --parallel 1 >"$2.log" 2>&1 || { grep -A5 -E 'error|FAILED' "$2.log" || cat "$2.log"; exit 1; }
for check in kernels layers linalg places stream transformer; do
  code=0
  "$2/bin/cuda_${check}_check" >"$2.log" 2>&1 || code=$?
  ((code == 0 || code == 77)) || { echo "FAILED: cuda_${check}_check: $(cat "$2.log")"; exit 1; }
done
[[ -x $2/bin/device_bench ]] || { echo "FAILED: device_bench is missing"; exit 1; }
echo "$0: passed"

#!/usr/bin/env bash
# Runs what needs real torch on two, four and eight processes, and the examples; exits with 77 where torch cannot be imported.
#
# Usage: torch_test.sh REPOSITORY_ROOT LIBRARY PROGRAM
# Python is LOWBAND_PYTHON, else the repository's .venv (tests/run --with-torch makes it), else python3.
set -euo pipefail
cd "$1"
export LOWBAND_LIBRARY=$2 LOWBAND_PROGRAM=$3 PYTHONPATH=plugin/python OMP_NUM_THREADS=1
python=${LOWBAND_PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=python3
"$python" -c 'import torch' 2>/dev/null || {
  echo "skipped: $python cannot import torch (tests/run --with-torch installs it)"
  exit 77
}
# The machine's own name may lead nowhere; nothing here needs it.
export GLOO_SOCKET_IFNAME=lo
python() { timeout --kill-after 5 120 "$python" "$@"; }
job() { python -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$@"; }
job 2 tests/plugin/python/all_jobs.py
job 4 tests/plugin/python/all_jobs.py
job 8 tests/plugin/python/all_jobs.py
python tests/plugin/python/torch_failures_test.py
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  job 2 tests/plugin/python/cuda_job.py
else
  echo "skipped: cuda_job.py, torch has no CUDA device"
fi
# Rank 8 of two layers of seven matrices; the embedding and five gains.
learns() {
  output=$(job "$@")
  grep -q 'step 100  loss 0\..* 78848 bytes of factors, 17664 dense, instead of 419072' <<<"$output" || {
    echo "$output"
    exit 1
  }
}
learns 2 plugin/example/ddp.py
learns 4 plugin/example/fsdp2.py

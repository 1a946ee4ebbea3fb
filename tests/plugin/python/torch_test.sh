#!/usr/bin/env bash
# Runs what needs real torch on two and four processes, and the examples; exits with 77 where torch cannot be imported.
#
# Usage: torch_test.sh REPOSITORY_ROOT LIBRARY
# Python is LOWBAND_PYTHON, else the repository's .venv (tests/run --with-torch makes it), else python3.
set -euo pipefail
cd "$1"
export LOWBAND_LIBRARY=$2 PYTHONPATH=plugin/python OMP_NUM_THREADS=1
python=${LOWBAND_PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=python3
"$python" -c 'import torch' 2>/dev/null || {
  echo "skipped: $python cannot import torch (tests/run --with-torch installs it)"
  exit 77
}
job() { "$python" -m torch.distributed.run --standalone --nproc-per-node "$@"; }
job 2 tests/plugin/python/torch_job.py
job 4 tests/plugin/python/torch_job.py test_ddp_sends_nothing_but_factors \
  test_every_mesh_takes_the_steps_of_one_process_with_all_data
job 4 tests/plugin/python/fsdp_job.py
# Rank 8 of two layers of six matrices; the embedding, the head and five gains.
learns() {
  output=$(job "$@")
  grep -q 'step 100  loss 0\..* 73728 bytes of factors, 34048 dense, instead of 427264' <<<"$output" || {
    echo "$output"
    exit 1
  }
}
learns 2 plugin/example/ddp.py
learns 4 plugin/example/fsdp2.py

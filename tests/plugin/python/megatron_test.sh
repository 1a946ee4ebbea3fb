#!/usr/bin/env bash
# Runs lowband.megatron with the real Megatron-core on four processes; exits with 77 where that cannot be imported.
#
# Usage: megatron_test.sh REPOSITORY_ROOT LIBRARY
# Python as for torch_test.sh; Megatron-core in .venv/megatron, where tests/run --with-torch puts it.
set -euo pipefail
cd "$1"
export LOWBAND_LIBRARY=$2 PYTHONPATH=plugin/python:.venv/megatron OMP_NUM_THREADS=1
python=${LOWBAND_PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=python3
"$python" -c 'import importlib.util, sys, torch; sys.exit(importlib.util.find_spec("megatron") is None)' 2>/dev/null || {
  echo "skipped: $python finds no torch or no megatron (tests/run --with-torch installs them)"
  exit 77
}
# As in torch_test.sh: no name of the machine is needed, and every wait ends.
export GLOO_SOCKET_IFNAME=lo
job() {
  timeout --kill-after 5 300 "$python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 4 "$@"
}
job tests/plugin/python/megatron_job.py
# Rank 8 of two layers of six matrices; the embedding, the head, and five gains of both processes of a replica.
output=$(job tests/plugin/python/megatron_on_cpu.py plugin/example/megatron_core.py)
grep -q 'step 100  loss 0\..* 73728 bytes of factors, 35328 dense' <<<"$output" || {
  echo "$output"
  exit 1
}

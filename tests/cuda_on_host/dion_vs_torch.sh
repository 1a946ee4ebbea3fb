#!/usr/bin/env bash
# Two steps of Dion on the host's stand-in for a device, and in torch as perf/gpu/run_all runs it, from equal numbers:
# equal sums of squares of the weights. Skipped (77) without torch.
#
# Usage: dion_vs_torch.sh REPOSITORY_ROOT OPTIMIZER_BENCH
# Python is LOWBAND_PYTHON, else the repository's .venv (tests/run --with-torch makes it), else python3.
set -euo pipefail
cd "$1"
bench=$2
export OMP_NUM_THREADS=1
python=${LOWBAND_PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=python3
if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "skipped: $python has no torch"
  exit 77
fi
for factor_rank in 1 12; do
  ours=$("$bench" dion "$factor_rank" 1 1)
  OURS=$ours FACTOR_RANK=$factor_rank PYTHONPATH=perf/gpu "$python" - <<'PYTHON'
import json, os, torch, torch_dion
ours = json.loads(os.environ["OURS"])["check"]
theirs = torch_dion.Dion(torch, int(os.environ["FACTOR_RANK"]), 1, "cpu").check()
# A column of P or Q is off by the rounding of sums of 2048 floats, 1e-5 at worst; sums over all weights are off by less.
print(f"rank {os.environ['FACTOR_RANK']}: {ours}, torch {theirs}")
assert abs(ours / theirs - 1) <= 1e-5, (ours, theirs)
PYTHON
done

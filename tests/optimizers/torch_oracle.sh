#!/usr/bin/env bash
# Compares optimizers with torch.optim; exits with 77 where torch cannot be imported.
#
# Usage: torch_oracle.sh REPOSITORY_ROOT PROGRAM
# Python is LOWBAND_PYTHON, else the repository's .venv (tests/run --with-torch makes it), else python3.
set -euo pipefail
cd "$1"
export OMP_NUM_THREADS=1
python=${LOWBAND_PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=python3
exec "$python" tests/optimizers/torch_oracle.py "$2"

#!/usr/bin/env bash
# Builds the wheel, installs it into a fresh virtual environment with nothing else, and runs the package's tests there.
# Exits with 77 unless LOWBAND_WHEEL is set, as tests/run --with-torch does: it downloads scikit-build-core.
#
# Usage: wheel_test.sh REPOSITORY_ROOT
set -euo pipefail
[[ -n ${LOWBAND_WHEEL:-} ]] || {
  echo "skipped: LOWBAND_WHEEL is not set (tests/run --with-torch sets it)"
  exit 77
}
root=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset LOWBAND_LIBRARY PYTHONPATH
# The names of the compilers are those of launcher/build, so that ccache knows what that compiled already.
export CC=cc CXX=c++
command -v ccache >/dev/null && export LOWBAND_COMPILER_LAUNCHER=ccache
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$scratch" "$root"
"$scratch/venv/bin/pip" install --quiet "$scratch"/lowband-*.whl
cd "$scratch"
OMP_NUM_THREADS=1 "$scratch/venv/bin/python" "$root/tests/plugin/python/package_test.py"

#!/usr/bin/env bash
# Installs the plug-in library, builds the example trainer against what was installed and nothing else, and runs it
# on two processes: the loss falls, both end with the same weights, only factors travelled.
#
# Usage: install_test.sh REPOSITORY_ROOT BUILD_FOLDER UCX_JOB
set -euo pipefail
export CMAKE_GENERATOR=Ninja # that launcher/setup installs; make may be missing
root=$1 build=$2 ucx_job=$3
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
fail() {
  echo "$1" >&2
  cat "$scratch/output" >&2
  exit 1
}

cmake --install "$build" --component plugin --prefix "$scratch/installed" >/dev/null
if grep -rn "$root" "$scratch/installed" --include='*.cmake' --include='*.h' --include='*.hpp'; then
  echo "the install tree names the source tree" >&2
  exit 1
fi
(($(wc -l <"$root/plugin/example/trainer.cc") < 150)) || fail "the example has 150 lines or more"
cp -r "$root/plugin/example" "$scratch/example" # so that no header is found beside it
cmake -S "$scratch/example" -B "$scratch/build" -DCMAKE_PREFIX_PATH="$scratch/installed" \
  -DCMAKE_CXX_FLAGS='-Wall -Wextra -Werror' >"$scratch/output" 2>&1 || fail "configuring failed"
cmake --build "$scratch/build" >"$scratch/output" 2>&1 || fail "building failed"
OMP_NUM_THREADS=1 "$ucx_job" 2 "$scratch/build/trainer" >"$scratch/output" 2>&1 || fail "running failed"

# r (m + n) elements: 2 (32 + 16) + 2 (8 + 32) = 176
grep -q '704 bytes of factors instead of 3072' "$scratch/output" || fail "expected 704 bytes of factors"
first=$(sed -n 's/^step   0  loss \([^ ]*\) .*/\1/p' "$scratch/output")
last=$(sed -n 's/^step 199  loss \([^ ]*\) .*/\1/p' "$scratch/output")
awk -v first="$first" -v last="$last" 'BEGIN { exit !(last < first / 10) }' || fail "loss $first, then $last"
(($(sed -n 's/.* sum to //p' "$scratch/output" | wc -l) == 2)) || fail "expected two processes to end"
(($(sed -n 's/.* sum to //p' "$scratch/output" | sort -u | wc -l) == 1)) || fail "the replicas differ"

# Without the others there is an error, not a wait.
if WORLD_SIZE=2 RANK=5 MASTER_ADDR=localhost MASTER_PORT=29999 "$scratch/build/trainer" >"$scratch/output" 2>&1; then
  fail "expected RANK 5 of 2 to be refused"
fi
grep -q 'RANK' "$scratch/output" || fail "expected an error that names RANK"

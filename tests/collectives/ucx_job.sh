#!/usr/bin/env bash
# Runs a program as N processes that meet over TCP, without MPI; fails when any of them does. Exit code 77, skipped, when
# all of them say so.
#
# Usage: ucx_job.sh N PROGRAM [word ...]
set -uo pipefail
processes=$1
shift
export WORLD_SIZE=$processes MASTER_ADDR=localhost LOWBAND_TOKEN=$RANDOM LOWBAND_RENDEZVOUS_SECONDS=30
# Below the range from which systems choose ports themselves; another one when two jobs meet there.
export MASTER_PORT=$((20000 + ($$ + RANDOM) % 10000))
pids=()
trap 'kill "${pids[@]}" 2>/dev/null' EXIT
for ((process = 0; process < processes; process++)); do
  RANK=$process "$@" &
  pids+=($!)
done
code=0 skipped=0
for pid in "${pids[@]}"; do
  wait "$pid"
  case $? in
    0) ;;
    77) skipped=$((skipped + 1)) ;;
    *) code=1 ;;
  esac
done
((skipped == 0)) && exit "$code"
((skipped == processes)) && exit 77
exit 1

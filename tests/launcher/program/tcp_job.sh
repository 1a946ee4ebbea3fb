#!/usr/bin/env bash
# A job over UCX: without MPI, where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say, and under mpirun. It takes the
# trajectory of the job over MPI, and ends as one when a process is killed or refuses.
#
# Usage: tcp_job.sh LOWBAND [LOWBAND_RUN]
set -uo pipefail
lowband=$1 run=${2-}
# shellcheck source=tests/launcher/program/small_job.sh
source "$(dirname "$(realpath "$0")")/small_job.sh"

export OMP_NUM_THREADS=1 LOWBAND_THREADS=1
small=(train run.txtpb --set mesh.tensor=1 --set schedule.steps=40)
losses() { grep -o '"step":{"step":[0-9]*,"loss":[0-9.]*' "runs/$1/run.jsonl"; }

# start NAME WORD ...: both processes of a job in the background, as ${pids[@]}; their words in NAME.0 and NAME.1.
start() {
  local name=$1 process
  shift
  # Below the range from which systems choose ports themselves.
  local port=$((20000 + ($$ + RANDOM) % 10000))
  pids=()
  for process in 0 1; do
    RANK=$process WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=$port LOWBAND_TOKEN=small \
      LOWBAND_RENDEZVOUS_SECONDS=20 "$lowband" "${small[@]}" --set name="$name" "$@" >"$name.$process" 2>&1 &
    pids+=($!)
  done
}
# Waits for both; their exit codes in ${codes[@]}.
finished() {
  local pid
  codes=()
  for pid in "${pids[@]}"; do
    wait "$pid"
    codes+=($?)
  done
}

start tcp
finished
[[ "${codes[*]}" == "0 0" ]] || fail "tcp: exit codes ${codes[*]}: $(cat tcp.0 tcp.1)"
[[ $(losses tcp | wc -l) == 40 ]] || fail "tcp: found $(losses tcp | wc -l) steps, expected 40"
if [[ -n $run ]]; then
  for backend in mpi ucx; do
    "$run" -np 2 --binary "$lowband" -- "${small[@]}" --backend "$backend" --set name="$backend" >"$backend.log" 2>&1 ||
      fail "$backend: $(cat "$backend.log")"
    [[ $(losses "$backend") == "$(losses tcp)" ]] || fail "$backend: other losses than over TCP"
  done
  "$run" -np 2 --binary "$lowband" -- "${small[@]}" --backend gloo >refused.log 2>refused.err
  code=$?
  [[ $code == 64 && $(wc -l <refused.err) == 1 ]] || fail "refused under mpirun: exit code $code: $(cat refused.err)"
fi

# A killed process: the other one says so, and that the job may be started again.
start killed --set schedule.steps=100000
for _ in $(seq 200); do
  [[ $(losses killed 2>/dev/null | wc -l) -ge 10 ]] && break
  sleep 0.05
done
kill -KILL "${pids[0]}"
finished
[[ ${codes[1]} == 75 ]] || fail "killed: exit code ${codes[1]}, expected 75: $(cat killed.1)"
grep -q '^\[process 1 of 2\] .*process 0 is gone' killed.1 || fail "killed: $(cat killed.1)"

# Bad input: one line on all processes together, exit code 64.
start refused --set optimizer.mu=2
finished
[[ "${codes[*]}" == "64 64" && $(cat refused.0 refused.1 | wc -l) == 1 ]] ||
  fail "refused: exit codes ${codes[*]}: $(cat refused.0 refused.1)"

# What the environment must say, variable by variable.
refused() { # PART|PART WORD ...: one line, exit code 64
  local parts=$1 message code part
  shift
  message=$(env "$@" "$lowband" "${small[@]}" 2>&1)
  code=$?
  [[ $code == 64 && $(wc -l <<<"$message") == 1 ]] || fail "$*: exit code $code: $message"
  for part in ${parts//|/ }; do [[ $message == *"$part"* ]] || fail "$*: '$part' is missing: $message"; done
}
refused "RANK|nothing|expected" WORLD_SIZE=2
refused "RANK|2|expected" WORLD_SIZE=2 RANK=2
refused "MASTER_ADDR|nothing" WORLD_SIZE=2 RANK=0
refused "MASTER_PORT|99999" WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=99999
refused "WORLD_SIZE|two" WORLD_SIZE=two

# A process that never comes.
RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=$((20000 + RANDOM % 10000)) LOWBAND_RENDEZVOUS_SECONDS=1 \
  "$lowband" "${small[@]}" >missing.log 2>&1
code=$?
[[ $code == 75 ]] && grep -q 'process 1 of 2' missing.log || fail "missing: exit code $code: $(cat missing.log)"
finish

#!/usr/bin/env bash
# A job of four real processes: it trains, survives being stopped and being killed, and leaves no process behind.
#
# Usage: job.sh LOWBAND LOWBAND_RUN
set -uo pipefail
lowband=$1 run=$2
# shellcheck source=tests/launcher/program/small_job.sh
source "$(dirname "$(realpath "$0")")/small_job.sh"

train() { # NAME [words of lowband]
  local name=$1
  shift
  "$run" -np 4 --binary "$lowband" -- train run.txtpb --set name="$name" --set checkpoint.resume=auto "$@"
}
# The same in the background, as $job. Job control, or the shell would have it ignore SIGINT.
start() {
  local name=$1
  shift
  set -m
  "$run" -np 4 --binary "$lowband" -- train run.txtpb --set name="$name" --set checkpoint.resume=auto "$@" \
    >"$name.log" 2>"$name.err" &
  job=$!
  set +m
}
losses() { grep -o '"step":{"step":[0-9]*,"loss":[0-9.]*' "runs/$1/run.jsonl"; }
processes_of() { pgrep -f "train run.txtpb --set name=$1" | while read -r pid; do
  [[ $(readlink "/proc/$pid/exe") == "$(realpath "$lowband")" ]] && echo "$pid"; done; }
wait_for_steps() { # NAME COUNT: until the record has so many
  for _ in $(seq 200); do
    [[ $(losses "$1" 2>/dev/null | wc -l) -ge $2 ]] && return
    sleep 0.05
  done
  fail "$1: no $2 steps within 10 seconds"
}
long=(--set schedule.steps=4000 --set checkpoint.interval_steps=10)

# A run from start to end, bytes as planned.
train whole --set schedule.steps=40 --set schedule.kind=CONSTANT_LINEAR >whole.log 2>&1 || fail "whole: $(cat whole.log)"
grep -q '"planned_factor_bytes":\([0-9]*\),"counted_factor_bytes":\1,' runs/whole/summary.json ||
  fail "whole: counted differs from planned: $(cat runs/whole/summary.json)"

# SIGKILL one process: one line, no process left, within 10 seconds.
start killed "${long[@]}"
wait_for_steps killed 25
victim=$(processes_of killed | head -1)
begin=$(date +%s%N)
kill -KILL "$victim"
wait "$job"
code=$?
milliseconds=$((($(date +%s%N) - begin) / 1000000))
((milliseconds < 10000)) || fail "killed: took $milliseconds ms"
((code != 0)) || fail "killed: exit code 0"
[[ $(wc -l <killed.err) == 1 ]] && grep -qE 'process [0-3] of 4 .*signal 9' killed.err ||
  fail "killed: expected one line that names the process, found: $(cat killed.err)"
[[ -z $(processes_of killed) ]] || fail "killed: processes left"
echo "killed: ended after $milliseconds ms: $(cat killed.err)"

# The same run continues and has the trajectory of an undisturbed one.
more=(--set schedule.steps=60 --set schedule.kind=CONSTANT_LINEAR --set schedule.decay_steps=1)
train undisturbed "${more[@]}" >undisturbed.log 2>&1 || fail "undisturbed: $(cat undisturbed.log)"
start stopped "${more[@]}" --set checkpoint.interval_steps=5
wait_for_steps stopped 20
kill -KILL "$(processes_of stopped | tail -1)"
wait "$job"
train stopped "${more[@]}" >>stopped.log 2>&1 || fail "stopped, continued: $(cat stopped.log)"
[[ $(losses stopped) == "$(losses undisturbed)" ]] || fail "the continued run took another trajectory"

# It goes on with half of the processes, and says so.
"$run" -np 2 --binary "$lowband" -- train run.txtpb --set name=stopped --set checkpoint.resume=auto \
  --set 'mesh={shard: 2}' "${more[@]}" --set schedule.steps=70 >resharded.log 2>&1 || fail "resharded: $(cat resharded.log)"
grep -q 'from a checkpoint of replica 2 x shard 1 x tensor 2' resharded.log || fail "resharded: $(cat resharded.log)"
[[ $(losses stopped | wc -l) == 70 ]] || fail "resharded: found $(losses stopped | wc -l) steps, expected 70"

# Ctrl-C: everything ends within 3 seconds and a checkpoint is there.
start interrupted "${long[@]}" --set checkpoint.interval_steps=0
wait_for_steps interrupted 10
begin=$(date +%s%N)
kill -INT "$job"
wait "$job"
code=$?
milliseconds=$((($(date +%s%N) - begin) / 1000000))
((milliseconds < 3000)) || fail "interrupted: took $milliseconds ms"
[[ $code == 130 ]] || fail "interrupted: exit code $code, expected 130"
[[ -z $(processes_of interrupted) ]] || fail "interrupted: processes left"
compgen -G 'runs/interrupted/checkpoints/step-*/manifest.txtpb' >/dev/null || fail "interrupted: no checkpoint"
echo "interrupted: ended after $milliseconds ms"

# Bad input under mpirun: one line, exit code 64.
train refused --set optimizer.mu=2 >refused.log 2>refused.err
code=$?
[[ $code == 64 && $(wc -l <refused.err) == 1 ]] || fail "refused: exit code $code: $(cat refused.err)"
train refused --set mesh.tensor=1 >refused.log 2>refused.err
code=$?
[[ $code == 64 && $(wc -l <refused.err) == 1 ]] || fail "refused mesh: exit code $code: $(cat refused.err)"

# One rank too many in one matrix: 4,048 instead of 3,968 elements, and the run stops before its first step.
matrices=$("$lowband" plan run.txtpb --json | grep -o '"name":"[^"]*","role"' | cut -d'"' -f4)
explicit_profile() { # RANK of the last matrix; 4 for all others
  local last entries=''
  last=$(tail -1 <<<"$matrices")
  for matrix in $matrices; do
    entries+=" ranks {key: \"$matrix\" value: $([[ $matrix == "$last" ]] && echo "$1" || echo 4)}"
  done
  echo "profile={kind: EXPLICIT$entries}"
}
budget=(--set 'budget={reference: "uniform:4" tolerance: 0.001}' --set mesh.tensor=1 --set schedule.steps=2)
pair() {
  "$run" -np 2 --binary "$lowband" -- train run.txtpb "${budget[@]}" "$@"
}
pair --set name=within --set "$(explicit_profile 4)" >within.log 2>&1 || fail "within the budget: $(cat within.log)"
pair --set name=exceeding --set "$(explicit_profile 5)" >exceeding.log 2>exceeding.err
code=$?
[[ $code == 64 && $(wc -l <exceeding.err) == 1 ]] || fail "budget: exit code $code: $(cat exceeding.err)"
for part in budget.reference "found 16192" "expected 15872" "layers.1.mlp.down_proj.weight 5 -> 4: ratio 1" "nearest uniform rank 4: ratio 1"; do
  grep -qF -- "$part" exceeding.err || fail "budget: '$part' is missing: $(cat exceeding.err)"
done
[[ ! -e runs/exceeding ]] || fail "budget: a run folder was made"
[[ -z $(processes_of exceeding) ]] || fail "budget: processes left"
finish
